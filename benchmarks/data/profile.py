"""Where the time of ViewPipeline goes on a CPU: core time of its parts, each by itself on one thread, and the whole."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType

from voxtrast.engine.data.graph import OPERATORS
from voxtrast.engine.data.pipeline import OpenVolume, ViewPipeline
from voxtrast.engine.data.planner import Planner
from voxtrast.engine.data.store import Store

from .ours import SEED, read_regions
from .recipe import view_spec

SLOTS, STEPS, WARMING = 4, 10, 4  # of a step; steps that are timed, after some that are not
OTHER = "the rest"


def profile(path: Path, size: int) -> dict[str, float]:
    """Core seconds of a slot by part; the files are in the page cache."""
    store, spec = Store(path), view_spec(size)
    options: dict[str, Any] = {"seed": SEED, "global_batch": SLOTS, "threads": 1, "prefetch": 0}
    with ViewPipeline(store, store.cases, spec, **options) as pipeline:
        whole = _core_seconds(lambda: next(pipeline))
    planner = Planner(store.cases, spec, SEED, global_batch=SLOTS)
    planned = read_regions(path, spec, SLOTS, 2)
    parts = {"plan": _core_seconds(lambda: [planner.plan(0, slot).to_bytes() for slot in range(SLOTS)])}
    cases = [[planner.cases[plan.case_index] for plan, _ in step] for step in planned]
    parts["open the file"] = _core_seconds(lambda: [OpenVolume(store, case) for case in cases[0]])
    files = [[OpenVolume(store, case) for case in step] for step in cases]
    sent = {
        "file": [[file.description for file in step] for step in files],
        "plan": [[np.frombuffer(plan.to_bytes(), np.uint8) for plan, _ in step] for step in planned],
        "region": [[region for _, region in step] for step in planned],
    }
    half = planned[0][0][1].dtype == np.float16
    view = OPERATORS.voxtrast_view
    operators: dict[str, Callable[[Any, Any, Any], Any]] = {
        "read the region": lambda file, plan, region: [OPERATORS.voxtrast_read(file, plan, half=half)],
        "first view": lambda file, plan, region: [view(region, plan, view=0)],
        "second view, field, mask": lambda file, plan, region: view(region, plan, view=1, displacement=True, mask=True),
    }
    parts |= {name: _core_seconds_of_operator(make, sent, half) for name, make in operators.items()}
    parts = {name: seconds / SLOTS for name, seconds in parts.items()}
    return parts | {OTHER: whole / SLOTS - sum(parts.values())}


def _core_seconds(work: Callable[[], Any]) -> float:
    """Of one call, all threads of the process."""
    for _ in range(WARMING):
        work()
    started = time.process_time()
    for _ in range(STEPS):
        work()
    return (time.process_time() - started) / STEPS


def _core_seconds_of_operator(make: Callable[[Any, Any, Any], Any], sent: dict[str, Any], half: bool) -> float:
    options: dict[str, Any] = {"num_threads": 1, "device_id": None, "prefetch_queue_depth": 1, "exec_dynamic": True}
    pipeline = Pipeline(batch_size=SLOTS, **options)
    voxels = DALIDataType.FLOAT16 if half else DALIDataType.FLOAT
    types = {"file": (DALIDataType.INT64, 1), "plan": (DALIDataType.UINT8, 1), "region": (voxels, 3)}
    shared: dict[str, Any] = {"cycle": True, "batch": True, "no_copy": True}
    with pipeline:
        nodes = {
            name: fn.external_source(sent[name], dtype=dtype, ndim=ndim, **shared)
            for name, (dtype, ndim) in types.items()
        }
        pipeline.set_outputs(*make(nodes["file"], nodes["plan"], nodes["region"]))
    pipeline.build()
    return _core_seconds(pipeline.run)
