"""Views of volumes as torch tensors, prepared by DALI while the model trains.

The planner decides (`planner.py`), Python opens and checks the file of each slot, and our operators inside DALI read
the region and make the views (`graph.py`). A batch is a function of (seed, split, step, slot), bit for bit on one kind
of processor, whatever the ranks, threads and restarts.
"""

import errno
import functools
import os
import re
import resource
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...methods.views import ViewSpec
from ..errors import UserError
from .graph import Pipeline, Source, build_pipeline
from .left_out import LeftOut
from .native import STORED_TYPES
from .planner import Plan, Planner
from .sampling import Sampling, data_sets
from .store import TRANSIENT, VOLUMES, Case, Store, StoreReadError, open_array
from .user_functions import draw_numbers, functions_of

Batch = dict[str, Any]  # tensors by name, and the case ids under "case"
# How voxtrast_read says whose file it is, and who looked at it.
_CASE = re.compile(r"\[case (\d+), step (\d+), slot (\d+)\] ")
# A fault of the machine's that other volumes would meet as well.
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
OTHER_FILES = 512  # of Python, torch, DALI, the log
PAUSES_S = (1.0, 4.0)  # before trying again


class OpenVolume:
    """A volume's file, checked and open for as long as this object lives: it may vanish from its folder meanwhile.

    Raises: UserError naming a file that is missing, or not what the index says.
    """

    def __init__(self, store: Store, case: Case) -> None:
        with open_array(store.path / VOLUMES / f"{case.id}.npy", case.shape, case.dtype) as stream:
            offset = stream.tell()
            self.descriptor = os.dup(stream.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        self.description = np.array([self.descriptor, offset, STORED_TYPES.index(case.dtype)], np.int64)


class OpenVolumes:
    """Opens each volume once for all slots that look at it at the same time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: weakref.WeakValueDictionary[str, OpenVolume] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}  # one a case: a slow disk holds up those alone that want the same

    def open(self, case: Case) -> OpenVolume:
        """Any thread may ask. Tries again where a disk far away did not answer.

        Raises: UserError as OpenVolume does.
        """
        with self._lock:
            opening = self._opening.setdefault(case.id, threading.Lock())
        with opening:
            found = self._open.get(case.id)
            if found is None:
                found = self._open[case.id] = self._try(case)
            return found

    def _try(self, case: Case) -> OpenVolume:
        for pause in (*PAUSES_S, None):
            try:
                return OpenVolume(self._store, case)
            except StoreReadError as error:
                if pause is None or error.number not in TRANSIENT:
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class Slot:
    """What DALI is sent for a slot, and what must stay until DALI has made its views."""

    plan: Plan
    volume: OpenVolume
    plan_bytes: NDArray[np.uint8]
    numbers: NDArray[np.float32]  # for the user's functions


class ViewPipeline:
    """Iterates forever over the steps of one rank; each item is the step's list of micro batches.

    With b = global_batch / (world_size * accumulation), micro batch k of rank r holds the slots from
    (k * world_size + r) * b on: the same global batch whatever the number of ranks. For COVER's views a batch holds

        moving, fixed    (b, 1, *size) float32        every view under its name
        displacement     (b, D, *size) float32        psi in voxels; of the view with `displacement`, as the next two
        mask             (b, 1, *size) float32        1 where p + psi(p) lies inside the other view and the volume
        affine           (b, D, D+1) float64          index p -> p + psi(p), but for a deformation
        case, origin     list[str], (b, 3) int64      where the crop was taken; negative where it is padded
        position         (b,) float32                 of the slice, or of the crop's centre, along the first axis of
                                                      the volume, 0 to 1

        NAME_clean               as NAME               of views that ask for it
        NAME_flips               (b, D) int64          1 for a flipped axis; of views that have a chance of flips
        NAME_quarter_turns       (b,) int64            0 to 3, after the flips; of views that are turned

    Outside a volume everything is the case's background.

    Args:
        store: where the volumes are.
        cases: those of this split; the ones too small for the crop are left out, see `excluded`.
        spec: the views.
        seed: of everything random.
        global_batch: slots a step over all ranks and micro batches.
        start_step: the first step to produce; the step number is the only state.
        split: another word gives other draws from the same seed ("train", "validation").
        device_id: GPU that holds the results; None for the CPU.
        threads: of DALI, and of those that plan and open files ahead of it.
        prefetch: steps that DALI prepares ahead while one is used.
        sampling: how cases are dealt and crops placed, see `Sampling`; its defaults without.
        on_error: "substitute" goes on without a volume that cannot be read and says so once, "raise" ends the run.
        unreadable: case id -> why, of volumes that are known to be damaged.
    Raises: UserError for settings that do not fit together and, while iterating, for a volume that cannot be read
        (on_error="raise") or where none is left.
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
        sampling: Sampling | None = None,
        on_error: str = "substitute",
        unreadable: Mapping[str, str] = {},
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
        sampling = sampling or Sampling()
        self.planner = Planner(
            cases,
            spec,
            seed,
            global_batch=global_batch,
            crops_per_visit=sampling.crops_per_visit,
            groups=data_sets(cases, sampling.weights),
            weights=sampling.weights or None,
            foreground=sampling.foreground,
        )
        self._left_out = LeftOut(self.planner.cases, on_error, unreadable)
        self.spec = spec
        self.split = split
        self._volumes = OpenVolumes(store)
        self._device_id = device_id
        self._micro = global_batch // (world_size * accumulation)
        self._accumulation = accumulation
        self._slots = [
            (k * world_size + rank) * self._micro + i for k in range(accumulation) for i in range(self._micro)
        ]
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="voxtrast-reader")
        # For pipelines that are dropped without close(); not waiting, as any thread may be the one that drops it.
        weakref.finalize(self, self._readers.shutdown, wait=False, cancel_futures=True)
        self._build = functools.partial(
            build_pipeline,
            spec,
            half=all(case.dtype == "float16" for case in self.planner.cases),
            slots=len(self._slots),
            threads=threads,
            device_id=device_id,
            prefetch=prefetch,
        )
        _allow_open_files(len(self._slots) * (prefetch + 4))  # sent, being planned and about to be given back
        self._step = start_step  # the next one to hand out
        self._awaited: tuple[int, list[Future[Slot]]] = (start_step, [])  # what DALI was sent last, or waits for
        self.abandoned = False  # readers may hang for ever, and nobody waits for them
        self._start()

    def _start(self) -> None:
        """A DALI pipeline that begins with the next step to hand out."""
        self._pipeline: Pipeline | None = None
        self._next_step = self._step  # that nobody has been asked to plan
        self._ahead: deque[list[Future[Slot]]] = deque()
        # What DALI has been sent and has not given back: the plans go out with the batch, and files and arrays must
        # live until then: DALI 2.4 reads them where they are, from threads of its own, until it is shut down.
        self._sent: deque[list[Slot]] = deque()
        self._pipeline, self._outputs = self._build(_weak_source(self, self._sent))

    @property
    def excluded(self) -> list[tuple[Case, str]]:
        """The cases that are too small for the crop, each with the reason."""
        return self.planner.excluded

    @property
    def unreadable(self) -> dict[str, str]:
        """Why volumes were left out in the course of the run, by case id."""
        return self._left_out.reasons

    def plan(self, step: int, slot: int) -> Plan:
        """The plan of a slot as its views were made, or will be but for volumes that turn out unreadable."""
        return self.planner.plan(step, slot, self.split, without=self._left_out.of_slot(step, slot))

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._pipeline is None:
            raise UserError("this view pipeline was closed; build a new one, with start_step where the old one stopped")
        stream = None if self._device_id is None else torch.cuda.current_stream(self._device_id)
        while True:
            try:
                lists = self._pipeline.run(stream)
                break
            except Exception as error:
                self._recover(error)
        self._step += 1
        views = {name: torch.from_dlpack(item.as_tensor()) for name, item in zip(self._outputs, lists, strict=True)}
        plans = [slot.plan for slot in self._sent.popleft()]
        return [self._batch(views, plans, k * self._micro) for k in range(self._accumulation)]

    def _recover(self, error: Exception) -> None:
        """Begins the step again without the volume that could not be read; raises what is something else."""
        said = str(error)
        try:
            if isinstance(error, UserError) or "voxtrast_" not in said:
                raise error
            case = _CASE.search(said)
            if case is None:
                raise UserError(f"{_own_words(said)}; change the views, or report it with their settings") from error
            wrong = UserError(f"{_own_words(said)}; check the store with `voxtrast prepare --check STORE`")
            self._left_out.add(int(case[1]), wrong, slot=(int(case[2]), int(case[3])))
        except Exception:
            self.close()  # a step is missing now: nobody may go on as if it were not
            raise
        self._forget()
        self._start()

    def _batch(self, views: dict[str, Tensor], plans: list[Plan], first: int) -> Batch:
        rows = slice(first, first + self._micro)
        batch: Batch = {}
        for name, tensor in views.items():
            batch[name] = tensor[rows] if name == "displacement" else tensor[rows].unsqueeze(1)
        device = next(iter(batch.values())).device
        for name, view in self.spec.views.items():
            if view.displacement:
                affines = np.stack([field_affine(plan, name, len(self.spec.crop)) for plan in plans[rows]])
                batch["affine"] = torch.from_numpy(affines).to(device)
            taken = [plan.views[name] for plan in plans[rows]]
            if any(view.flips):
                flips = [drawn.flips[-len(self.spec.crop) :] for drawn in taken]
                batch[f"{name}_flips"] = torch.tensor(flips, device=device)
            if view.quarter_turns:
                batch[f"{name}_quarter_turns"] = torch.tensor([drawn.quarter_turns for drawn in taken], device=device)
        positions = [self._position(plan) for plan in plans[rows]]
        batch["position"] = torch.tensor(positions, dtype=torch.float32, device=device)
        batch["case"] = [self.planner.cases[plan.case_index].id for plan in plans[rows]]
        batch["origin"] = torch.tensor([plan.origin for plan in plans[rows]], dtype=torch.int64, device=device)
        return batch

    def _position(self, plan: Plan) -> float:
        if len(self.spec.crop) == 2:
            return plan.position
        centre = (plan.origin[0] + self.spec.crop[0] / 2) / self.planner.cases[plan.case_index].shape[0]
        return min(1.0, max(0.0, centre))

    def _source(self) -> list[Slot]:
        """One step for DALI; called in the thread that iterates, one by one."""
        while len(self._ahead) < 2:  # this step, and the one that the readers turn to meanwhile
            # Not self: readers must not keep it alive.
            job = (self._volumes, self.planner, self._left_out, self.split, self._next_step)
            self._ahead.append([self._readers.submit(_prepare_slot, *job, slot) for slot in self._slots])
            self._next_step += 1
        self._awaited = self._next_step - len(self._ahead), self._ahead.popleft()
        return [future.result() for future in self._awaited[1]]

    def waiting_for(self) -> str:
        """The volumes that a step waits for which does not come; from another thread than the one that iterates."""
        step, futures = self._awaited
        slots = [slot for slot, future in zip(self._slots, futures, strict=False) if not future.done()]
        what = "opened" if slots else "read"
        cases = {self.planner.cases[self.plan(step, slot).case_index].id for slot in slots or self._slots}
        return f"volumes to be {what}: {', '.join(sorted(cases))}"

    def close(self) -> None:
        """Ends the readers and releases what DALI holds; batches already handed out stay valid."""
        self._forget()
        self._readers.shutdown(wait=not self.abandoned, cancel_futures=True)

    def _forget(self) -> None:
        for futures in self._ahead:
            for future in futures:
                future.cancel()
        self._ahead.clear()
        self._pipeline = None
        self._sent = deque()  # DALI's source holds the old one, until DALI itself is gone

    def __enter__(self) -> "ViewPipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _weak_source(owner: ViewPipeline, sent: deque[list[Slot]]) -> Source:
    """The owner's next step, for DALI to call, without keeping the owner alive as a bound method would.

    What was sent is kept alive instead, for as long as DALI keeps this function: beyond its own shutdown.
    """
    reference = weakref.ref(owner)
    has_functions = bool(functions_of(owner.spec))

    def source() -> tuple[list[NDArray[Any]], ...]:
        alive = reference()
        assert alive is not None, "DALI asks for a step within the owner's own run only"
        slots = alive._source()
        sent.append(slots)
        inputs = [slot.volume.description for slot in slots], [slot.plan_bytes for slot in slots]
        return (*inputs, [slot.numbers for slot in slots]) if has_functions else inputs

    return source


