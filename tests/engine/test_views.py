"""`voxtrast views`: what it draws and prints is what a run would train on."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from voxtrast.engine import views
from voxtrast.engine.config import load_config
from voxtrast.engine.data.matching import to_volume
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.reporting.view_sheet import Panel, draw_sheet, matches, middles
from voxtrast.engine.runs import build_method, open_cases

WORDS = ["views.crop=[24,24,24]", "seed=3", "train.global_batch=2"]


def settings(store: Path, *words: str) -> list[str]:
    return ["cover-tiny", f"data={store}", *WORDS, *words]


def test_a_sheet_is_drawn_and_the_plans_are_printed(
    tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "views.png"
    assert views.main([*settings(tiny_store), "--slots", "3", "--plans", "--output", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("seed")] == [
        "seed 3, split train, step 0, slot 0",
        "seed 3, split train, step 0, slot 1",
        "seed 3, split train, step 1, slot 0",
    ]
    assert said.count("view fixed: 24x24x24 voxels") == 3
    picture = image.imread(io.BytesIO(sheet.read_bytes()))
    assert picture.shape[0] > picture.shape[1]  # three slots of two planes, four panels


def test_the_samples_are_those_of_the_run(tiny_store: Path) -> None:
    config = load_config("cover-tiny", settings(tiny_store)[1:])
    spec = build_method(config).views
    plan, case, sample = views.samples(config, spec, 4, 2, "train")[1]
    store, cases, _, _ = open_cases(config)
    with ViewPipeline(store, cases, spec, seed=3, global_batch=2, start_step=4) as pipeline:
        (batch,) = next(pipeline)
        assert plan.to_bytes() == pipeline.planner.plan(4, 1).to_bytes()
    assert case == batch["case"][1]
    assert all((batch[name][1] == value).all() for name, value in sample.items())


def test_points_that_are_joined_are_the_same_place_in_both_planes(tiny_store: Path) -> None:
    config = load_config("cover-tiny", settings(tiny_store)[1:])
    spec = build_method(config).views
    for plan, _, sample in views.samples(config, spec, 0, 4, "train"):
        moving, fixed = (panel for panel in views.panels(spec, plan, sample) if panel.with_points)
        planes = middles([moving, fixed], 0)
        assert planes[0] == 12
        here, there = matches((moving, planes[0]), (fixed, planes[1]), 0)
        assert 0 < len(here) <= 5
        np.testing.assert_allclose(to_volume(moving.view, here), to_volume(fixed.view, there), atol=1e-9)
        assert (here[:, 0] == 12).all()
        assert (np.abs(there[:, 0] - planes[1]) < 0.6).all()
        distances = np.linalg.norm(here[:, None] - here[None], axis=2) + np.eye(len(here)) * 99
        assert distances.min() > 1


def test_views_of_different_sizes_and_slices_fit_on_a_sheet(tiny_store: Path) -> None:
    words = settings(tiny_store, "backbone.dimensions=2", "views.crop=[24,24]", "method.max_unreachable=1")
    config = load_config("cover-tiny", words[1:])
    spec = build_method(config).views
    plan, case, sample = views.samples(config, spec, 0, 1, "validation")[0]
    panels: list[Panel] = views.panels(spec, plan, sample)
    assert [panel.image.shape for panel in panels] == [(24, 24)] * 4
    assert draw_sheet([(case, panels), (case, panels[:2])])[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cover-tiny"], "data: not given"),
        (["cover-none", "data=STORE"], "cover-none"),
        (["cover-tiny", "data=STORE", "--slots", "0"], "--slots 0: expected"),
        (["cover-tiny", "data=STORE", "validation.fraction=0", "--split", "validation"], "no case is held aside"),
        (["cover-tiny", "data=STORE", "views.appearance.order=[spots]"], "spots"),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: list[str], said: str, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.main([word.replace("STORE", str(tiny_store)) for word in words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]
