"""What every view will be: the case, the crop, the affine and the appearance of each slot, decided by arithmetic.

A number drawn here depends on (seed, split, step, slot, view) and, for one version of numpy and DALI on one kind of
machine, on nothing else: each draw starts a Philox counter of its own at those coordinates (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011). So the step number is the only state of the data, whatever the ranks,
threads, prefetching or restarts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...methods.views import AffineRanges, AppearanceRanges, View, ViewSpec
from ..errors import UserError
from .geometry import Array, compose_affine, identity_affine
from .store import Case

RESERVED_NAMES = ("displacement", "mask", "affine", "case", "origin")


@dataclass(frozen=True)
class AppearancePlan:
    """Numbers of one change of intensity; amplitudes are fractions of the case's intensity range."""

    noise_std: float
    blur_sigma_voxels: float
    contrast: float
    brightness: float
    box_start: NDArray[np.int64]  # (boxes, D); rows that were not drawn have size 0
    box_size: NDArray[np.int64]  # (boxes, D)


@dataclass(frozen=True)
class ViewPlan:
    affine: Array  # (D, D+1): crop index p -> p + psi(p)
    appearance: AppearancePlan | None


@dataclass(frozen=True)
class Plan:
    """Everything random about one slot of one step, but for the fields of noise (see `Planner.generator`)."""

    step: int
    slot: int
    split: str
    case_index: int  # into Planner.cases
    origin: tuple[int, int, int]  # first voxel of the crop in the volume; negative where the crop is padded
    views: dict[str, ViewPlan]


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
        cases: those of one split; the ones too small for the crop are left out, see `excluded`.
        spec: the views.
        seed: 0 <= seed < 2^64.
        global_batch: slots a step, over all ranks and accumulated micro batches.
    Raises: UserError for a specification that cannot be met, or where no case is large enough.
    """

    def __init__(self, cases: Sequence[Case], spec: ViewSpec, seed: int, *, global_batch: int) -> None:
        check_spec(spec)
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: expected a whole number from 0 to 2^64 - 1")
        if global_batch < 1:
            raise UserError(f"global batch {global_batch}: expected at least 1")
        self.cases, self.excluded = usable_cases(cases, spec.crop)
        self.spec, self.seed, self.global_batch = spec, seed, global_batch
        self._order: tuple[tuple[str, int], NDArray[np.int64]] = (("", -1), np.empty(0, np.int64))

    def generator(self, split: str, step: int, slot: int, stream: str) -> np.random.Generator:
        """A generator of its own for each (seed, split, step, slot, stream); 2^64 blocks apart from every other."""
        key = np.array([self.seed, _word(split)], np.uint64)
        return np.random.Generator(
            np.random.Philox(key=key, counter=np.array([0, _word(stream), slot, step], np.uint64))
        )

    def plan(self, step: int, slot: int, split: str = "train") -> Plan:
        case_index = self._deal(step * self.global_batch + slot, split)
        shape, crop = self.cases[case_index].shape, self.spec.crop
        place = self.generator(split, step, slot, "origin")
        # A 2-D crop is a crop of one voxel along the first axis.
        sides = (1,) * (3 - len(crop)) + tuple(crop)
        origin = tuple(_start(place, size, side) for size, side in zip(shape, sides, strict=True))
        views = {
            name: self._draw_view(view, self.generator(split, step, slot, f"view {name}"))
            for name, view in self.spec.views.items()
        }
        return Plan(step, slot, split, case_index, (origin[0], origin[1], origin[2]), views)

    def _deal(self, position: int, split: str) -> int:
        epoch, index = divmod(position, len(self.cases))
        key, order = self._order
        if key != (split, epoch):
            order = self.generator(split, epoch, 0, "order of an epoch").permutation(len(self.cases))
            self._order = ((split, epoch), order)  # replaced as a whole: threads may plan side by side
        return int(order[index])

    def _draw_view(self, view: View, generator: np.random.Generator) -> ViewPlan:
        crop = self.spec.crop
        affine = identity_affine(len(crop)) if view.affine is None else _draw_affine(view.affine, crop, generator)
        appearance = None if view.appearance is None else _draw_appearance(view.appearance, crop, generator)
        return ViewPlan(affine, appearance)


def check_spec(spec: ViewSpec) -> None:
    """Raises: UserError naming the first part of the specification that cannot be met."""
    if len(spec.crop) not in (2, 3) or any(side < 1 for side in spec.crop):
        raise UserError(f"crop {tuple(spec.crop)}: expected three sides (D, H, W) or two (H, W), each at least 1")
    if not spec.views:
        raise UserError("the view specification names no view; expected at least one")
    for name, view in spec.views.items():
        if name in RESERVED_NAMES:
            raise UserError(f"view {name!r}: the name is taken by the batch itself; choose none of {RESERVED_NAMES}")
        _check_ranges(name, view)
    fields = [name for name, view in spec.views.items() if view.displacement]
    if len(fields) > 1:
        raise UserError(f"views {fields} all ask for a displacement, and a batch holds one; leave it on for one view")


def _check_ranges(name: str, view: View) -> None:
    ranges: list[tuple[str, Sequence[float], float, float]] = []  # name, (low, high), smallest, largest
    if (affine := view.affine) is not None:
        if min(affine.scale) <= 0:
            raise UserError(f"view {name!r}: affine.scale {affine.scale} must be positive")
        ranges.append(("affine.scale", affine.scale, 0.0, np.inf))
        ranges.append(("affine.rotation_degrees", (0.0, affine.rotation_degrees), 0.0, np.inf))
        ranges.append(("affine.shear_degrees", (0.0, affine.shear_degrees), 0.0, 89.0))
        ranges.append(("affine.translation_voxels", (0.0, affine.translation_voxels), 0.0, np.inf))
    if (appearance := view.appearance) is not None:
        ranges.append(("appearance.noise_std", appearance.noise_std, 0.0, np.inf))
        ranges.append(("appearance.blur_sigma_voxels", appearance.blur_sigma_voxels, 0.0, np.inf))
        ranges.append(("appearance.contrast", appearance.contrast, -np.inf, np.inf))
        ranges.append(("appearance.brightness_std", (0.0, appearance.brightness_std), 0.0, np.inf))
        ranges.append(("appearance.boxes", (0, appearance.boxes), 0.0, np.inf))
        ranges.append(("appearance.box_continue", (0.0, appearance.box_continue), 0.0, 1.0))
        ranges.append(("appearance.box_side", appearance.box_side, 0.0, 1.0))
    for what, values, smallest, largest in ranges:
        if len(values) != 2 or not smallest <= values[0] <= values[1] <= largest:
            raise UserError(f"view {name!r}: {what} is {list(values)}; expected low <= high in [{smallest}, {largest}]")


def _draw_affine(ranges: AffineRanges, crop: Sequence[int], generator: np.random.Generator) -> Array:
    dimensions = len(crop)
    pairs = dimensions * (dimensions - 1) // 2  # also the number of rotation angles

    def symmetric(limit: float, count: int) -> Array:
        return limit * generator.uniform(-1, 1, count)

    rotation = symmetric(ranges.rotation_degrees, pairs)
    low, high = np.log(ranges.scale)
    return compose_affine(
        crop,
        rotation_degrees=rotation.tolist(),
        scale=np.exp(generator.uniform(low, high, dimensions)).tolist(),
        shear_degrees=symmetric(ranges.shear_degrees, pairs).tolist(),
        translation_voxels=symmetric(ranges.translation_voxels, dimensions).tolist(),
    )


def _draw_appearance(ranges: AppearanceRanges, crop: Sequence[int], generator: np.random.Generator) -> AppearancePlan:
    noise_std, blur_sigma, contrast = (
        float(generator.uniform(low, high))
        for low, high in (ranges.noise_std, ranges.blur_sigma_voxels, ranges.contrast)
    )
    brightness = float(ranges.brightness_std * generator.standard_normal())
    # All boxes are drawn and the surplus emptied: arrays of one shape, however many boxes there are.
    more = generator.random(ranges.boxes) < ranges.box_continue
    drawn = np.logical_and.accumulate(more)[:, None]
    sides = np.asarray(crop)
    low, high = ranges.box_side
    fraction = generator.uniform(low, high, (ranges.boxes, len(crop)))
    size = np.rint(fraction * sides).astype(np.int64).clip(1, sides)
    start = generator.integers(0, sides - size, endpoint=True)
    return AppearancePlan(noise_std, blur_sigma, contrast, brightness, start * drawn, size * drawn)


def _start(generator: np.random.Generator, size: int, side: int) -> int:
    """First voxel of the crop on one axis: anywhere inside, or centred where the volume is the smaller one."""
    if size < side:
        return -((side - size) // 2)
    return int(generator.integers(0, size - side, endpoint=True))


def _word(text: str) -> int:
    """64 bits that stand for a name, the same on every machine and in every Python."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
