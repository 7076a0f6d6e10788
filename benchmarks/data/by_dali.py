"""DALI's own operators in a row, fed with the numbers of each slot from numpy: what the view pipeline was made of
before it had an operator of its own.

There is no elastic deformation in 3-D. Crop, affine and flips are one matrix; volumes are read where they lie, in the
memory of the host or the device. With `field` the second view gets the field to the slot's crop and its mask, as sums
of small tables, which an affine field allows.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, math
from nvidia.dali.types import DALIDataType

from .recipe import VIEWS, Draw, Volume, draw_slot

NUMBERS = ("exponent", "shift", "factor", "noise_std")
TABLES = ("rows", "columns", "position_rows", "position_columns", "limit")
Slot = dict[str, Any]  # arrays by name


def view_numbers(volume: NDArray[np.float32], origin: NDArray[np.int64], draws: list[Draw], size: int) -> Slot:
    """What DALI is sent for a slot, but for its volume."""
    slot: Slot = {}
    for name, draw in zip(VIEWS, draws, strict=True):
        linear, offset = draw.to_volume[::-1, 2::-1], draw.to_volume[::-1, 3]
        corner = offset + 0.5 - linear.sum(axis=1) * 0.5  # DALI counts from the corner of the first voxel
        slot[f"{name} matrix"] = np.column_stack([linear, corner]).astype(np.float32)
        slot |= {f"{name} {number}": np.float32(getattr(draw, number)) for number in NUMBERS}
    slot |= _tables(draws[1].to_volume, origin, np.array(volume.shape[:3]), size)
    return slot


def _tables(to_volume: NDArray[np.float64], origin: NDArray[np.int64], sides: NDArray[Any], size: int) -> Slot:
    """psi = rows + columns, and |position rows + position columns| <= limit along each axis where psi is valid."""
    linear = to_volume[:, :3]
    index = np.arange(size, dtype=np.float64)
    low, high = np.maximum(0, -origin), np.minimum(size, sides - origin) - 1
    rows = (linear[:, 0, None, None] * index[:, None] + linear[:, 1, None, None] * index)[..., None]
    rows = rows + (to_volume[:, 3] - origin)[:, None, None, None]
    columns = (linear[:, 2, None] * index)[:, None, None]
    own = np.zeros((3, size, size, 1)), np.zeros((3, 1, 1, size))
    own[0][0], own[0][1], own[1][2] = index[:, None, None], index[:, None], index
    middle = ((low + high) / 2)[:, None, None, None]
    found = rows - own[0], columns - own[1], rows - middle, columns, (high - low) / 2
    return {name: table.astype(np.float32) for name, table in zip(TABLES, found, strict=True)}


def build(
    source: Callable[[], tuple[list[Any], list[Slot]]],
    size: int,
    *,
    slots: int,
    threads: int,
    device_id: int | None,
    intensities: bool = True,
    field: bool = False,
    prefetch: int = 3,
) -> tuple[Pipeline, list[str]]:
    """The pipeline and the names of its outputs; `source` gives the volumes of a step (D, H, W, 1) and their slots."""
    numbers = NUMBERS if intensities else ()
    dimensions = {f"{view} {what}": 2 if what == "matrix" else 0 for view in VIEWS for what in ("matrix", *numbers)}
    if field:
        dimensions |= dict.fromkeys(TABLES, 4) | {"limit": 1}
    on_gpu = device_id is not None
    options: dict[str, Any] = {
        "num_threads": threads,
        "device_id": device_id,
        "prefetch_queue_depth": prefetch,
        "exec_dynamic": True,
    }
    pipeline = Pipeline(batch_size=slots, **options)
    # DALI asks for the two in whichever order it likes.
    waiting: dict[str, deque[Any]] = {"volumes": deque(), "numbers": deque()}

    def take(what: str) -> Any:
        if not waiting[what]:
            volumes, slots = source()
            waiting["volumes"].append(volumes)
            waiting["numbers"].append([[slot[name] for slot in slots] for name in dimensions])
        return waiting[what].popleft()

    with pipeline:
        device = "gpu" if on_gpu else "cpu"
        shared: dict[str, Any] = {"dtype": DALIDataType.FLOAT, "batch": True}
        volume = fn.external_source(
            lambda: take("volumes"), device=device, ndim=4, layout="DHWC", no_copy=True, **shared
        )
        sent = fn.external_source(
            lambda: take("numbers"), num_outputs=len(dimensions), ndim=list(dimensions.values()), **shared
        )
        node = dict(zip(dimensions, sent, strict=True))
        outputs = {}
        for name in VIEWS:
            view = fn.warp_affine(volume, matrix=node[f"{name} matrix"], size=[size] * 3)
            outputs[name] = _intensities(view, *(node[f"{name} {what}"] for what in numbers)) if intensities else view
        if field:
            tables = [node[name].gpu() if on_gpu else node[name] for name in TABLES]
            outputs["displacement"] = tables[0] + tables[1]
            outputs["mask"] = _mask(*tables[2:])
        pipeline.set_outputs(*outputs.values())
    pipeline.build()
    return pipeline, list(outputs)


def _intensities(view: Any, exponent: Any, shift: Any, factor: Any, noise_std: Any) -> Any:
    low, high = fn.reductions.min(view), fn.reductions.max(view)
    span = high - low
    view = math.pow((view - low) * (1.0 / span), exponent) * span + (low + shift)
    view = view * factor + fn.reductions.mean(view) * (1.0 - factor)
    return fn.noise.gaussian(view, stddev=noise_std)


def _mask(rows: Any, columns: Any, limit: Any) -> Any:
    inside = math.abs(rows[0] + columns[0]) <= limit[0]
    for axis in (1, 2):
        inside = inside & (math.abs(rows[axis] + columns[axis]) <= limit[axis])
    return fn.cast(inside, dtype=DALIDataType.FLOAT)


class Chain:
    """Steps of views from volumes in memory."""

    def __init__(
        self, volumes: list[Volume], size: int, *, slots: int, threads: int, device_id: int | None, field: bool
    ) -> None:
        self._generator, self._volumes, self._size, self._slots = np.random.default_rng(0), volumes, size, slots
        arrays = [volume.voxels[..., None] for volume in volumes]
        self._arrays: list[Any] = arrays
        if device_id is not None:
            self._arrays = [torch.from_numpy(array).to(f"cuda:{device_id}") for array in arrays]
        self._pipeline, self._names = build(
            self._step, size, slots=slots, threads=threads, device_id=device_id, field=field
        )

    def _step(self) -> tuple[list[Any], list[Slot]]:
        numbers = self._generator.integers(len(self._volumes), size=self._slots)
        slots = []
        for number in numbers:
            origin, draws = draw_slot(self._generator, self._volumes[number], self._size)
            slots.append(view_numbers(self._volumes[number].voxels, origin, draws, self._size))
        return [self._arrays[number] for number in numbers], slots

    def __next__(self) -> dict[str, Any]:
        lists = self._pipeline.run()
        found = {}
        for name, item in zip(self._names, lists, strict=True):
            tensor = torch.from_dlpack(item.as_tensor())
            found[name] = tensor.movedim(-1, 1) if name in VIEWS else tensor
        if "mask" in found:
            found["mask"] = found["mask"].unsqueeze(1)
        return found
