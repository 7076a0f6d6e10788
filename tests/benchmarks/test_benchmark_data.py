"""That the benchmark of the data plane has every row do the recipe, and says what it measured."""

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from voxtrast.benchmarks.data import __main__ as command
from voxtrast.benchmarks.data import geometry
from voxtrast.benchmarks.data.checks import check_views
from voxtrast.benchmarks.data.geometry import Geometry, bytes_of_view, examine, pinned_differences
from voxtrast.benchmarks.data.host import Host, Turn
from voxtrast.benchmarks.data.plot import draw, newest
from voxtrast.benchmarks.data.recipe import draw_slot
from voxtrast.benchmarks.data.report import lines_of, table
from voxtrast.benchmarks.data.rows import OURS, ROWS, Setting, core_seconds_by_part
from voxtrast.benchmarks.data.volumes import ColdFiles, load_volumes, make_store, side_of
from voxtrast.benchmarks.machine import Rates
from voxtrast.benchmarks.place import Cannot
from voxtrast.engine.data.store import Store

SIZE = 24


@pytest.fixture(scope="module")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "store"
    make_store(path, side_of(SIZE), "float32")
    return path


@pytest.mark.parametrize(
    ("module", "needs", "options"),
    [
        ("by_grid_sample", "torch", {}),
        ("by_grid_sample", "torch", {"lean": True}),
        ("by_monai", "monai", {}),
        ("by_monai", "monai", {"elastic": False}),
        ("by_batchgenerators", "batchgeneratorsv2", {}),
        ("by_torchio", "torchio", {}),
    ],
)
def test_a_rival_makes_two_views_of_a_slot(module: str, needs: str, options: dict[str, Any], made_store: Path) -> None:
    pytest.importorskip(needs, reason=f"{needs} is a peer, not a dependency")
    volumes = load_volumes(made_store, SIZE)
    make = importlib.import_module(f"voxtrast.benchmarks.data.{module}").SlotMaker(volumes, SIZE, **options)
    generator = np.random.default_rng(0)
    for _ in range(2):
        views = make(generator)
        assert check_views(views, SIZE, field=False) == 2
        spread = torch.cat(list(views.values())).std()
        assert 0.3 < spread < 3  # that of the volumes is 1: contrast, brightness and noise are of their range


def test_the_operator_alone_makes_the_views_of_the_pipeline(made_store: Path) -> None:
    ours = importlib.import_module("voxtrast.benchmarks.data.ours")
    options: dict[str, Any] = {"slots": 2, "threads": 1, "device_id": None}
    alone = next(ours.OperatorAlone(made_store, SIZE, **options))
    batch = next(ours.Reading(made_store, SIZE, **options, cold=False))
    assert check_views(batch, SIZE, field=True) == 4
    for name in ("moving", "fixed", "displacement", "mask"):
        assert torch.equal(alone[name], batch[name])


def test_the_chain_of_dali_operators_makes_views_and_the_field_of_their_affine(made_store: Path) -> None:
    by_dali = importlib.import_module("voxtrast.benchmarks.data.by_dali")
    volumes = load_volumes(made_store, SIZE)
    chain = by_dali.Chain(volumes, SIZE, slots=2, threads=1, device_id=None, field=True)
    generator = np.random.default_rng(0)  # as the chain's own
    number = generator.integers(len(volumes), size=2)[0]
    origin, (_, draw) = draw_slot(generator, volumes[number], SIZE)
    batch = next(chain)
    assert check_views(batch, SIZE, field=True) == 4
    index = np.stack(np.meshgrid(*[np.arange(SIZE)] * 3, indexing="ij"))
    place = np.einsum("ij,jdhw->idhw", draw.to_volume[:, :3], index)
    place += (draw.to_volume[:, 3] - origin)[:, None, None, None]
    assert np.abs(batch["displacement"][0].numpy() - (place - index)).max() < 1e-4
    inside = ((place >= 0) & (place <= SIZE - 1)).all(axis=0)
    assert (batch["mask"][0, 0].numpy() != inside).mean() < 1e-3  # what lies on the border


def test_both_ways_to_make_the_grid_are_one_deformation(made_store: Path) -> None:
    from voxtrast.benchmarks.data.by_grid_sample import sample

    (volume, *_) = load_volumes(made_store, SIZE)
    _, draws = draw_slot(np.random.default_rng(0), volume, SIZE)
    source = torch.from_numpy(volume.voxels)[None, None]
    usual, lean = (sample(source, draws, SIZE, lean=lean) for lean in (False, True))
    assert (usual - lean).abs().max() < 1e-4
    assert (usual - sample(source, draws, SIZE, elastic=False)).abs().max() > 0.1


def test_with_one_affine_the_rivals_views_are_ours_voxel_for_voxel(made_store: Path) -> None:
    known = examine(made_store, SIZE)
    assert list(known.differences) == ["grid_sample", "grid_sample, lean grid", "DALI operators"]
    for name in ROWS:
        assert known.refuses(name) is None
    assert all(explained < 5e-4 for _, explained in known.differences.values())


