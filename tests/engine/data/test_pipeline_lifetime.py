"""What the view pipeline holds, lets go and survives: threads, DALI's buffers, batches, a volume that vanishes."""

import gc
import itertools
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from view_samples import COVER, assert_same, make_store, varied_store

from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import View, ViewSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return varied_store(tmp_path_factory)


def test_tensors_stay_what_they_were_while_later_steps_and_the_end_come(store: Store) -> None:
    spec = ViewSpec((20, 20, 20), {**COVER, "plain": View()})
    with ViewPipeline(store, store.cases, spec, seed=1, global_batch=2, threads=2) as pipeline:
        held = list(itertools.islice(pipeline, 2))
        copies = [[{k: v if k == "case" else v.clone() for k, v in batch.items()} for batch in step] for step in held]
        for step in itertools.islice(pipeline, 10):
            step[0]["plain"].fill_(-1)  # ours to write to
    gc.collect()
    for step, copy in zip(held, copies, strict=True):
        assert_same(step[0], copy[0])


def test_closing_releases_dali_and_the_readers(store: Store) -> None:
    def readers() -> int:
        return sum(thread.name.startswith("voxtrast-reader") for thread in threading.enumerate())

    before = readers()
    pipeline = ViewPipeline(store, store.cases, ViewSpec((16, 16, 16), COVER), seed=1, global_batch=2)
    next(pipeline)
    dali = weakref.ref(pipeline._pipeline)
    pipeline.close()
    pipeline.close()  # twice is once
    gc.collect()
    assert dali() is None
    assert readers() == before
    with pytest.raises(UserError, match="closed"):
        next(pipeline)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_pipeline_that_is_dropped_without_closing_is_freed(store: Store, steps: int) -> None:
    def readers() -> int:
        return sum(thread.name.startswith("voxtrast-reader") for thread in threading.enumerate())

    before = readers()
    pipeline = ViewPipeline(store, store.cases, ViewSpec((16, 16, 16), COVER), seed=1, global_batch=2)
    batches = list(itertools.islice(pipeline, steps))
    expected = [batch["moving"].clone() for (batch,) in batches]
    whole, dali = weakref.ref(pipeline), weakref.ref(pipeline._pipeline)
    gc.disable()
    try:
        del pipeline
        assert whole() is None, "at once, without a search for cycles"
    finally:
        gc.enable()
    gc.collect()
    assert dali() is None
    until = time.monotonic() + 10
    while readers() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert readers() == before
    assert all(torch.equal(batch["moving"], copy) for (batch,), copy in zip(batches, expected, strict=True))


def test_what_dali_reads_lives_as_long_as_dali(store: Store) -> None:
    pipeline = ViewPipeline(store, store.cases, ViewSpec((16, 16, 16), COVER), seed=1, global_batch=2, prefetch=2)
    next(pipeline)
    dali, sent = pipeline._pipeline, pipeline._sent
    steps = len(sent)
    pipeline.close()
    assert steps >= 2
    assert len(sent) == steps, "DALI is still there: nothing may be taken from under it"
    gone = weakref.ref(sent)
    del sent, dali
    gc.collect()
    assert gone() is None


def test_a_volume_that_vanished_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [(20, 20, 20)] * 12)  # more than are open at a time
    spec = ViewSpec((16, 16, 16), COVER)
    with ViewPipeline(store, store.cases, spec, seed=1, global_batch=2, on_error="raise", prefetch=0) as pipeline:
        next(pipeline)
        (store.path / "volumes" / "case1.npy").unlink()
        with pytest.raises(UserError, match=r"case1\.npy.*prepare"):
            list(itertools.islice(pipeline, 12))  # those prepared ahead still come
        with pytest.raises(UserError, match="closed"):  # not the step after the missing one
            next(pipeline)
