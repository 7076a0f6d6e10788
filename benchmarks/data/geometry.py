"""Geometry that is pinned: one affine, neither deformation nor intensities. There the rivals that take a matrix make
our views voxel for voxel. And how many bytes a view moves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxtrast.engine.data.planner import Planner
from voxtrast.engine.data.store import Store

from .recipe import VIEWS, Draw, fixed_spec, view_spec

SEED, SLOTS = 0, 2
# How often a coordinate is rounded to float32 on its way: grid_sample's a few times, DALI's with each step of a row.
ROUNDINGS: dict[str, Callable[[int], int]] = {
    "grid_sample": lambda size: 8,
    "grid_sample, lean grid": lambda size: 16,
    "DALI operators": lambda size: size + 8,
}


@dataclass(frozen=True)
class Geometry:
    """What is known of a size before anything is timed."""

    differences: dict[str, tuple[float, float]]  # see pinned_differences
    not_compared: str  # why they are missing; empty otherwise
    moved_bytes: dict[bool, float]  # a view, without and with a field

    def refuses(self, row: str) -> str | None:
        """Why a row does not do the same as ours."""
        difference, explained = self.differences.get(row) or self.differences.get(row.partition(",")[0]) or (0.0, 1.0)
        if difference < explained:
            return None
        return f"differs by {difference:.1e} of the intensity range, and rounding explains {explained:.1e}"


def examine(path: Path, size: int) -> Geometry:
    moved = bytes_of_view(path, size)
    try:
        return Geometry(pinned_differences(path, size), "", moved)
    except NothingInside as why:
        return Geometry({}, str(why), moved)


class NothingInside(Exception):
    """No voxels to compare."""


def pinned_differences(path: Path, size: int) -> dict[str, tuple[float, float]]:
    """Of each rival that takes a matrix: its largest difference from ours, and what the rounding of its coordinates
    explains, in intensity ranges. Affine and flips alone, over the voxels that lie inside the volume."""
    from voxtrast.engine.data.pipeline import ViewPipeline  # DALI, which the processes of the others do without

    from . import by_dali, by_grid_sample

    store, spec = Store(path), fixed_spec(size)
    with ViewPipeline(store, store.cases, spec, seed=SEED, global_batch=SLOTS, threads=1, prefetch=0) as pipeline:
        (ours,) = next(pipeline)
        plans = [pipeline.planner.plan(0, slot) for slot in range(SLOTS)]
        cases = [pipeline.planner.cases[plan.case_index] for plan in plans]
    volumes = [np.array(store.volume(case), np.float32) for case in cases]
    draws = [[_as_draw(plan.views[name].to_volume) for name in VIEWS] for plan in plans]
    slots = [
        by_dali.view_numbers(volume, np.array(plan.origin), of_slot, size)
        for volume, plan, of_slot in zip(volumes, plans, draws, strict=True)
    ]
    arrays = [volume[..., None] for volume in volumes]
    options: dict[str, Any] = {"slots": SLOTS, "threads": 1, "device_id": None, "intensities": False}
    chain, _ = by_dali.build(lambda: (arrays, slots), size, **options)
    of_chain = [torch.from_dlpack(item.as_tensor())[..., 0].clone() for item in chain.run()]
    largest = dict.fromkeys(ROUNDINGS, (0.0, 1.0))
    for slot, (volume, case) in enumerate(zip(volumes, cases, strict=True)):
        source, of_slot = torch.from_numpy(volume)[None, None], draws[slot]
        options = {"elastic": False}
        theirs: dict[str, Any] = {
            "grid_sample": by_grid_sample.sample(source, of_slot, size, **options)[:, 0],
            "grid_sample, lean grid": by_grid_sample.sample(source, of_slot, size, lean=True, **options)[:, 0],
            "DALI operators": [views[slot] for views in of_chain],
        }
        for place, name in enumerate(VIEWS):
            inside = _inside(of_slot[place].to_volume, volume.shape, size)
            if inside.float().mean() < 0.25:
                raise NothingInside(f"three quarters of a view of {case.id} lie outside of it")
            rounded = _steepest(volume) * max(volume.shape) * 2.0**-24
            for rival, views in theirs.items():
                difference = float((views[place] - ours[name][slot, 0])[inside].abs().max())
                span = case.intensity["high"] - case.intensity["low"]
                found = difference / span, rounded * ROUNDINGS[rival](size) / span
                largest[rival] = max(largest[rival], found, key=lambda pair: pair[0] / pair[1])
    return largest


def _steepest(volume: np.ndarray) -> float:
    """What a step of one voxel along every axis changes at most."""
    return float(sum(np.abs(np.diff(volume, axis=axis)).max() for axis in range(3)))


def _as_draw(to_volume: np.ndarray) -> Draw:
    return Draw(to_volume, np.zeros((3, 2, 2, 2), np.float32), 1.0, 0.0, 1.0, 0.0)


def _inside(to_volume: np.ndarray, sides: tuple[int, ...], size: int) -> torch.Tensor:
    index = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    places = np.einsum("ij,jdhw->idhw", to_volume[:, :3], index) + to_volume[:, 3, None, None, None]
    high = np.array(sides)[:, None, None, None] - 1
    return torch.from_numpy(((places >= 0) & (places <= high)).all(0))


def bytes_of_view(path: Path, size: int) -> dict[bool, float]:
    """What must be moved for a view at the least, with and without the field: its share of the region, which two views
    read once, and what is written."""
    store = Store(path)
    planner = Planner(store.cases, view_spec(size), SEED, global_batch=1)
    plans = [planner.plan(step, 0) for step in range(64)]
    stored = [np.dtype(planner.cases[plan.case_index].dtype).itemsize for plan in plans]
    read = np.mean([np.prod(plan.region.shape) * each for plan, each in zip(plans, stored, strict=True)]) / len(VIEWS)
    voxels = size**3
    return {field: float(read + 4 * voxels * (1 + field * 4 / len(VIEWS))) for field in (False, True)}
