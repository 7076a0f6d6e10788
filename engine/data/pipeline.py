"""Views of volumes as torch tensors, prepared by DALI while the model trains.

The planner decides (`planner.py`) and Python reads: for each slot the box of voxels that its views look at, straight
from the memory-mapped volume. DALI cuts, warps and changes intensities with its built-in operators, on the CPU or the
GPU. None of DALI's random operators is used: noise is drawn by numpy, keyed as the plan is, so a batch is a function of
(seed, split, step, slot), bit for bit for one version of numpy and DALI on one kind of machine.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...methods.views import ViewSpec
from ..errors import UserError
from .geometry import Array, Box, affine_of_crop, field_tables, sampling_matrix
from .graph import SMALLEST_SIGMA_VOXELS, Pipeline, build_pipeline, check_views, graph_inputs, steps_made
from .planner import Plan, Planner
from .store import Case, Store

Batch = dict[str, Any]  # tensors by name, and the case ids under "case"
Arrays = dict[str, NDArray[Any]]


class ViewPipeline:
    """Iterates forever over the steps of one rank; each item is the step's list of micro batches.

    With b = global_batch / (world_size * accumulation), micro batch k of rank r holds the slots from
    (k * world_size + r) * b on: the same global batch whatever the number of ranks. For COVER's views a batch holds

        moving, fixed    (b, 1, *crop) float32        every view under its name
        displacement     (b, D, *crop) float32        psi in voxels; of the view with `displacement`, as the next two
        mask             (b, 1, *crop) float32        1 where p + psi(p) lies inside the crop and inside the volume
        affine           (b, D, D+1) float64          crop index p -> p + psi(p)
        case, origin     list[str], (b, 3) int64      where the crop was taken; negative where it is padded

    Outside a volume everything is the case's background.

    Args:
        store: where the volumes are.
        cases: those of this split; the ones too small for the crop are left out, see `excluded`.
        spec: the views.
        seed: of everything random.
        global_batch: slots a step over all ranks and micro batches.
        start_step: the first step to produce; the step number is the only state.
        split: another word gives other draws from the same seed ("train", "validation").
        device_id: GPU that augments and holds the results; None for the CPU.
        threads: of DALI, and of the readers that draw noise and read volumes ahead of it.
        prefetch: steps that DALI prepares ahead while one is used.
    Raises: UserError for settings that do not fit together and, while iterating, for a volume that cannot be read.
    """

    def __init__(
        self,
        store: Store,
        cases: Sequence[Case],
        spec: ViewSpec,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_step: int = 0,
        split: str = "train",
        device_id: int | None = None,
        threads: int = 2,
        prefetch: int = 2,
    ) -> None:
        for what, value in {"world_size": world_size, "accumulation": accumulation, "threads": threads}.items():
            if value < 1:
                raise UserError(f"{what} {value}: expected at least 1")
        if prefetch < 0 or start_step < 0 or not 0 <= rank < world_size:
            raise UserError(
                f"prefetch {prefetch}, start_step {start_step}, rank {rank} of {world_size}: "
                "expected prefetch >= 0, start_step >= 0 and 0 <= rank < world_size"
            )
        if global_batch % (world_size * accumulation):
            raise UserError(
                f"global batch {global_batch} cannot be dealt to {world_size} ranks x {accumulation} micro batches; "
                f"take a multiple of {world_size * accumulation}"
            )
        self.planner = Planner(cases, spec, seed, global_batch=global_batch)
        check_views(spec)
        self.spec = spec
        self.split = split
        self._store = store
        self._device_id = device_id
        self._micro = global_batch // (world_size * accumulation)
        self._accumulation = accumulation
        self._slots = [
            (k * world_size + rank) * self._micro + i for k in range(accumulation) for i in range(self._micro)
        ]
        self._dtype = np.result_type(*{np.dtype(case.dtype) for case in self.planner.cases})
        self._inputs = graph_inputs(spec, self._dtype)
        self._next_step = start_step  # that the readers have not been asked for
        self._ahead: deque[list[Future[tuple[Plan, Arrays]]]] = deque()
        # What DALI has been sent and has not given back: the plans go out with the batch, and the arrays must live
        # until then: DALI 2.4 reads them where they are (`no_copy`), from threads of its own, until it is shut down.
        self._sent: deque[list[tuple[Plan, Arrays]]] = deque()
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="voxtrast-reader")
        # For pipelines that are dropped without close(); not waiting, as any thread may be the one that drops it.
        weakref.finalize(self, self._readers.shutdown, wait=False, cancel_futures=True)
        self._pipeline: Pipeline | None
        self._pipeline, self._outputs = build_pipeline(
            spec,
            self._inputs,
            _weak_source(self, self._sent),
            slots=len(self._slots),
            threads=threads,
            device_id=device_id,
            prefetch=prefetch,
        )

    @property
    def excluded(self) -> list[tuple[Case, str]]:
        """The cases that are too small for the crop, each with the reason."""
        return self.planner.excluded

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._pipeline is None:
            raise UserError("this view pipeline was closed; build a new one, with start_step where the old one stopped")
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        try:
            lists = self._pipeline.run(stream)
        except Exception:
            self.close()  # a step is missing now: nobody may go on as if it were not
            raise
        views = {name: torch.from_dlpack(item.as_tensor()) for name, item in zip(self._outputs, lists, strict=True)}
        plans = [plan for plan, _ in self._sent.popleft()]
        return [self._batch(views, plans, k * self._micro) for k in range(self._accumulation)]

    def _batch(self, views: dict[str, Tensor], plans: list[Plan], first: int) -> Batch:
        rows = slice(first, first + self._micro)
        batch: Batch = {}
        for name, tensor in views.items():
            # One channel: last and first are the same memory.
            batch[name] = tensor[rows] if name == "displacement" else tensor[rows].view(-1, 1, *self.spec.crop)
        device = next(iter(batch.values())).device
        for name, view in self.spec.views.items():
            if view.displacement:
                affines = np.stack([view_affine(plan, name, len(self.spec.crop)) for plan in plans[rows]])
                batch["affine"] = torch.from_numpy(affines).to(device)
        batch["case"] = [self.planner.cases[plan.case_index].id for plan in plans[rows]]
        batch["origin"] = torch.tensor([plan.origin for plan in plans[rows]], dtype=torch.int64, device=device)
        return batch

    def _source(self) -> tuple[list[tuple[Plan, Arrays]], tuple[list[NDArray[Any]], ...]]:
        """One step for DALI, as read and as DALI takes it; called in the thread that iterates, one by one."""
        while len(self._ahead) < 2:  # this step, and the one that the readers turn to meanwhile
            step = self._next_step
            job = (self._store, self.planner, self._dtype, self.split, step)  # not self: readers must not keep it alive
            self._ahead.append([self._readers.submit(_read_slot, *job, slot) for slot in self._slots])
            self._next_step += 1
        ready = [future.result() for future in self._ahead.popleft()]
        return ready, tuple([arrays[item.name] for _, arrays in ready] for item in self._inputs)

    def close(self) -> None:
        """Ends the readers and releases what DALI holds; batches already handed out stay valid."""
        for futures in self._ahead:
            for future in futures:
                future.cancel()
        self._ahead.clear()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pipeline = None
        self._sent = deque()  # DALI's source holds the old one, until DALI itself is gone

    def __enter__(self) -> "ViewPipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _weak_source(
    owner: ViewPipeline, sent: deque[list[tuple[Plan, Arrays]]]
) -> Callable[[], tuple[list[NDArray[Any]], ...]]:
    """The owner's next step, for DALI to call, without keeping the owner alive as a bound method would.

    What was sent is kept alive instead, for as long as DALI keeps this function: beyond its own shutdown.
    """
    reference = weakref.ref(owner)

    def source() -> tuple[list[NDArray[Any]], ...]:
        alive = reference()
        assert alive is not None, "DALI asks for a step within the owner's own run only"
        ready, arrays = alive._source()
        sent.append(ready)
        return arrays

    return source


def _read_slot(
    store: Store, planner: Planner, dtype: np.dtype[Any], split: str, step: int, slot: int
) -> tuple[Plan, Arrays]:
    plan, spec = planner.plan(step, slot, split), planner.spec
    case = planner.cases[plan.case_index]
    region = region_box(plan, len(spec.crop))
    voxels = read_region(store, case, region, plan.origin[0], dtype)
    arrays = {"region": voxels[..., None], **_geometry_arrays(spec, plan, case, region)}
    for name, view in spec.views.items():
        if view.appearance is not None:
            arrays.update(_appearance_arrays(planner, plan, name, case))
    return plan, arrays


def region_box(plan: Plan, dimensions: int) -> Box:
    """The smallest box that holds all voxels any view of the slot looks at; in 2-D of the last two axes."""
    return Box(plan.region.lower[-dimensions:], plan.region.upper[-dimensions:])


def view_affine(plan: Plan, name: str, dimensions: int) -> Array:
    """(D, D+1): index p of the view -> index p + psi(p) of the crop."""
    return affine_of_crop(plan.views[name].to_volume, plan.origin, dimensions)


def read_region(store: Store, case: Case, region: Box, slice_index: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A box of voxels of a volume, background where the box reaches beyond it; nothing else is read.

    A box of two axes is cut from the slice at `slice_index` of the first axis.

    Raises: UserError naming a file that is missing, or not what the index says.
    """
    volume = store.volume(case)
    sizes = case.shape[-len(region.lower) :]
    inside = [(max(low, 0), min(high, size)) for low, high, size in zip(region.lower, region.upper, sizes, strict=True)]
    source: tuple[Any, ...] = tuple(slice(low, max(low, high)) for low, high in inside)
    if len(region.lower) == 2:
        source = (slice_index, *source)
    if region.lower == tuple(low for low, _ in inside) and region.upper == tuple(high for _, high in inside):
        return np.array(volume[source], dtype)
    voxels = np.full(region.shape, case.intensity["background"], dtype)
    target = tuple(
        slice(low - start, max(low, high) - start) for (low, high), start in zip(inside, region.lower, strict=True)
    )
    voxels[target] = volume[source]
    return voxels


