"""The parts of a report: volumes to leaf through, curves that follow the page, and what is said of what is missing."""

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from PIL import Image
from report_reader import read_page
from test_report import make_run, without_store

from voxtrast.engine import report, reporting
from voxtrast.engine.reporting import curves, page, volumes
from voxtrast.engine.reporting.evidence import read_log
from voxtrast.engine.reporting.planes import frame_of
from voxtrast.engine.reporting.slices import MOST_SLICES, Tile, leaf_through

RAS = ((0.0, 0.0, 2.0, 0.0), (0.0, 3.0, 0.0, 0.0), (4.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def strips_of(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_a_strip_holds_the_slices_with_the_top_of_the_body_above() -> None:
    volume = np.zeros((4, 16, 24), np.float32)
    volume[2, 8:, :12] = 1.0  # of one axial slice the quarter that is anterior and left
    html = leaf_through("case", frame_of(RAS, (4.0, 3.0, 2.0)), [Tile("image", volume, (0.0, 1.0))])
    axial, coronal, sagittal = strips_of(html)
    assert axial.shape == (4 * 16, 24)
    assert coronal.shape == (16 * 4, 24)
    assert sagittal.shape == (24 * 4, 16)
    third = axial[2 * 16 : 3 * 16]
    assert third[:8, :12].mean() > 240
    assert third[8:].mean() < 15
    assert third[:8, 12:].mean() < 15
    shown = coronal[4 * 12 : 4 * 13]  # H = 12: D = 2 is the second row from above
    assert shown[1, :12].mean() > 200
    assert 'aspect-ratio:48/48"' in html  # 24 voxels of 2 mm by 16 of 3 mm
    assert "slice 3" in html  # the axial slice in which it is bright


def test_the_planes_of_a_volume_are_on_one_scale() -> None:
    narrow = np.ones((20, 10, 8), np.float32)
    html = leaf_through("case", frame_of(RAS, (4.0, 4.0, 2.0)), [Tile("image", narrow, (0.0, 1.0))])
    # axial and coronal planes: 16 mm wide, sagittal ones 40 mm, of the longest side's 80 mm
    assert re.findall(r"--width:([0-9.]+)", html) == ["0.2", "0.2", "0.5"]


def test_of_a_large_volume_some_slices_are_left_out() -> None:
    volume = np.zeros((100, 8, 8), np.float32)
    html = leaf_through("case", frame_of(RAS, (1.0, 1.0, 1.0)), [Tile("image", volume, (0.0, 1.0))], centre=(50, 4, 4))
    places = [int(place) for place in re.findall(r'data-places="([^"]+)"', html)[0].split(" ")]
    assert len(places) == MOST_SLICES
    assert (places[0], places[-1]) == (1, 100)
    assert strips_of(html)[0].shape == (MOST_SLICES * 8, 8)


def test_features_that_are_noise_are_drawn_as_well() -> None:
    noise = np.random.default_rng(0).random((96, 96, 96, 3), np.float32)  # nothing that JPEG could leave out
    html = leaf_through("case", frame_of(RAS, (1.0, 1.0, 1.0)), [Tile("features", noise)], centre=(48, 48, 48))
    assert [strip.shape for strip in strips_of(html)] == [(MOST_SLICES * 96, 96, 3)] * 3


def test_a_slice_of_two_dimensions_has_no_slider() -> None:
    colours = np.ones((8, 6, 3), np.float32) * np.array([1.0, 0.0, 0.0], np.float32)
    html = leaf_through("case", frame_of(RAS, (4.0, 3.0, 2.0), dimensions=2), [Tile("colours", colours)])
    [strip] = strips_of(html)
    assert strip.shape == (8, 6, 3)
    assert strip[..., 0].min() > 240
    assert strip[..., 1:].max() < 15
    assert "<input" not in html


def test_curves_follow_the_colours_of_the_page() -> None:
    lines = [{"step": step, "loss": 1.0 / step} for step in range(1, 2001)]
    picture = curves.draw_number("loss", lines, [{"step": 2000, "loss": 0.1}])
    assert picture is not None
    text = picture.data.decode()
    for name, (light, dark) in curves.INK.items():
        assert f"--{name}:{light}" in text
        assert f"--{name}:{dark}" in text
        assert light not in text[text.index("</style>") :]  # what is drawn names the colour
    assert "var(--text)" in text
    assert len(text) < 60_000  # 2000 steps are drawn as 400
    again = curves.draw_number("loss", lines, [{"step": 2000, "loss": 0.1}])
    assert again == picture


@pytest.mark.parametrize("values", [[], [None, None], [0.0], [None, 3.0], [-2.0, 1.0], [1e-9, 1e9]])
def test_curves_of_few_or_odd_numbers_are_drawn(values: list[float | None]) -> None:
    lines = [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]
    picture = curves.draw_number("loss", lines, [])
    assert (picture is None) == (not any(value is not None for value in values))


def test_a_log_that_was_cut_off_anywhere_is_read(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "\xff'
    for end in range(len(text)):
        (tmp_path / "log.jsonl").write_bytes(text[:end].encode("latin-1"))
        training, validation = read_log(tmp_path)
        assert [line["step"] for line in training] == [1] * (end >= 24)
        assert validation == []


def test_what_is_damaged_is_said_in_its_place(tiny_store: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_store)
    for file in (*(run / "checkpoints").glob("*.pt"), run / "weights.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    (run / "finetune").mkdir()
    (run / "finetune" / "finetune.jsonl").write_text('{"arm": "pretr')
    said: list[str] = []
    reader = read_page(report.write_report([run], tmp_path / "page.html", say=said.append))
    assert "no checkpoint is whole" in reader.text
    assert "finetune.jsonl, line 1: not a run" in reader.text
    assert "weights.safetensors: " in reader.text
    assert "3 of 3" in reader.text
    assert len(said) == 2
    (run / "weights.safetensors").unlink()
    assert "weights.safetensors is not there yet" in read_page(report.write_report([run], tmp_path / "page.html")).text


def test_a_part_that_fails_in_an_unforeseen_way_leaves_the_others(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_store, trained=False)

    def fails(*arguments: object) -> list[str]:
        raise RuntimeError("it broke")

    monkeypatch.setattr(report.facts, "speed", fails)
    reader = read_page(report.write_report([run], tmp_path / "page.html"))
    assert "Left out: RuntimeError: it broke." in reader.text
    assert "Configuration" in reader.titles


def test_without_matplotlib_words_and_numbers_are_left(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = without_store(make_run(tmp_path / "run", tiny_store))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "PIL")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("curves", "volumes", "pretraining", "view_sheet"):
        monkeypatch.delitem(sys.modules, f"voxtrast.engine.reporting.{name}", raising=False)
        monkeypatch.delattr(reporting, name, raising=False)
    reader = read_page(report.write_report([run], tmp_path / "page.html"))
    assert "matplotlib is not installed" in reader.text
    assert "pip install 'voxtrast[report]'" in reader.text
    assert not reader.tags("img")
    for words in ("3 of 3", "in cover-tiny", "4.00 samples/s"):
        assert words in reader.text


def test_no_two_sections_have_one_name() -> None:
    text = page.render("title", "", [page.Section("A b", []), page.Section("a-b", []), page.Section("Ä", [])])
    assert re.findall(r'<h2 id="([^"]+)"', text) == ["a-b", "a-b-2", "section"]


def test_every_class_has_the_colour_that_the_legend_says(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[np.ndarray, dict[str, Any]]] = []
    real = volumes.show

    def show(axes: Any, values: np.ndarray, *places: Any, **options: Any) -> None:
        shown.append((values, options))
        real(axes, values, *places, **options)

    monkeypatch.setattr(volumes, "show", show)
    values = np.array([0, 1, 8, 9, 14, 200], np.int16)
    label = np.broadcast_to(values, (6, 6, 6))
    image, frame = label.astype(np.float32), frame_of(RAS, (4.0, 3.0, 2.0))
    volumes.draw_segmentations("case", frame, image, label, {"arm": label}, {})
    painted = [each for each in shown if isinstance(each[1].get("cmap"), ListedColormap)]
    assert len(painted) == 4  # truth and prediction, in two planes
    palette = volumes.LABEL_COLOURS
    wanted = {(0, 0, 0, 0)} | {to_rgba(palette[(value - 1) % len(palette)]) for value in values[1:]}
    for cut, options in painted:
        colours = options["cmap"](Normalize(options["vmin"], options["vmax"])(cut))
        assert {tuple(each) for each in colours.reshape(-1, 4)} == wanted
