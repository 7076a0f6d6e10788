"""That the step of a recipe is taken apart rightly, and that both forms are the same training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from voxtrast import kernels
from voxtrast.benchmarks import train
from voxtrast.methods import METHODS, cover
from voxtrast.methods.parts import positional_contrast

SMALL = [
    "cover-tiny",
    "views.crop=[16,16,16]",
    "backbone.features=[8,16,16]",
    "method.units=[2,1,1]",
    "method.max_unreachable=1",
]


def test_both_forms_learn_the_same_and_every_part_takes_time(tiny_store: Path, tmp_path: Path, capsys) -> None:
    words = [*SMALL, f"data={tiny_store}", "--steps", "3", "--device", "cpu", "--output", str(tmp_path / "here.jsonl")]
    assert train.main(words) == 0
    said = capsys.readouterr().out
    assert all((part in said) == (part != "adversary") for part in train.PARTS)
    ours, references = (json.loads(line) for line in (tmp_path / "here.jsonl").read_text(encoding="utf-8").splitlines())
    assert ours["provider"] == "ours"
    assert ours["op"] == "step of cover-tiny"
    assert ours["first_loss_difference"] < 1e-6
    assert ours["loss_difference"] < 1e-4
    for line in (ours, references):
        parts = {name: seconds for name, seconds in line["parts_s"].items() if name != "data"}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(line["median_s"], rel=0.5)
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert line["memory_mb"] > 0
        assert line["synthetic"] is False
    assert {"local_correlation", "warp_backward"} <= set(ours["operators_s"])


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_one_batch_can_be_repeated_in_any_precision(precision: str, tiny_store: Path, tmp_path: Path) -> None:
    output = tmp_path / "here.jsonl"
    words = [*SMALL, f"data={tiny_store}", f"train.autocast={precision}", "--synthetic", "--steps", "2"]
    assert train.main([*words, "--device", "cpu", "--output", str(output)]) == 0
    ours, references = (json.loads(line) for line in output.read_text(encoding="utf-8").splitlines())
    assert (ours["synthetic"], ours["precision"]) == (True, precision)
    assert ours["shares"]["data"] < 0.01
    assert ours["first_loss_difference"] < 1e-3
    assert references["memory_mb"] > 0


def test_a_step_of_the_last_stage_is_told_apart_for_any_method(tiny_store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "engine"))
    from stand_in import STAGES, StandIn, recipe

    monkeypatch.setitem(METHODS, "stand_in", StandIn)
    output = tmp_path / "here.jsonl"
    words = [str(recipe(tmp_path, STAGES)), f"data={tiny_store}", "backbone.features=[8,16,16]"]
    assert train.main([*words, "--steps", "2", "--device", "cpu", "--output", str(output)]) == 0
    ours = json.loads(output.read_text(encoding="utf-8").splitlines()[0])
    assert set(ours["parts_s"]) == set(train.PARTS)
    assert all(seconds > 0 for name, seconds in ours["parts_s"].items() if name != "data")
    assert ours["shape"]["batch"] == 4


def test_time_goes_to_the_part_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Slow(torch.autograd.Function):
        """Doubles, in so many seconds forward and backward."""

        @staticmethod
        def forward(ctx, image, forward_s, backward_s):
            now[0] += forward_s
            ctx.backward_s = backward_s
            return image * 2

        @staticmethod
        def backward(ctx, gradient):
            now[0] += ctx.backward_s
            return gradient * 2, None, None

    monkeypatch.setattr(train.Clock, "_now", lambda self: now[0])
    backbone = SimpleNamespace(
        encode=lambda image: [Slow.apply(image, 1.0, 2.0)], decode=lambda maps: [Slow.apply(maps[0], 4.0, 8.0)]
    )
    clock = train.Clock(SimpleNamespace(on_gpu=False))
    train.watch(SimpleNamespace(backbone=backbone), clock)
    clock.start("losses forward")
    maps = backbone.encode(torch.ones(1, requires_grad=True))
    [fine] = backbone.decode(maps)
    [again] = backbone.encode(torch.ones(1, requires_grad=True))
    loss = Slow.apply(fine + again, 16.0, 32.0).sum()
    clock.enter("losses backward")
    loss.backward()
    clock.enter("optimizer")
    now[0] += 64.0
    clock.enter(None)
    assert clock.seconds == {
        "data": 0, "encoder forward": 2, "decoder forward": 4, "losses forward": 16, "losses backward": 32,
        "decoder backward": 8, "encoder backward": 4, "optimizer": 64, "adversary": 0,
    }  # fmt: skip


def test_the_references_stand_in_for_the_operators_and_leave_again() -> None:
    with train.references_in(cover):
        assert cover.vector_pyramid is kernels.vector_pyramid_reference
        assert cover.warped_cosine_loss is kernels.warped_cosine_loss_reference
    assert cover.vector_pyramid is kernels.vector_pyramid
    assert cover.warped_cosine_loss is kernels.warped_cosine_loss


def test_the_references_stand_in_for_the_operators_of_shared_parts_too() -> None:
    with train.references_in_methods():
        assert positional_contrast.positional_info_nce is not kernels.positional_info_nce
        vectors, positions = torch.randn(4, 8), torch.tensor([0.0, 0.0, 1.0, 1.0])
        found = positional_contrast.positional_info_nce(vectors, positions, threshold=0.5, group=None)
        assert torch.equal(found, kernels.positional_info_nce_reference(vectors, positions, threshold=0.5))
        assert cover.vector_pyramid is kernels.vector_pyramid_reference
    assert positional_contrast.positional_info_nce is kernels.positional_info_nce


@pytest.mark.parametrize(
    ("words", "said"),
    [(["cover-tiny"], "error: data: not given"), (["cover-tinny", "data=x"], "error: recipe"), (["data=x"], "x")],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_at_least_one_step_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--steps", "0"])
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["cover-tiny", "data=x", "--device", "cuda"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