def _geometry_arrays(spec: ViewSpec, plan: Plan, case: Case, region: Box) -> Arrays:
    dimensions = len(spec.crop)
    origin, volume = plan.origin[-dimensions:], case.shape[-dimensions:]
    arrays: Arrays = {}
    for name, view in spec.views.items():
        affine = view_affine(plan, name, dimensions)
        if view.affine is None:
            arrays[f"{name}/start"] = np.subtract(origin, region.lower).astype(np.int32)
        else:
            arrays[f"{name}/matrix"] = sampling_matrix(affine, origin, region)
        if view.displacement:
            arrays.update(vars(field_tables(affine, origin, spec.crop, volume)))
    return arrays


def _appearance_arrays(planner: Planner, plan: Plan, name: str, case: Case) -> Arrays:
    """Numbers and noise of one view in the units of the volume; what the plan leaves out changes nothing."""
    ranges = planner.spec.views[name].appearance
    assert ranges is not None
    crop, made = planner.spec.crop, steps_made(ranges)
    steps = {step.kind: step for step in plan.views[name].steps}
    arrays: Arrays = {}

    def number(kind: str, unchanged: float) -> NDArray[np.float32]:
        return np.asarray(steps[kind].numbers[0] if kind in steps else unchanged, np.float32)

    if "noise" in made:
        generator = planner.generator(plan.split, plan.step, plan.slot, f"noise {name}")
        arrays[f"{name}/noise"] = generator.standard_normal((*crop, 1), np.float32)
        arrays[f"{name}/noise_scale"] = number("noise", 0.0)
    if "blur" in made:
        arrays[f"{name}/sigma"] = np.maximum(number("blur", 0.0), np.float32(SMALLEST_SIGMA_VOXELS))
    if "contrast" in made or "brightness" in made:
        arrays[f"{name}/contrast"], arrays[f"{name}/brightness"] = number("contrast", 1.0), number("brightness", 0.0)
    if "in_paint" in made:
        # Boxes of size 0 after the drawn ones: arrays of one shape, however many boxes there are.
        boxes = np.zeros((ranges.in_paint.count, 2, 3), np.int32)
        if "in_paint" in steps:
            drawn = steps["in_paint"].boxes.reshape(-1, 2, 3)
            boxes[: len(drawn)] = drawn
        start, size = boxes[:, 0, -len(crop) :], boxes[:, 1, -len(crop) :]
        arrays[f"{name}/box_start"] = start.ravel().astype(np.float32)
        arrays[f"{name}/box_size"] = size.ravel().astype(np.float32)
        generator = planner.generator(plan.split, plan.step, plan.slot, f"boxes {name}")
        arrays[f"{name}/box_fill"] = _box_fill(generator, crop, start, size, case)
    return arrays


def _box_fill(
    generator: np.random.Generator, crop: Sequence[int], start: NDArray[Any], size: NDArray[Any], case: Case
) -> NDArray[np.float32]:
    """Uniform noise over the case's intensity range inside the boxes, 0 elsewhere."""
    low = case.intensity["low"]
    span = case.intensity["high"] - low
    fill = np.zeros((*crop, 1), np.float32)
    for first, sides in zip(start, size, strict=True):
        place = tuple(slice(begin, begin + side) for begin, side in zip(first, sides, strict=True))
        fill[place] = low + span * generator.random((*sides, 1), np.float32)
    return fill