def _prepare_slot(volumes: OpenVolumes, planner: Planner, left_out: LeftOut, split: str, step: int, slot: int) -> Slot:
    while True:
        plan = planner.plan(step, slot, split, without=left_out.of_slot(step, slot))
        try:
            volume = volumes.open(planner.cases[plan.case_index])
        except UserError as error:
            if isinstance(error, StoreReadError) and error.number in EXHAUSTED:
                raise
            left_out.add(plan.case_index, error)
            continue
        numbers = draw_numbers(functools.partial(planner.generator, split, step, slot), planner.spec)
        return Slot(plan, volume, np.frombuffer(plan.to_bytes(), np.uint8), numbers)


def _allow_open_files(count: int) -> None:
    """Raises this process' limit of open files as far as need be, and UserError where it may not be raised so far."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{count} volumes may be open at once, and this process may open {hard} files (ulimit -Hn); lower "
            "loader.prefetch or the samples of a step on each rank, or raise the limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def field_affine(plan: Plan, name: str, dimensions: int) -> NDArray[np.float64]:
    """(D, D+1): index p of the view -> index p + psi(p) of the view that its field leads to, but for a deformation."""
    view = plan.views[name]
    affine = view.from_volume[:, :3] @ view.to_volume
    affine[:, 3] += view.from_volume[:, 3]
    return affine[-dimensions:, -dimensions - 1 :]


def _own_words(said: str) -> str:
    """What our operator said, without DALI's account of where."""
    own = said.partition("encountered:")[2] or said
    return _CASE.sub("", own).strip().partition("\n")[0]
