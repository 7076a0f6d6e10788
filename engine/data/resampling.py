"""The grid of a store and how a volume gets onto it: one small matrix along each axis.

On a grid along the axes of the input, low-pass, spline prefilter and sampling are all linear and all work axis by axis.
Their product is a banded matrix of (new, old) voxels, and resampling is three matrix products: the work that processors
do best. Of the matrix only the band is made, block by block: the whole grows with the square of an axis. The array
module, numpy or cupy, is an argument: the same lines run on the CPU and on a GPU.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, ndimage

from .rejection import RejectedError

ORDERS = (0, 1, 3)
SAME_SPACING = 1e-3  # relative; below this an axis is left alone
MOST_VOXELS = 2**30
FWHM_PER_SIGMA = 2.3548  # of a Gaussian: 2 sqrt(2 ln 2)
SAME_WEIGHT = 1e-4  # two classes whose linear weights differ by less tie: headers round spacings to float32
LEAST_WEIGHT = 2.0**-27  # an eighth of float32's rounding: a spline's influence fades to it within 14 old voxels
SPLINE_REACH = 28  # old voxels; what lies beyond would not change the weights in float64
BLOCK = 32  # new voxels whose weights are computed and multiplied together, fewer where they would span more than
MOST_SPANNED = 128  # old ones


@dataclass(frozen=True)
class Band:
    """What each of the `length` old voxels of an axis adds to each of the `count` new ones, as far as it adds anything.

    The blocks are (rows, columns, weights): new voxels, all the old ones that reach any of them, and float32 for each
    pair. Together the rows are all new voxels.
    """

    count: int
    length: int
    blocks: list[tuple[slice, slice, np.ndarray]]

    def of(self, side: slice) -> tuple[slice, "Band"] | None:
        """The new voxels that old ones in `side` reach, with their weights of these alone; None if there are none."""
        cut = []
        for rows, columns, weights in self.blocks:
            start = max(columns.start, side.start)
            stop = max(start, min(columns.stop, side.stop))
            part = weights[:, start - columns.start : stop - columns.start]
            cut.append((rows, slice(start - side.start, stop - side.start), part))
        reached = np.concatenate([rows.start + np.flatnonzero(part.any(axis=1)) for rows, _, part in cut])
        if not reached.size:
            return None
        first, last = int(reached[0]), int(reached[-1]) + 1
        blocks = [
            (slice(max(rows.start, first) - first, min(rows.stop, last) - first), columns,
             part[max(first - rows.start, 0) : last - rows.start])
            for rows, columns, part in cut if rows.start < last and rows.stop > first
        ]  # fmt: skip
        return slice(first, last), Band(last - first, side.stop - side.start, blocks)


@dataclass(frozen=True)
class Grid:
    """An output grid: voxel p of it lies at p * ratio + offset in voxels of the input. All fields are (D, H, W)."""

    shape: tuple[int, ...]
    ratio: tuple[float, ...]
    offset: tuple[float, ...]

    @property
    def same(self) -> bool:
        return all(each == 1.0 for each in self.ratio)

    def affine(self, affine: np.ndarray) -> np.ndarray:
        """The (4, 4) affine of this grid, from that of the input."""
        change = np.diag([*self.ratio, 1.0])
        change[:3, 3] = self.offset
        return affine @ change


def isotropic_grid(shape: tuple[int, ...], spacing_mm: np.ndarray, target_mm: float) -> Grid:
    """The grid of `target_mm` that shares the centre of the input and keeps within its outermost voxel centres.

    Within, so that every value is interpolated and none invented; what is lost at a side is less than half of a new
    voxel plus half of an old one. An axis whose spacing is within 0.1 % of the target stays as it is.
    """
    ratio, count, offset = [], [], []
    for length, spacing in zip(shape, spacing_mm, strict=True):
        each = float(target_mm / spacing)
        each = 1.0 if abs(each - 1) <= SAME_SPACING else each
        ratio.append(each)
        count.append(int(np.floor((length - 1) / each + 1e-6)) + 1)
        offset.append(((length - 1) - (count[-1] - 1) * each) / 2)
    return Grid(tuple(count), tuple(ratio), tuple(offset))


def check_grid(grid: Grid, minimum_size_voxels: int, spacing_mm: np.ndarray, target_mm: float) -> None:
    """Reject a volume that is too small to cut a crop from, or too large to be true."""
    shown = " x ".join(str(each) for each in grid.shape)
    own = " x ".join(f"{each:.3g}" for each in spacing_mm)
    if min(grid.shape) < minimum_size_voxels:
        size = f"{shown} voxels (D, H, W) at {target_mm:g} mm"
        reason = f"too small: {size}, at least {minimum_size_voxels} were expected"
        remedy = f"prepare with a finer spacing (its own is {own} mm) or a smaller minimum size, or remove it"
        raise RejectedError(reason, remedy)
    if float(np.prod(grid.shape, dtype=np.float64)) > MOST_VOXELS:
        reason = f"too large: {shown} voxels (D, H, W) at {target_mm:g} mm, its own spacing is {own} mm"
        raise RejectedError(reason, "correct the spacing in its header, or prepare with a coarser spacing")


def resample_image(
    values: np.ndarray, grid: Grid, *, order: int = 3, low_pass: bool = True, xp: Any = np
) -> np.ndarray:
    """(D, H, W) float32 on the new grid: low-pass along coarser axes, then splines of an order.

    Along an axis that gets coarser by a factor r, voxels are widened to the new size first: a Gaussian whose variance
    is the difference of the two voxels' point spread functions, taken as Gaussians of one voxel full width at half
    maximum: sigma = 0.425 sqrt(r^2 - 1) old voxels (Cardoso et al., Scale factor point spread function matching, 2015).
    It goes to zero with r -> 1, so there is no threshold.
    Cubic and not linear: linear interpolation smooths between old voxels and not on them, a pattern that repeats over
    the volume and tells a network where it is. Overshoot is cut to the range of the input.

    Args:
        values: (D, H, W) float32.
        order: 3, 1, or 0: the nearest voxel, without low-pass and so with the file's own values.
        low_pass: False samples the splines alone, as most other programs do.
        xp: the array module that computes, numpy or cupy; the result is numpy's.
    """
    if grid.same:
        return values
    if order == 0:
        nearest = [
            _taps(*axis, 0)[0][0] for axis in zip(values.shape, grid.shape, grid.ratio, grid.offset, strict=True)
        ]
        return values[np.ix_(*nearest)]
    axes = zip(values.shape, grid.shape, grid.ratio, grid.offset, strict=True)
    bands = [None if ratio == 1 else axis_weights(n, count, ratio, offset, order, low_pass)
             for n, count, ratio, offset in axes]  # fmt: skip
    device = xp.asarray(values)
    result = _multiplied(device, bands, xp)
    return to_host(xp.clip(result, device.min(), device.max(), out=result), xp)


def to_host(array: Any, xp: Any) -> np.ndarray:
    return array if xp is np else xp.asnumpy(array)


def axis_weights(length: int, count: int, ratio: float, offset: float, order: int, low_pass: bool = False) -> Band:
    """Low-pass, spline prefilter and sampling along an axis, as one."""
    taps = _taps(length, count, ratio, offset, order)
    width = float(np.sqrt(ratio**2 - 1)) / FWHM_PER_SIGMA if low_pass and ratio > 1 else 0.0
    together = max(1, min(BLOCK, int(MOST_SPANNED / ratio)))
    blocks = []
    for start in range(0, count, together):
        rows = slice(start, min(start + together, count))
        first, weights = _block([(index[rows], factor[rows]) for index, factor in taps], length, order, width)
        used = np.flatnonzero((np.abs(weights) > LEAST_WEIGHT).any(axis=0))
        columns = slice(first + int(used[0]), first + int(used[-1]) + 1)
        blocks.append((rows, columns, weights[:, used[0] : used[-1] + 1].astype(np.float32)))
    return Band(count, length, blocks)


def _block(taps: list[tuple[np.ndarray, np.ndarray]], length: int, order: int, width: float) -> tuple[int, np.ndarray]:
    """(rows, old voxels) float64 of the new voxels with these taps, and the first of the old ones.

    Of all three steps the transposes are applied to the rows, last step first: no step needs more than the old voxels
    around these rows.
    """
    reach = SPLINE_REACH if order == 3 else 0
    low = max(min(int(index.min()) for index, _ in taps) - reach, 0)
    high = min(max(int(index.max()) for index, _ in taps) + reach, length - 1)
    weights = np.zeros((len(taps[0][0]), high - low + 1))
    for index, factor in taps:
        weights[np.arange(len(index)), index - low] += factor
    if order == 3 and length > 1:
        weights = _prefiltered(weights)
    if width > 0:
        radius = int(3.0 * width + 0.5)  # as gaussian_filter1d has it
        weights = np.pad(weights, ((0, 0), (radius, radius)))
        weights = ndimage.gaussian_filter1d(weights, width, axis=1, mode="constant", truncate=3.0)
        low, high = low - radius, high + radius
        if low < 0:  # beyond the ends the outermost voxel is repeated
            weights[:, -low] += weights[:, :-low].sum(axis=1)
            weights, low = weights[:, -low:], 0
        if (beyond := high - (length - 1)) > 0:
            weights[:, -beyond - 1] += weights[:, -beyond:].sum(axis=1)
            weights = weights[:, :-beyond]
    return low, weights


def _prefiltered(weights: np.ndarray) -> np.ndarray:
    """Weights of cubic B-splines, (rows, voxels), turned into weights of the voxels that they go through.

    Values are (1 4 1) / 6 of the coefficients around them, mirrored at the ends: solved for the transpose of that.
    """
    band = np.full((3, weights.shape[1]), 1 / 6)
    band[1] = 4 / 6
    band[0, -1] = band[2, 0] = 2 / 6
    solved: np.ndarray = linalg.solve_banded((1, 1), band, weights.T).T
    return solved


def _taps(length: int, count: int, ratio: float, offset: float, order: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(index, factor) of each spline coefficient that a new voxel reads, both (count,); mirrored at the ends."""
    place = np.arange(count) * ratio + offset
    below = np.floor(place + 0.5 if order == 0 else place).astype(np.int64)
    t = place - below
    if order == 0:
        factors = [np.ones(count)]
    elif order == 1:
        factors = [1 - t, t]
    else:
        middle = [(4 - 6 * u**2 + 3 * u**3) / 6 for u in (t, 1 - t)]
        factors = [(1 - t) ** 3 / 6, *middle, t**3 / 6]
    first = -1 if order == 3 else 0
    indices = [np.abs(below + first + number) for number in range(len(factors))]
    last = length - 1
    return [(np.clip(last - np.abs(last - index), 0, last), each) for index, each in zip(indices, factors, strict=True)]


