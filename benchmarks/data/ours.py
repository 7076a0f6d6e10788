"""Our own rows: the view pipeline as a training run has it, and its operator alone on regions that are in memory."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType

from voxtrast.engine.data.graph import OPERATORS
from voxtrast.engine.data.native import load_plugin
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.engine.data.store import VOLUMES, Case, Store
from voxtrast.methods.views import ViewSpec

from .recipe import view_spec
from .volumes import ColdFiles

SEED = 0
STEPS_IN_MEMORY = 2  # whose regions the operator alone takes in turns


class Reading:
    """Views by way of ViewPipeline; `cold` puts the store out of the page cache before each step."""

    def __init__(self, path: Path, size: int, *, slots: int, threads: int, device_id: int | None, cold: bool) -> None:
        store = Store(path)
        self._files = ColdFiles(store) if cold else None
        options: dict[str, Any] = {"seed": SEED, "global_batch": slots, "threads": threads, "device_id": device_id}
        self._pipeline = ViewPipeline(store, store.cases, view_spec(size), **options)
        if not cold:
            for case in store.cases:  # into the page cache
                (store.path / VOLUMES / f"{case.id}.npy").read_bytes()

    def __next__(self) -> dict[str, Any]:
        if self._files is not None:
            self._files.evict()
        (batch,) = next(self._pipeline)
        return batch


def read_regions(path: Path, spec: ViewSpec, slots: int, steps: int) -> list[list[tuple[Plan, np.ndarray]]]:
    """Plans of the first steps, each slot with its region (D, H, W): float16 if all volumes are, else float32."""
    store = Store(path)
    dtype = "float16" if all(case.dtype == "float16" for case in store.cases) else "float32"
    planner = Planner(store.cases, spec, SEED, global_batch=slots)
    found = []
    for step in range(steps):
        plans = [planner.plan(step, slot) for slot in range(slots)]
        found.append([(plan, _region(plan, planner.cases[plan.case_index], store, dtype)) for plan in plans])
    return found


def _region(plan: Plan, case: Case, store: Store, dtype: str) -> np.ndarray:
    volume, box = store.volume(case), plan.region
    region = np.full(box.shape, case.intensity["background"], dtype)
    sides = zip(box.lower, box.upper, volume.shape, strict=True)
    inside = [(max(low, 0), min(high, side)) for low, high, side in sides]
    target = tuple(slice(low - first, high - first) for (low, high), first in zip(inside, box.lower, strict=True))
    region[target] = volume[tuple(slice(*pair) for pair in inside)]
    return region


class OperatorAlone:
    """Views of regions in memory (of the host or the device), planned beforehand, through DALI."""

    def __init__(self, path: Path, size: int, *, slots: int, threads: int, device_id: int | None) -> None:
        load_plugin()
        spec = view_spec(size)
        steps = read_regions(path, spec, slots, STEPS_IN_MEMORY)
        regions: list[list[Any]] = [[region for _, region in step] for step in steps]
        if device_id is not None:
            regions = [[torch.from_numpy(region).to(f"cuda:{device_id}") for region in step] for step in regions]
        plans = [[np.frombuffer(plan.to_bytes(), np.uint8) for plan, _ in step] for step in steps]
        half = steps[0][0][1].dtype == np.float16
        self._kept = regions, plans  # DALI reads them where they are
        options: dict[str, Any] = {
            "num_threads": threads,
            "device_id": device_id,
            "prefetch_queue_depth": 3,
            "exec_dynamic": True,
        }
        self._pipeline = Pipeline(batch_size=slots, **options)
        device = "cpu" if device_id is None else "gpu"
        with self._pipeline:
            shared: dict[str, Any] = {"cycle": True, "batch": True, "no_copy": True}
            region = fn.external_source(
                regions,
                device=device,
                dtype=DALIDataType.FLOAT16 if half else DALIDataType.FLOAT,
                ndim=3,
                **shared,
            )
            plan = fn.external_source(plans, dtype=DALIDataType.UINT8, ndim=1, **shared)
            self._names = ["moving", "fixed", "displacement", "mask"]
            view = functools.partial(OPERATORS.voxtrast_view, region, plan, device=device)
            self._pipeline.set_outputs(view(view=0), *view(view=1, displacement=True, mask=True))
        self._pipeline.build()

    def __next__(self) -> dict[str, Any]:
        tensors = (torch.from_dlpack(item.as_tensor()) for item in self._pipeline.run())
        found = dict(zip(self._names, tensors, strict=True))
        return {name: tensor if name == "displacement" else tensor.unsqueeze(1) for name, tensor in found.items()}
