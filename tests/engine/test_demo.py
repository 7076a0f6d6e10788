"""The demo: its cases, and the whole of it in a size that takes seconds."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from voxtrast.engine import demo
from voxtrast.engine.data import demo as cases_module
from voxtrast.engine.data.demo import GREY_MATTER, WHITE_MATTER, make_cases
from voxtrast.engine.demo import DemoSettings, run_demo
from voxtrast.engine.errors import UserError
from voxtrast.engine.runs import load_run

SMALL = DemoSettings(
    cases=3,
    held_aside=1,
    spacing_mm=6.0,
    pretrain_steps=2,
    labels=1,
    finetune_seeds=1,
    finetune_steps=2,
    finetune_crop=(16, 16, 16),
    pretrain_words=(
        "views.crop=[16,24,16]",
        "backbone.features=[8,16]",
        "method.units=[1,1]",
        "validation.batches=1",
        "method.max_unreachable=1.0",
        "train.threads=1",
        "schedule.warmup_steps=0",
    ),
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "raw"
    assert make_cases(folder, cases=6, workers=2)
    return folder


def read(raw: Path, index: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Header image, and image and label turned to RAS."""
    image, label = (nibabel.load(raw / kind / f"brain_{index:02d}.nii.gz") for kind in ("images", "labels"))
    assert np.array_equal(image.affine, label.affine)
    turned = [np.asarray(nibabel.as_closest_canonical(each).dataobj) for each in (image, label)]
    return image, turned[0].astype(np.float32), turned[1]


def test_cases_depend_on_the_seed_alone(raw: Path, tmp_path: Path) -> None:
    make_cases(tmp_path / "again", cases=2, workers=1)
    make_cases(tmp_path / "other", cases=1, seed=1)
    for index in range(2):
        for kind in ("images", "labels"):
            name = f"{kind}/brain_{index:02d}.nii.gz"
            assert (tmp_path / "again" / name).read_bytes() == (raw / name).read_bytes()
    name = "images/brain_00.nii.gz"
    assert (tmp_path / "other" / name).read_bytes() != (raw / name).read_bytes()


def test_cases_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the demo's cases touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert make_cases(tmp_path / "raw", cases=1)


def test_tissues_have_the_order_of_a_t1_image(raw: Path) -> None:
    for index in range(6):
        _, image, label = read(raw, index)
        white, grey = image[label == WHITE_MATTER].mean(), image[label == GREY_MATTER].mean()
        rest = image[label == 0]
        fluid = rest[rest > 0.1 * white].mean()  # inside the head, neither grey nor white
        assert white > 1.1 * grey, index
        assert grey > 1.2 * fluid, index
        assert rest.mean() < 0.2 * grey, index
        assert 0.02 < (label == WHITE_MATTER).mean() < (label == GREY_MATTER).mean() < 0.5


def test_headers_differ_and_the_anatomy_agrees(raw: Path) -> None:
    images = [read(raw, index)[0] for index in range(6)]
    assert len({nibabel.aff2axcodes(image.affine) for image in images}) >= 3
    assert len({tuple(np.round(image.header.get_zooms(), 3)) for image in images}) >= 3
    centres = []
    for index in range(6):
        image, _, label = read(raw, index)
        affine = nibabel.as_closest_canonical(image).affine
        voxels = np.argwhere(label > 0).mean(axis=0)
        centres.append(affine[:3, :3] @ voxels + affine[:3, 3])
    assert np.abs(np.array(centres) - np.mean(centres, axis=0)).max() < 6.0, "brains lie apart by millimetres at most"


def test_subjects_differ_by_millimetres(raw: Path) -> None:
    described = json.loads((raw / "cases.json").read_text(encoding="utf-8"))["cases"]
    assert all(4.0 < line["deformation_mm"] < 9.0 for line in described)
    assert len({line["deformation_mm"] for line in described}) == len(described)


def test_a_second_call_makes_nothing_and_another_folder_is_refused(raw: Path, tmp_path: Path) -> None:
    before = (raw / "images" / "brain_00.nii.gz").stat().st_mtime_ns
    assert not make_cases(raw, cases=6)
    assert (raw / "images" / "brain_00.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="does not hold 7 demo cases of seed 0"):
        make_cases(raw, cases=7)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="--fresh"):
        make_cases(tmp_path / "mine", cases=1)


def test_a_call_that_stops_leaves_no_raw_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    original = cases_module._write_case

    def stop(template: Any, folder: Path, index: int, seed: int) -> dict[str, Any]:
        if written:
            raise OSError("no space left")
        written.append(index)
        return original(template, folder, index, seed)

    monkeypatch.setattr(cases_module, "_write_case", stop)
    with pytest.raises(OSError, match="no space left"):
        make_cases(tmp_path / "raw", cases=2, workers=1)
    assert not (tmp_path / "raw").exists()
    monkeypatch.undo()
    assert make_cases(tmp_path / "raw", cases=1)


def test_the_whole_demo_and_a_second_call_that_does_nothing_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "demo"
    report = run_demo(output, settings=SMALL)
    first = capfd.readouterr().out
    assert report == output / "report.html"
    text = report.read_text(encoding="utf-8")
    assert "a demonstration, not a result" in text
    for number, name in enumerate(("cases", "prepare", "pretrain", "fine-tune", "export", "report"), start=1):
        assert f"[{number}/6] {name}: " in first
    assert (output / "export" / "nnunet.pth").is_file()
    assert (output / "export" / "network.safetensors").is_file()
    results = output / "pretrain" / "finetune" / "finetune.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [line["arm"] for line in lines] == ["pretrained", "scratch"]
    assert all(f"{line['dice']['mean']:.3f}" in text for line in lines)
    unseen = {case.id for case in load_run(output / "pretrain").validation_cases}
    assert all({case["case"] for case in line["cases"]} == unseen for line in lines), "tested on what training saw"

    made = [output / "pretrain" / "weights.safetensors", output / "store" / "index.jsonl", results]
    before = [(path.stat().st_mtime_ns if path != made[1] else 0, path.read_bytes()) for path in made]
    monkeypatch.setattr(demo, "write_report", lambda runs, report, story, force: report)  # drawn once is enough
    run_demo(output, settings=SMALL)
    assert [(path.stat().st_mtime_ns if path != made[1] else 0, path.read_bytes()) for path in made] == before
    assert capfd.readouterr().out.count("done before") == 4

    with pytest.raises(UserError, match=r"other settings \(labels\).*--fresh"):
        run_demo(output, settings=replace(SMALL, labels=2))


def test_a_file_is_refused_and_a_link_to_another_disk_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo._Demo, "run", lambda self: self.output)
    (tmp_path / "report.html").write_text("a page")
    with pytest.raises(UserError, match=r"report\.html: is a file; name a folder"):
        run_demo(tmp_path / "report.html")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    run_demo(tmp_path / "link")
    (tmp_path / "disk" / "old").touch()
    run_demo(tmp_path / "link", fresh=True)
    assert [file.name for file in (tmp_path / "disk").iterdir()] == [demo.STATE]


def test_a_folder_of_somebody_else_is_neither_used_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match="no demo made"):
            run_demo(tmp_path, fresh=fresh)
    assert (tmp_path / "thesis.txt").is_file()


def test_a_failed_pretraining_ends_the_demo_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="ended with code 1"):
        demo._run_module("voxtrast.no_such_module", [])
