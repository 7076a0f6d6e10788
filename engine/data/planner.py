"""What every view will be: the case, the boxes, the geometry and the appearance of each slot, decided by arithmetic.

The planner itself is C++ (csrc/geometry/), shared with the operators that carry plans out. A number drawn there depends
on (seed, split, step, slot, view) and on nothing else: each purpose has a Philox counter of its own (random.h). So the
step number is the only state of the data, whatever the ranks, threads, prefetching or restarts; plans are equal bit
for bit wherever the C library's mathematics are.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...methods.views import ViewSpec
from ..errors import UserError
from .geometry import Array, Box
from .native import load_module
from .store import Case
from .view_checks import check_spec

__all__ = ["Plan", "Planner", "Step", "ViewPlan", "check_spec", "usable_cases"]


def native() -> Any:
    """The compiled planner; compiled now where it is asked for the first time. Raises UserError as `build` does."""
    # Without contraction no product and sum become one operation on some machines and two on others. Nobody waits for
    # a plan of 30 microseconds; more optimisation is more seconds of compiling.
    return load_module("voxtrast_geometry", ("geometry/*.cpp",), flags=("-O1", "-ffp-contract=off"))


@dataclass(frozen=True, eq=False)
class Step:
    """One change of intensity; `numbers` in the units of the volume, as csrc/geometry/plan.h lists them."""

    kind: str
    stream: int  # of what the step draws voxel by voxel
    numbers: NDArray[np.float32]
    boxes: NDArray[np.int32]  # (boxes, 6): first voxel (D, H, W) in the view, then sides


@dataclass(frozen=True, eq=False)
class ViewPlan:
    """Geometry and steps of one view. All indices are (D, H, W); a 2-D view has depth 1."""

    size: tuple[int, int, int]
    box: Box  # of the volume, before flips, turns, the affine and the deformation
    flips: tuple[int, int, int]
    quarter_turns: int  # after the flips: numpy's rot90 in the plane of the last two axes
    to_volume: Array  # (3, 4): index of the view -> index of the volume, but for the deformation
    from_volume: Array  # (3, 4): index of the volume -> index of the view that the displacement leads to
    partner_size: tuple[int, int, int]  # of that view
    spacing: tuple[float, float, float]  # of the control points, voxels of the view
    control_points: NDArray[np.float32]  # (3, *points): their displacement, voxels of the volume
    antialias: tuple[float, float, float]  # sigma, voxels of the volume
    steps: tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything random about one slot of one step, but for what steps draw voxel by voxel (see Step.stream)."""

    step: int
    slot: int
    split: str
    case_index: int  # into Planner.cases
    crop: Box  # of the volume; may reach beyond it
    position: float  # of a slice in its volume: index / (depth - 1)
    region: Box  # every voxel that a view reads
    views: dict[str, ViewPlan]
    native: Any = field(repr=False)

    @property
    def origin(self) -> tuple[int, ...]:
        """First voxel of the crop in the volume; negative where the crop is padded."""
        return self.crop.lower

    def to_bytes(self) -> bytes:
        """What is saved, and what the operators are sent."""
        found: bytes = self.native.to_bytes()
        return found

    @classmethod
    def from_bytes(cls, content: bytes) -> "Plan":
        """Raises: UserError for bytes that are no plan, or a damaged one."""
        try:
            return cls.of(native().Plan.from_bytes(content))
        except ValueError as error:
            raise UserError(f"{error}; plan the slot again") from None

    def describe(self) -> str:
        """The plan in words, for people."""
        text: str = self.native.describe()
        return text

    @classmethod
    def of(cls, plan: Any) -> "Plan":
        views = {view.name: _view_plan(view) for view in plan.views}
        numbers = (plan.step, plan.slot, plan.split, plan.case_index)
        return cls(*numbers, Box(*plan.crop), plan.position, Box(*plan.region), views, plan)


