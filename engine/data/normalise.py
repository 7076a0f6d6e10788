"""Intensity and grid: what turns values as a scanner wrote them into values that a network takes."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .headers import check_finite
from .rejection import RejectedError

CT_WINDOW_HU = (-1000.0, 1000.0)
MR_PERCENTILES = (0.5, 99.5)
SAME_SPACING = 1e-3  # relative; below this an axis is left alone
MOST_VOXELS = 2**30
FWHM_PER_SIGMA = 2.3548  # of a Gaussian: 2 sqrt(2 ln 2)
SAME_WEIGHT = 1e-4  # two classes whose linear weights differ by less tie: headers round spacings to float32
FEWEST_VALUES = 17  # of an image of whole numbers; with less it is taken for a label map


def check_values(values: np.ndarray) -> None:
    """Reject values that are not numbers, volumes with one value only, and what looks like a label map."""
    if values.dtype.kind == "f":
        check_finite(values)
    if (low := values.min()) == values.max():
        raise RejectedError(f"constant: every voxel is {low:g}", "remove the file; there is nothing to learn from it")
    if low >= 0 and (distinct := _few_whole_numbers(values)):
        reason = f"looks like a label map: {distinct} different values, all of them whole numbers from 0 up"
        remedy = "name it NAME_label beside its image NAME or put it into labels/, else remove it"
        raise RejectedError(reason, remedy)


def _few_whole_numbers(values: np.ndarray) -> int:
    """How many different values there are, where they are few and whole numbers; else 0."""
    flat = values.reshape(-1)
    if np.unique(flat[:: max(1, flat.size // 4096)]).size >= FEWEST_VALUES:  # almost every image ends here
        return 0
    found = np.unique(flat)
    return found.size if found.size < FEWEST_VALUES and np.array_equal(found, np.rint(found)) else 0


def guess_modality(values: np.ndarray) -> str:
    """ "ct" where the values look like Hounsfield units, else "mr".

    CT: at least 1 % of the voxels are air or lung (-1100 to -800 HU), at least 10 % soft tissue (-200 to 300 HU), and
    below -1100 HU there is nothing but at most one padding value (scanners write -2000, -2048 or -3024 outside their
    circle). Air is noisy: where the smallest value alone lies in its range, but for 0.1 % of the voxels, it is padding
    and not air (MR padded with a flat -1000 or -1024). Magnitude MR has no such negative values; phase maps (-4096 to
    4095) fail the last rule, difference images (around 0) the first. A CT that was cropped until no air is left, or
    shifted away from HU, is taken for MR: that is what the setting `modality` is for.
    """
    total = values.size
    airy = values[(values >= -1100) & (values <= -800)]
    air = airy.size
    varied = np.count_nonzero(airy != airy.min()) if air else 0
    tissue = np.count_nonzero((values >= -200) & (values <= 300))
    below = values[values < -1100]
    padding = np.count_nonzero(below == below.min()) if below.size else 0
    rest = below.size - padding
    inside = total - padding
    is_air = air >= 0.01 * inside and varied >= 0.001 * inside
    return "ct" if is_air and tissue >= 0.1 * inside and rest <= 0.01 * inside else "mr"


def normalise(values: np.ndarray, modality: str) -> np.ndarray:
    """(D, H, W) float32 of the same shape.

    ct: clipped to [-1000, 1000] HU and divided by 1000, so that air is -1, water 0, and units are the same everywhere.
    mr: clipped to the 0.5 and 99.5 percentile of the foreground, then (x - mean) / standard deviation of it. MR units
    are arbitrary (maxima of one dataset run from 4 to 1.7 million), hence per volume. The foreground is everything
    except a flat background: the smallest value, where at least 1 % of the voxels have it (skull-stripped or padded
    volumes); elsewhere it is the whole volume.
    """
    if modality == "ct":
        low, high = CT_WINDOW_HU
        clipped = np.clip(values.astype(np.float32), low, high)
        if clipped.min() == clipped.max():
            raise RejectedError(f"constant within the CT window of {low:g} to {high:g} HU", "prepare it as modality mr")
        return clipped / np.float32(high)
    values = values.astype(np.float64) if values.dtype.itemsize > 4 else values.astype(np.float32)
    minimum = values.min()
    background = values == minimum
    foreground = values[~background] if np.count_nonzero(background) >= 0.01 * values.size else values
    low, high = (float(each) for each in np.percentile(foreground, MR_PERCENTILES))
    if not low < high:
        reason = f"nearly constant: 99 % of the voxels above the background are {low:g}"
        raise RejectedError(reason, "remove the file; there is nothing to learn from it (is it a mask?)")
    clipped = np.clip(foreground, low, high)
    mean, deviation = float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64))
    return ((np.clip(values, low, high) - mean) / deviation).astype(np.float32)


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


def resample_image(values: np.ndarray, grid: Grid) -> np.ndarray:
    """(D, H, W) float32 on the new grid: low-pass along coarser axes, then cubic splines.

    Along an axis that gets coarser by a factor r, voxels are widened to the new size first: a Gaussian whose variance
    is the difference of the two voxels' point spread functions, taken as Gaussians of one voxel full width at half
    maximum: sigma = 0.425 sqrt(r^2 - 1) old voxels (Cardoso et al., Scale factor point spread function matching, 2015).
    It goes to zero with r -> 1, so there is no threshold.
    Cubic and not linear: linear interpolation smooths between old voxels and not on them, a pattern that repeats over
    the volume and tells a network where it is. Overshoot is cut to the range of the input.
    """
    if grid.same:
        return values
    widths = [np.sqrt(max(each**2 - 1, 0.0)) / FWHM_PER_SIGMA for each in grid.ratio]
    if any(widths):
        values = ndimage.gaussian_filter(values, widths, mode="nearest", truncate=3.0)
    low, high = values.min(), values.max()
    splines = ndimage.spline_filter(values, order=3, output=np.float32, mode="mirror")
    result = ndimage.affine_transform(
        splines, np.array(grid.ratio), grid.offset, grid.shape, np.float32, order=3, mode="mirror", prefilter=False
    )
    return np.clip(result, low, high)


def resample_label(values: np.ndarray, grid: Grid) -> np.ndarray:
    """(D, H, W) of the same type on the new grid, each voxel the class with the largest linear weight there.

    That is the nearest old voxel without its bias: between two old voxels (every second new voxel at a ratio of 1.5,
    all of them at 2) the nearest one is always on the same side, which shifts labels by up to half a voxel against
    the image. Classes of equal weight take turns, as black and white on a chessboard, so that none of them grows.
    Class 0 counts as any other. One class at a time, and only where it is: memory is that of two float32 volumes.
    """
    if grid.same:
        return values
    odd = sum(np.ogrid[tuple(slice(0, count) for count in grid.shape)]) % 2 == 1
    margin = np.where(odd, np.float32(-SAME_WEIGHT), np.float32(SAME_WEIGHT))
    largest = np.zeros(grid.shape, np.float32)
    result = np.zeros(grid.shape, values.dtype)
    boxes: list[tuple[slice, ...] | None] = [tuple(slice(0, length) for length in values.shape)]
    boxes += ndimage.find_objects(values)  # from class 1 on
    for number, box in enumerate(boxes):
        if box is not None:
            where, weight = _linear_weight(values, number, box, grid)
            ahead = weight > largest[where] + margin[where]
            ahead &= weight > SAME_WEIGHT
            result[where][ahead] = number
            np.maximum(largest[where], weight, out=largest[where])
    return result


def _linear_weight(
    values: np.ndarray, number: int, box: tuple[slice, ...], grid: Grid
) -> tuple[tuple[slice, ...], np.ndarray]:
    """The weight of a class that lies inside `box`, float32, and the part of the new grid that it reaches."""
    source, where, offset = [], [], []
    for side, length, count, ratio, first in zip(box, values.shape, grid.shape, grid.ratio, grid.offset, strict=True):
        source.append(slice(max(side.start - 1, 0), min(side.stop + 1, length)))
        start = max(int(np.ceil((side.start - 1 - first) / ratio)), 0)
        where.append(slice(start, max(min(int(np.floor((side.stop - first) / ratio)) + 1, count), start)))
        offset.append(first + start * ratio - source[-1].start)
    shape = tuple(side.stop - side.start for side in where)
    if 0 in shape:  # between two new voxels
        return tuple(where), np.zeros(shape, np.float32)
    mask = values[tuple(source)] == number
    weight = ndimage.affine_transform(
        mask, np.array(grid.ratio), offset, shape, np.float32, order=1, mode="nearest", prefilter=False
    )
    return tuple(where), weight


def describe(stored: np.ndarray) -> dict[str, float]:
    """Intensity statistics of a stored volume, as the index keeps them."""
    values = stored.astype(np.float32)
    low, high = np.percentile(values, MR_PERCENTILES)
    return {
        "background": float(values.min()),
        "low": float(low),
        "high": float(high),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
    }
