"""Volumes that cannot be read: what a run does without them, and that nothing else changes."""

import errno
import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from view_samples import COVER, assert_same, make_store, take

from voxtrast.engine.data import pipeline as view_pipeline
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Case, Store, StoreReadError
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
        volume[-1 if "last plane" in how else slice(None)] = np.inf if how == "infinity" else np.nan
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
    assert lines[0].startswith(("left out: case1: ", "left out where it is damaged: case1: "))
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


def test_damage_in_one_place_costs_the_samples_that_look_there_and_no_others(store: Store) -> None:
    before = samples(take(store, SPEC, 8))
    damage(store, 1, "NaN in the last plane")
    after = take(store, SPEC, 8)
    looks_there = {
        index for index, sample in enumerate(before) if sample["case"] == "case1" and sample["origin"][0] == 24 - 16
    }
    replaced = {
        i for i, (old, new) in enumerate(zip(before, samples(after), strict=True)) if old["case"] != new["case"]
    }
    assert looks_there <= replaced
    assert len(replaced) < sum(sample["case"] == "case1" for sample in before)
    for start in (2, 5):
        for whole, part in zip(after[start:], take(store, SPEC, 8 - start, start_step=start), strict=True):
            assert_same(whole[0], part[0])
    for rank in range(2):
        for whole, part in zip(after, take(store, SPEC, 8, rank=rank, world_size=2), strict=True):
            assert_same({k: v[2 * rank : 2 * rank + 2] for k, v in whole[0].items()}, part[0])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_volume_is_open_once_for_all_samples_and_closed_in_the_end(prefetch: int, store: Store) -> None:
    def descriptors() -> int:
        gc.collect()
        links = [Path(f"/proc/self/fd/{each}") for each in os.listdir("/proc/self/fd")]
        return sum("case" in os.readlink(link) for link in links if link.is_symlink())

    with ViewPipeline(store, store.cases[:2], SPEC, seed=1, global_batch=12, prefetch=prefetch) as pipeline:
        next(pipeline)
        until = time.monotonic() + 10
        while descriptors() > 2 and time.monotonic() < until:  # one that is being opened has two for a moment
            time.sleep(0.01)
        assert 0 < descriptors() <= 2
    del pipeline
    assert descriptors() == 0


def test_a_machine_without_free_descriptors_is_not_a_damaged_volume(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StoreReadError(store.path / "volumes" / "case0.npy", OSError(errno.EMFILE, "Too many open files"))

    monkeypatch.setattr(view_pipeline, "OpenVolume", refuse)
    with (
        ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=2) as pipeline,
        pytest.raises(UserError, match=r"case0\.npy cannot be read \(Too many open files\)"),
    ):
        next(pipeline)
    assert not pipeline.unreadable


def test_a_disk_that_is_away_for_a_moment_is_asked_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    really, refused = view_pipeline.OpenVolume, []

    def refuse_once(opened: Store, case: Case) -> Any:
        if case.id not in refused:
            refused.append(case.id)
            raise StoreReadError(store.path, OSError(errno.ESTALE, "Stale file handle"))
        return really(opened, case)

    expected = take(store, SPEC, 2)
    monkeypatch.setattr(view_pipeline, "OpenVolume", refuse_once)
    monkeypatch.setattr(view_pipeline, "PAUSES_S", (0.01, 0.01))
    for whole, again in zip(expected, take(store, SPEC, 2), strict=True):
        assert_same(whole[0], again[0])
    assert len(refused) == 5


def test_more_open_files_than_the_system_allows_are_refused_with_numbers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_pipeline.resource, "getrlimit", lambda _: (256, 600))
    with pytest.raises(UserError, match=r"120 volumes may be open at once.*may open 600 files \(ulimit -Hn\)"):
        ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=20, prefetch=2)
    raised: list[Any] = []
    monkeypatch.setattr(view_pipeline.resource, "setrlimit", lambda _, limits: raised.append(limits))
    monkeypatch.setattr(view_pipeline.resource, "getrlimit", lambda _: (256, 4096))
    ViewPipeline(store, store.cases, SPEC, seed=1, global_batch=20, prefetch=2).close()
    assert raised == [(120 + 512, 4096)]


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