def _multiplied(values: Any, bands: list[Band | None], xp: Any) -> Any:
    """Each axis multiplied by its (new, old) matrix, in float32; the one that shrinks most comes first."""
    steps = [(axis, band) for axis, band in enumerate(bands) if band is not None]
    for axis, band in sorted(steps, key=lambda step: step[1].count / step[1].length):
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        result = xp.empty((*before, band.count, *after), np.float32)
        # All axes before the last as rows, or all behind the first as columns: large products instead of many small.
        old = values.reshape(-1, band.length) if not after else values.reshape(*before, band.length, -1)
        new = result.reshape(-1, band.count) if not after else result.reshape(*before, band.count, -1)
        for rows, columns, weights in band.blocks:
            part = xp.asarray(np.ascontiguousarray(weights))
            if after:
                xp.matmul(part, old[..., columns, :], out=new[..., rows, :])
            else:
                xp.matmul(old[:, columns], part.T, out=new[:, rows])
        values = result
    return values


def resample_label(values: np.ndarray, grid: Grid, *, xp: Any = np) -> np.ndarray:
    """(D, H, W) of the same type on the new grid, each voxel the class with the largest linear weight there.

    That is the nearest old voxel without its bias: between two old voxels (every second new voxel at a ratio of 1.5,
    all of them at 2) the nearest one is always on the same side, which shifts labels by up to half a voxel against
    the image. Classes of equal weight take turns, as black and white on a chessboard, so that none of them grows.
    Class 0 counts as any other. One class at a time, and only where it is: memory is that of a few float32 volumes.
    """
    if grid.same:
        return values
    axes = zip(values.shape, grid.shape, grid.ratio, grid.offset, strict=True)
    bands = [axis_weights(*axis, order=1) for axis in axes]
    odd = sum(np.ogrid[tuple(slice(0, count) for count in grid.shape)]) % 2 == 1
    margin = xp.asarray(np.where(odd, np.float32(-SAME_WEIGHT), np.float32(SAME_WEIGHT)))
    largest = xp.zeros(grid.shape, np.float32)
    result = xp.zeros(grid.shape, values.dtype)
    boxes: list[tuple[slice, ...] | None] = [tuple(slice(0, length) for length in values.shape)]
    boxes += ndimage.find_objects(values)  # from class 1 on
    for number, box in enumerate(boxes):
        if box is None:
            continue
        inside = [found for band, side in zip(bands, box, strict=True) if (found := band.of(side)) is not None]
        if len(inside) < 3:  # between two new voxels
            continue
        where = tuple(rows for rows, _ in inside)
        mask = xp.asarray((values[box] == number).astype(np.float32))
        weight = _multiplied(mask, [band for _, band in inside], xp)
        ahead = weight > largest[where] + margin[where]
        ahead &= weight > SAME_WEIGHT
        result[where][ahead] = number
        xp.maximum(largest[where], weight, out=largest[where])
    return to_host(result, xp)