def test_a_rival_whose_view_is_a_fiftieth_of_a_voxel_off_is_refused(
    made_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_draw = geometry._as_draw
    monkeypatch.setattr(geometry, "_as_draw", lambda matrix: as_draw(matrix + 0.02 * np.eye(1, 4, 3)))
    known = Geometry(pinned_differences(made_store, SIZE), "", {})
    assert "rounding explains" in str(known.refuses("DALI operators, field"))
    assert "rounding explains" in str(known.refuses("grid_sample, lean grid"))
    assert known.refuses("MONAI") is None


def test_views_without_a_voxel_inside_are_not_compared(made_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_inside", lambda *_: torch.zeros(SIZE, SIZE, SIZE, dtype=torch.bool))
    known = examine(made_store, SIZE)
    assert "lie outside of it" in known.not_compared
    assert known.refuses("grid_sample") is None


def test_the_bytes_of_a_view_are_its_own_its_share_of_the_region_and_of_the_field(made_store: Path) -> None:
    moved = bytes_of_view(made_store, SIZE)
    assert moved[True] - moved[False] == 2 * 4 * SIZE**3
    side = side_of(SIZE)
    assert 4 * SIZE**3 * (1 + 0.5) < moved[False] < 4 * SIZE**3 + 4 * (side + 2) ** 3 / 2


def good_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(2, 1, 4, 4, 4, generator=generator) for name in ("moving", "fixed")}
    return batch | {"displacement": torch.randn(2, 3, 4, 4, 4), "mask": torch.eye(4).expand(2, 1, 4, 4, 4)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: batch["fixed"][1].fill_(1.0), "constant"),
        (lambda batch: batch["moving"][0, 0, 0, 0, 0].fill_(float("nan")), "not finite"),
        (lambda batch: batch["moving"][0, 0, 0, 0, 0].fill_(float("inf")), "not finite"),
        (lambda batch: batch["fixed"].copy_(batch["moving"]), "are one"),
        (lambda batch: batch.update(fixed=batch["fixed"][..., :3]), "expected float32 views of 4"),
        (lambda batch: batch.update(fixed=batch["fixed"].double()), "expected float32 views of 4"),
        (lambda batch: batch.update(mask=torch.ones(2, 1, 4, 4, 4)), "mask is of one value"),
        (lambda batch: batch.update(displacement=batch["displacement"][:, :2]), "not of the views' size"),
    ],
)
def test_what_is_no_view_is_refused(change: Any, said: str) -> None:
    batch = good_batch()
    assert check_views(batch, 4, field=True) == 4
    change(batch)
    with pytest.raises(ValueError, match=said):
        check_views(batch, 4, field=True)


