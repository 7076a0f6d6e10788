"""Fine-tuning end to end on a store of spheres."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from voxtrast.engine.data.store import INDEX, VOLUMES, Store, file_sha256
from voxtrast.engine.downstream import finetune as module
from voxtrast.engine.downstream.cases import read_case
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.downstream.inference import predict_logits
from voxtrast.engine.errors import UserError
from voxtrast.engine.export import export
from voxtrast.engine.weights import load_weights, save_weights
from voxtrast.methods.backbone import BackboneConfig, build_network


def run(weights: Path, store: Store, **settings: Any) -> dict[str, Any]:
    return finetune(weights, store.path, **{"labels": 3, "seed": 0, "steps": 15, "progress": False, **settings})


def test_it_learns_and_both_arms_share_everything_but_the_weights(weights: Path, store: Store) -> None:
    pretrained, scratch = run(weights, store), run(weights.parent, store, from_scratch=True)
    assert (pretrained["arm"], scratch["arm"]) == ("pretrained", "scratch")
    shared = (
        "labels",
        "seed",
        "steps",
        "batch",
        "learning_rate",
        "crop",
        "train_cases",
        "classes",
        "weights_sha256",
        "store_sha256",
        "backbone",
    )
    assert {name: pretrained[name] for name in shared} == {name: scratch[name] for name in shared}
    for line in (pretrained, scratch):
        assert [case["case"] for case in line["cases"]] == [case["case"] for case in scratch["cases"]]
        assert not {case["case"] for case in line["cases"]} & set(line["train_cases"])
        assert line["loss"]["last"] < 0.8 * line["loss"]["first"]
        # Chance: an eighth of the volume is ball.
        assert line["dice"]["mean"] > 0.4
        assert set(line["dice"]["classes"]) == {"2", "5"}
    assert pretrained["loss"]["first"] != scratch["loss"]["first"]

    lines = (weights.parent / "finetune" / "finetune.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [pretrained, scratch]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        BackboneConfig(architecture="swin_unetr", features=[12]),
        BackboneConfig(architecture="residual_unet_s"),
        BackboneConfig(architecture="resnet18_unet"),
    ],
    ids=lambda config: config.architecture,
)
def test_every_network_takes_pretrained_weights(
    config: BackboneConfig, make_weights: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    weights = make_weights(tmp_path / "weights.safetensors", config)
    line = run(weights, store, steps=2, batch=1, test_cases=1)
    assert all(side % config.stride == 0 for side in line["crop"])
    pretrained, _ = load_weights(weights)
    model, description = load_weights(line["model"])
    assert set(pretrained) < set(model)
    assert BackboneConfig.from_dict(description["backbone"]) == config
    name = next(iter(pretrained))
    assert (model[name] - pretrained[name]).abs().max() < 0.1  # two steps away, not drawn anew


def test_a_repetition_on_the_cpu_gives_the_same_numbers(weights: Path, store: Store, tmp_path: Path) -> None:
    first, second = (run(weights, store, steps=4, output=tmp_path / name) for name in ("a", "b"))
    assert first["loss"] == second["loss"]
    assert first["cases"] == second["cases"]
    assert Path(first["model"]).read_bytes() == Path(second["model"]).read_bytes()


def test_mixed_precision_learns_as_float32_does_and_saves_float32(weights: Path, store: Store, tmp_path: Path) -> None:
    exact, mixed = (run(weights, store, autocast=name, output=tmp_path / name) for name in ("none", "bfloat16"))
    assert (exact["autocast"], mixed["autocast"]) == ("none", "bfloat16")
    # Half a unit in the last place of eight bits, summed over layers: near, and not the same.
    assert mixed["loss"]["first"] == pytest.approx(exact["loss"]["first"], rel=0.02)
    assert mixed["loss"]["first"] != exact["loss"]["first"]
    assert mixed["dice"]["mean"] > 0.4
    assert {tensor.dtype for tensor in load_weights(mixed["model"])[0].values()} == {torch.float32}


def test_the_saved_model_predicts_what_was_scored(weights: Path, store: Store) -> None:
    line = run(weights, store, steps=6)
    assert line["model"].endswith("pretrained-labels3-seed0.safetensors")
    tensors, description = load_weights(line["model"])
    assert description["classes"] == [0, 2, 5]
    assert description["spacing_mm"] == [1.0, 1.0, 1.0]
    assert description["prepare"] == store.settings
    network = build_network(BackboneConfig.from_dict(description["backbone"]), classes=3)
    network.load_state_dict(tensors, strict=False)
    case = next(case for case in store.cases if case.id == line["cases"][0]["case"])
    item = read_case(store, case, (0, 2, 5))
    crop, background = tuple(description["crop"]), case.intensity["background"]
    prediction = predict_logits(network, item.image, crop, background, torch.device("cpu")).argmax(0, keepdim=True)
    both = ((prediction == 1) & (item.label == 1)).sum()
    dice = 2 * both / ((prediction == 1).sum() + (item.label == 1).sum())
    assert dice.item() == pytest.approx(line["cases"][0]["dice"]["2"], abs=1e-6)


def test_the_caller_s_random_state_is_left_alone(weights: Path, store: Store) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(weights, store, steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_crop_is_rounded_up_and_said(weights: Path, store: Store, capsys) -> None:
    line = run(weights, store, steps=1, crop=(10, 16, 20), progress=True)
    assert line["crop"] == [12, 16, 20]
    assert "rounded up to (12, 16, 20)" in " ".join(capsys.readouterr().err.split())


def test_a_model_of_other_settings_gets_a_name_of_its_own_and_the_screen_tells_it(
    weights: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (run(weights, store, steps=steps, progress=True) for steps in (1, 2))
    assert Path(first["model"]).name == "pretrained-labels3-seed0.safetensors"
    assert re.fullmatch(r"pretrained-labels3-seed0-[0-9a-f]{8}\.safetensors", Path(second["model"]).name)
    assert file_sha256(Path(first["model"])) == first["model_sha256"]
    ends = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrained, 3 labels, seed 0: ")]
    assert [line.rpartition(", ")[2] for line in ends] == [first["model"], second["model"]]


def test_test_images_that_pretraining_saw_are_told(
    weights: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, about = load_weights(weights)
    index = file_sha256(store.path / INDEX)
    for data, seen in (
        ({"index_sha256": index, "validation_fraction": 0.2}, 0),
        ({"index_sha256": index, "validation_fraction": 0.0}, 1),
        ({"index_sha256": "another", "validation_fraction": 0.0}, None),
        ({"index_sha256": index}, None),  # weights of before
    ):
        save_weights(weights, tensors, {**about, "data": data})
        line = run(weights, store, steps=1, progress=True)
        assert line["test_cases_pretrained_on"] == seen
        said = " ".join(capsys.readouterr().err.split())
        assert ("pretraining saw the images of 1 of the 1 test cases" in said) == bool(seen)
    assert run(weights, store, steps=1, from_scratch=True)["test_cases_pretrained_on"] is None


def test_a_test_that_memory_cannot_hold_is_refused_before_training(
    weights: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(UserError, match=r"3 classes of 0 million voxels take 0 GB of memory, 0 GB are free; use a"):
        run(weights, store)
    assert not list((weights.parent / "finetune").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("where", "advice"), [("train", "lower --batch or --crop"), ("evaluate", r"the model is in .*safetensors; use a")]
)
def test_memory_that_runs_out_is_told_with_what_to_change(
    where: str, advice: str, weights: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore")

    monkeypatch.setattr(module, where, run_out)
    with pytest.raises(UserError, match=rf"memory ran out \(CUDA out of memory.*GiB\.\); {advice}"):
        run(weights, store, steps=1)
    assert len(list((weights.parent / "finetune").glob("*.safetensors"))) == (where == "evaluate")
    assert not (weights.parent / "finetune" / "finetune.jsonl").exists()


def test_a_changed_volume_is_refused(weights: Path, store: Store) -> None:
    for file in (store.path / VOLUMES).iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match="changed since the index was written"):
        run(weights, store)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(features=[4, 8], dimensions=2), "holds a 2-D network, fine-tuning segments 3-D volumes"),
        (BackboneConfig(features=[4, 8], input_channels=2), "its network takes 2 channels"),
    ],
)
def test_weights_that_cannot_segment_the_store_are_refused(
    config: BackboneConfig, message: str, make_weights: Callable[..., Path], store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(make_weights(tmp_path / "other.safetensors", config), store)


def test_weights_of_another_width_than_they_say_are_refused_by_name(weights: Path, store: Store) -> None:
    tensors, description = load_weights(weights)
    backbone = {**description["backbone"], "features": [8, 16, 32]}
    save_weights(weights, tensors, {**description, "backbone": backbone})
    with pytest.raises(UserError, match=r"weights.safetensors: the weights do not fit .*of another shape: encoder"):
        run(weights, store)


def test_an_exported_encoder_is_refused_by_what_it_is(weights: Path, store: Store, tmp_path: Path) -> None:
    export(weights.parent, "encoder", tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"encoder.safetensors: holds 'encoder' of a network alone; give the run"):
        run(tmp_path / "encoder.safetensors", store)


def test_a_run_measures_distances_in_millimetres_unless_told_not_to(weights: Path, store: Store) -> None:
    with_surface = run(weights, store, steps=8, test_cases=2, mirror="w", flips=True, overlap=0.25)
    assert with_surface["mirror"] == [2]
    assert set(with_surface["hd95"]["classes"]) == {"2", "5"}
    for case in with_surface["cases"]:
        for value in ("2", "5"):
            found = case["hd95"][value], case["surface_distance"][value]
            assert (None in found) is (int(value) in case["missed"])
            assert None in found or 0 <= found[1] <= found[0]
    assert with_surface["missed"].keys() == with_surface["spurious"].keys() == {"2", "5"}
    without = run(weights, store, steps=1, test_cases=2, surface=False)
    assert "hd95" not in without
    assert "hd95" not in without["cases"][0]


def test_bad_settings_are_refused(weights: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected positive numbers"):
        run(weights, store, steps=0)
    with pytest.raises(UserError, match="--autocast float16: expected none or bfloat16"):
        run(weights, store, autocast="float16")
    with pytest.raises(UserError, match="device 'abacus': not usable here"):
        run(weights, store, device="abacus")
    with pytest.raises(UserError, match="is not a store"):
        finetune(weights, tmp_path, labels=1, seed=0, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(weights, store, steps=1, output=tmp_path / "file")
    assert not (weights.parent / "finetune").exists()