def _view_plan(view: Any) -> ViewPlan:
    return ViewPlan(
        view.size,
        Box(*view.box),
        view.flips,
        view.quarter_turns,
        view.to_volume,
        view.from_volume,
        view.partner_size,
        view.spacing,
        view.control_points,
        view.antialias,
        tuple(Step(step.kind, step.stream, step.numbers, step.boxes) for step in view.steps),
    )


def usable_cases(cases: Sequence[Case], crop: Sequence[int]) -> tuple[list[Case], list[tuple[Case, str]]]:
    """Splits the cases into those that a crop can be taken from and those, with reasons, that are too small.

    A volume that covers less than half of the crop on some axis would be mostly padding. A 2-D crop (H, W) looks at
    the last two axes only.

    Raises: UserError where no case is left, naming the crop, the largest volume and the remedy.
    """
    usable: list[Case] = []
    excluded: list[tuple[Case, str]] = []
    wanted = _times(crop)
    for case in cases:
        sizes = case.shape[-len(crop) :]
        if any(2 * size < side for size, side in zip(sizes, crop, strict=True)):
            excluded.append((case, f"{case.id}: {_times(sizes)} voxels cover less than half of the crop {wanted}"))
        else:
            usable.append(case)
    if not usable:
        if not excluded:
            raise UserError(f"no case to take crops of {wanted} from: the store or the split is empty; prepare volumes")
        largest = max((case.shape for case, _ in excluded), key=lambda shape: min(shape[-len(crop) :]))
        raise UserError(
            f"crop {wanted}: none of {len(excluded)} volumes covers half of it on every axis (the largest is "
            f"{_times(largest)} voxels); take a smaller crop, or prepare the volumes at a finer spacing"
        )
    return usable, excluded