def test_cold_files_are_not_promised_where_a_store_lies_in_memory(made_store: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or "tmpfs /dev/shm" not in Path("/proc/mounts").read_text(encoding="utf-8"):
        pytest.skip("no file system in memory at /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        shutil.copytree(made_store, Path(folder) / "store")
        with pytest.raises(Cannot, match="memory"):
            ColdFiles(Store(Path(folder) / "store"))


def turn(views: int, seconds: float, cpu: float, memory: float | None = None) -> Turn:
    return Turn(views, seconds, cpu, memory)


RATES = Rates(1e12, 1e9, 1e10)
KNOWN = Geometry({"grid_sample": (1e-6, 1e-5)}, "", {False: 1e6, True: 2e6})


def example_lines() -> list[dict[str, Any]]:
    setting = Setting(Path("store"), 96, 2, "cpu")
    turns = {
        OURS: [turn(1, 1, 1, 50.0), turn(100, 1, 1), turn(300, 1, 6), turn(200, 1, 2)],
        "grid_sample": [turn(1, 1, 1, 70.0), turn(20, 1, 2), turn(25, 1, 2), turn(20, 1, 2)],
    }
    return lines_of(setting, turns, {"TorchIO": "torchio is not installed"}, KNOWN, RATES)


def test_lines_hold_medians_without_the_first_turn_and_ratios_to_ours() -> None:
    ours, rival, missing = example_lines()
    assert (ours["views_per_s"], ours["spread_per_s"], ours["peak_memory_mb"], ours["rounds"]) == (200, 200, 50.0, 3)
    assert ours["cpu_s_per_view"] == 0.01
    assert ours["share_of_limit"] == pytest.approx(200 * 2e6 / 1e10)
    assert (rival["provider"], rival["ratio_to_ours"], rival["core_ratio_to_ours"]) == ("grid_sample", 10, 10)
    assert rival["share_of_limit"] == pytest.approx(20 * 1e6 / 1e10)
    assert (rival["lacks"], rival["mode"], ours["mode"]) == (["no field"], "from memory", "with reading")
    assert missing["cannot"] == "torchio is not installed"
    text = table([ours, rival, missing], KNOWN, RATES)
    assert "cannot: torchio is not installed" in text
    assert text.splitlines()[2].endswith("lacks")


def test_the_newest_line_of_each_row_and_size_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    about = {"device": "here", "commit": "0123abc"}
    old, new = ({**about, "date": f"2026-0{month}-01"} for month in (1, 2))
    lines = [{**old, **line, "views_per_s": 1.0} for line in example_lines()[:2]]
    lines += [{**new, **line} for line in example_lines()]
    lines += [{**lines[0], "shape": {"crop": 64}}, {**lines[0], "device": "elsewhere"}, {**lines[0], "workers": 16}]
    found = [(line["provider"], line["shape"]["crop"], line["views_per_s"]) for line in newest(lines)]
    assert found == [("ours", 64, 1.0), ("ours", 96, 200), ("grid_sample", 96, 20)]
    draw(lines, tmp_path / "pictures" / "views.png")
    assert (tmp_path / "pictures" / "views.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="run `voxtrast bench data`"):
        newest([{**lines[0], "op": "info_nce"}])


def test_a_row_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    with pytest.raises(Cannot, match="is not a store"):
        Host("grid_sample", Setting(tmp_path, SIZE, 1, "cpu"))


def test_the_core_time_of_the_parts_makes_up_the_whole(made_store: Path) -> None:
    parts = core_seconds_by_part(Setting(made_store, SIZE, 1, "cpu"))
    assert list(parts)[:2] == ["plan", "open the file"]
    rest = parts.pop("the rest")
    assert all(seconds > 0 for seconds in parts.values())
    assert parts["second view, field, mask"] > parts["plan"]
    assert rest + sum(parts.values()) > max(parts.values())


def run_command(*words: str) -> tuple[list[dict[str, Any]], str]:
    """By the command itself: what runs as __main__ is another module in the processes that it starts."""
    words = ("--device", "cpu", "--workers", "1", *words)
    done = subprocess.run(
        [sys.executable, "-m", "voxtrast.benchmarks.data", *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in Path(words[-1]).read_text(encoding="utf-8").splitlines()], done.stdout


def test_turns_of_a_row_are_measured_and_written(tmp_path: Path, made_store: Path) -> None:
    words = ["--crop", str(SIZE), "--store", str(made_store), "--rows", "grid_sample", "--rounds", "2"]
    (line,), said = run_command(*words, "--seconds", "0.05", "--output", str(tmp_path / "here.jsonl"))
    assert (line["provider"], line["op"], line["rounds"], line["shape"]) == ("grid_sample", "views", 2, {"crop": SIZE})
    assert line["views_per_s"] > 0
    # The core of the worker, and something for who hands over.
    assert 0.2 < line["cpu_s_per_view"] * line["views_per_s"] < 2.5
    assert line["peak_memory_mb"] is None or line["peak_memory_mb"] > 0
    assert {"voxtrast", "torch", "nvidia-dali-cuda130"} <= set(line["versions"])
    assert "one affine without deformation" in said
    assert f"views of {SIZE}^3, float32, 1 workers" in said


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path) -> None:
    words = ["--crop", "32", "--rounds", "1", "--seconds", "0.2", "--output", str(tmp_path / "here.jsonl")]
    lines, said = run_command(*words)
    assert lines.pop()["op"] == "views: profile"
    assert "where the time goes, 32^3" in said
    assert [line["provider"] for line in lines] == list(ROWS)
    for line in lines:
        if "cannot" in line:  # what may be missing, or impossible where the store lies
            assert line["provider"] in ("TorchIO", "ours, cold files")
        else:
            assert line["views_per_s"] > 0
            assert line["ratio_to_ours"] > 0


def test_an_epoch_of_a_recipe_and_the_wait_of_its_steps(tiny_store: Path, tmp_path: Path) -> None:
    words = ["--recipe", "cover-tiny", f"data={tiny_store}", "views.crop=[16,16,16]", "backbone.features=[8,16,16]"]
    words += ["method.units=[2,1,1]", "method.max_unreachable=1", "train.global_batch=2", "validation.fraction=0"]
    assert command.main([*words, "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "here.jsonl")]) == 0
    (line,) = (json.loads(line) for line in (tmp_path / "here.jsonl").read_text(encoding="utf-8").splitlines())
    assert (line["op"], line["provider"], line["cases"], line["steps"]) == ("views of cover-tiny", "ours", 6, 3)
    assert line["views_per_s"] == pytest.approx(2 * 2 / line["step_s"])
    assert 0 <= line["share_of_waiting"] < 1
    assert line["training_step_s"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--seconds", "0"], "--seconds: expected more than 0, got 0"),
        (["--crop", "96", "8"], "--crop: expected sizes of at least 16 voxels, got 96 8"),
        (["data=x"], "data=x: settings go with --recipe NAME"),
        (["--rows", "nobody"], "invalid choice: 'nobody'"),
    ],
)
def test_words_that_make_no_sense_end_it(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--store", "nowhere"], "error: nowhere is not a store"),
        (["--recipe", "cover-tiny"], "error: data: not given; say data=STORE"),
        (["--recipe", "cover-tinny", "data=x"], "error: recipe"),
        (["--recipe", "cover-tiny", "data=x", "--steps", "0"], "error: --steps: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_a_store_of_small_volumes_is_said(made_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--store", str(made_store), "--crop", "256", "--device", "cpu"]) == 2
    assert "crop 256x256x256: none of 4 volumes" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert "--device cuda: torch" in capsys.readouterr().err
