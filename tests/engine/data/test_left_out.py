"""Volumes that cannot be read: what a run does without them, and that nothing else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from view_samples import COVER, assert_same, make_store, take

from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import ViewSpec

SHAPES = [(20, 22, 24), (24, 20, 22), (22, 24, 20), (20, 20, 24), (24, 24, 24)]
SPEC = ViewSpec((16, 16, 16), COVER)
STEPS = 5  # four slots each: every case comes four times


def damage(store: Store, case: int, how: str) -> None:
    file = store.path / "volumes" / f"case{case}.npy"
    if how == "gone":
        file.unlink()
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-2])
    elif how == "not an array":
        file.write_bytes(b"what is this")
    else:  # inside, where opening does not look
        volume = np.load(file)
        volume[:] = np.nan if how == "NaN" else np.inf
        np.save(file, volume)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", SHAPES)


def samples(steps: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{k: item[slot] for k, item in batch.items()} for (batch,) in steps for slot in range(4)]


@pytest.mark.parametrize("how", ["gone", "cut off", "not an array", "NaN", "infinity"])
def test_another_volume_takes_its_place_and_all_other_views_stay(
    how: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = samples(take(store, SPEC, STEPS))
    damage(store, 1, how)
    after = samples(take(store, SPEC, STEPS))
    replaced = [index for index, sample in enumerate(before) if sample["case"] == "case1"]
    assert len(replaced) == 4
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if index in replaced:
            assert new["case"] != "case1"
            assert torch.isfinite(new["moving"]).all()
        else:
            assert_same(old, new)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "said once"
    assert lines[0].startswith("left out from here on: case1: ")
    assert str(store.path / "volumes" / "case1.npy") in lines[0]


def test_the_views_depend_on_what_can_be_read_alone(store: Store) -> None:
    for case, how in ((0, "NaN"), (3, "gone"), (4, "NaN")):
        damage(store, case, how)
    expected = take(store, SPEC, STEPS)
    known = {f"case{case}": "damaged" for case in (0, 3, 4)}
    for settings in ({"threads": 4}, {"prefetch": 0}, {"unreadable": known}):
        for first, second in zip(expected, take(store, SPEC, STEPS, **settings), strict=True):
            assert_same(first[0], second[0])
    (later,) = take(store, SPEC, 1, start_step=3)
    assert_same(expected[3][0], later[0])
    for rank in range(2):
        for whole, part in zip(expected, take(store, SPEC, STEPS, rank=rank, world_size=2), strict=True):
            assert_same({k: v[2 * rank : 2 * rank + 2] for k, v in whole[0].items()}, part[0])


def test_which_volumes_were_left_out_can_be_asked(store: Store) -> None:
    damage(store, 2, "NaN")
    with ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=5, unreadable={"case0": "known"}) as pipeline:
        next(pipeline)
        assert pipeline.unreadable.keys() == {"case0", "case2"}
        assert "NaN" in pipeline.unreadable["case2"]


@pytest.mark.parametrize(("how", "said"), [("gone", "missing"), ("NaN", r"case3\.npy holds NaN")])
def test_told_to_raise_the_run_ends_at_that_volume(how: str, said: str, store: Store) -> None:
    damage(store, 3, how)
    with ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=5, on_error="raise") as pipeline:
        with pytest.raises(UserError, match=said):
            next(pipeline)
        with pytest.raises(UserError, match="closed"):  # not the step after the missing one
            next(pipeline)


@pytest.mark.parametrize("how", ["gone", "NaN"])
def test_without_any_volume_left_the_run_ends(how: str, store: Store) -> None:
    for case in range(len(SHAPES)):
        damage(store, case, how)
    with (
        ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=2) as pipeline,
        pytest.raises(UserError, match=r"none of the 5 volumes.*prepare --check"),
    ):
        next(pipeline)


def test_an_unknown_policy_is_refused(store: Store) -> None:
    with pytest.raises(UserError, match="on_error 'ignore': expected 'substitute' or 'raise'"):
        ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=2, on_error="ignore")