class Planner:
    """Deals cases to slots and draws their views.

    Each epoch visits every usable case once, in an order keyed by (seed, split, epoch); slot s of step t takes place
    t * global_batch + s of that endless sequence, so the number of ranks does not matter.

    Args:
        cases: those of one split; the ones that the views cannot be taken from are left out, see `excluded`.
        spec: the views.
        seed: 0 <= seed < 2^64.
        global_batch: slots a step, over all ranks and accumulated micro batches.
        crops_per_visit: consecutive slots that take the same case; more of them read less and vary less.
        groups: case id -> name of its data set, for `weights`.
        weights: share of each data set in the visits, by name; positive, to be divided by their sum. Each data set
            walks through epochs of its own. Without, the cases are one data set.
        foreground: probability that a box which may lie anywhere is drawn around a voxel that shows something
            (Case.foreground): that voxel lies in the middle half of the box, as far as the volume allows.
    Raises: UserError for a specification that cannot be met, or where no case is large enough.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        spec: ViewSpec,
        seed: int,
        *,
        global_batch: int,
        crops_per_visit: int = 1,
        groups: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
        foreground: float = 0.0,
    ) -> None:
        check_spec(spec)
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: expected a whole number from 0 to 2^64 - 1")
        for what, count in {"global batch": global_batch, "crops per visit": crops_per_visit}.items():
            if not 1 <= count < 2**31:
                raise UserError(f"{what} {count}: expected at least 1, and less than 2^31")
        if not 0 <= foreground <= 1:
            raise UserError(f"foreground {foreground}: expected a probability from 0 to 1")
        self.spec, self.seed, self.global_batch = spec, seed, global_batch
        try:
            declared = native().ViewSpec(spec)
            self.cases, self.excluded = _plannable(cases, spec, declared)
            numbers, shares = _mixture(self.cases, groups or {}, weights)
            self._same_set = [[i for i, n in enumerate(numbers) if n == number] for number in range(len(shares))]
            self._set_of = numbers
            intensities = [[case.intensity[key] for key in ("low", "high", "background")] for case in self.cases]
            shapes = [case.shape for case in self.cases]
            places = _places(self.cases, foreground)
            self._native = native().Planner(
                declared, shapes, intensities, numbers, shares, seed, global_batch, crops_per_visit, foreground, places
            )
        except ValueError as error:
            raise UserError(str(error)) from None

    def plan(self, step: int, slot: int, split: str = "train", *, without: Collection[int] = ()) -> Plan:
        """Any thread may ask, in any order, and others run meanwhile.

        `without`: cases that this slot cannot read. Dealt one of them it takes another of the same data set: the first
        that is not among them in an order keyed by (seed, split, step, slot), whatever came to light when.

        Raises: UserError where no case is left.
        """
        if not (0 <= step < 2**32 and 0 <= slot < 2**32):
            raise UserError(f"step {step}, slot {slot}: expected whole numbers from 0 to 2^32 - 1")
        plan = self._native.plan(step, slot, split)
        if plan.case_index in without:
            plan = self._native.plan_of(
                self._substitute(plan.case_index, step, slot, split, without), step, slot, split
            )
        return Plan.of(plan)

    def _substitute(self, case: int, step: int, slot: int, split: str, without: Collection[int]) -> int:
        others = self._same_set[self._set_of[case]]
        for place in self.generator(split, step, slot, "substitute").permutation(len(others)):
            if others[place] not in without:
                return others[place]
        raise UserError(
            f"none of the {len(others)} volumes of a data set can be read any more; check the store with "
            "`voxtrast prepare --check STORE`"
        )

    def generator(self, split: str, step: int, slot: int, purpose: str) -> np.random.Generator:
        """numpy's, for what is drawn in Python: of each (seed, split, step, slot, purpose) another one."""
        key = np.array([self.seed, _word(split)], np.uint64)
        counter = np.array([0, _word(purpose), slot, step], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _plannable(cases: Sequence[Case], spec: ViewSpec, declared: Any) -> tuple[list[Case], list[tuple[Case, str]]]:
    """Of the cases that are large enough for the crop, those that every view's box can be drawn in."""
    large, excluded = usable_cases(cases, spec.crop)
    reasons = native().unusable(declared, [case.shape for case in large])
    excluded = excluded + [(case, f"{case.id}: {why}") for case, why in zip(large, reasons, strict=True) if why]
    usable = [case for case, why in zip(large, reasons, strict=True) if not why]
    if not usable:
        raise UserError(
            f"none of {len(large)} volumes holds the boxes of the views as they are declared; the first: {reasons[0]}; "
            "change the boxes, or take larger volumes"
        )
    return usable, excluded


def _mixture(
    cases: Sequence[Case], groups: Mapping[str, str], weights: Mapping[str, float] | None
) -> tuple[list[int], list[float]]:
    """The number of each case's data set and the weights of the data sets, in the order of their names."""
    if weights is None:
        return [0] * len(cases), [1.0]
    names = sorted(weights)
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(f"weight of data set {name!r} is {weight}; expected a positive number, or leave it out")
    for case in cases:
        if groups.get(case.id) not in weights:
            raise UserError(
                f"case {case.id}: its data set {groups.get(case.id)!r} has no weight; expected one of {names}"
            )
    for name in names:
        if name not in {groups[case.id] for case in cases}:
            raise UserError(f"data set {name!r} has a weight and no usable case; leave it out, or prepare volumes")
    return [names.index(groups[case.id]) for case in cases], [float(weights[name]) for name in names]


def _places(cases: Sequence[Case], foreground: float) -> list[list[list[int]]]:
    if foreground <= 0:
        return [[]] * len(cases)
    for case in cases:
        if not case.foreground:
            raise UserError(
                f"sampling.foreground {foreground}: the index does not say where case {case.id} shows something (it "
                "was prepared by an older version); prepare into a new folder, or set it to 0"
            )
    return [case.places for case in cases]


def _word(text: str) -> int:
    """64 bits that stand for a name, the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
