"""Intensity: what turns values as a scanner wrote them into values that a network takes."""

import numpy as np

from .headers import check_finite
from .rejection import RejectedError

CT_WINDOW_HU = (-1000.0, 1000.0)
MR_PERCENTILES = (0.5, 99.5)
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
    if values.dtype.itemsize > 2:
        values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32, copy=False)
    minimum = values.min()
    background = values == minimum
    foreground = values[~background] if np.count_nonzero(background) >= 0.01 * values.size else values
    low, high = percentiles(foreground, MR_PERCENTILES)
    if not low < high:
        reason = f"nearly constant: 99 % of the voxels above the background are {low:g}"
        raise RejectedError(reason, "remove the file; there is nothing to learn from it (is it a mask?)")
    exact = np.float64 if values.dtype.itemsize > 4 else np.float32
    clipped = np.clip(foreground.astype(exact, copy=False), low, high)
    mean, deviation = float(clipped.mean(dtype=np.float64)), float(clipped.std(dtype=np.float64))
    result = np.clip(values.astype(exact, copy=False), low, high)
    result -= mean
    result /= deviation
    return result.astype(np.float32, copy=False)


def percentiles(values: np.ndarray, wanted: tuple[float, float]) -> tuple[float, float]:
    """As np.percentile, in float64. Values of 16 bits, as scanners and stores have them, are counted, not sorted."""
    if values.dtype.itemsize != 2:
        low, high = np.percentile(values, wanted)
        return float(low), float(high)
    counts = np.bincount(np.ascontiguousarray(values).reshape(-1).view(np.uint16), minlength=2**16)
    present = np.flatnonzero(counts)
    numbers = present.astype(np.uint16).view(values.dtype).astype(np.float64)
    order = np.argsort(numbers, kind="stable")
    numbers, last = numbers[order], np.cumsum(counts[present][order]) - 1  # the rank of the last of equal values
    result = []
    for each in wanted:
        place = each / 100 * (values.size - 1)
        below, above = (numbers[np.searchsorted(last, rank)] for rank in (np.floor(place), np.ceil(place)))
        result.append(float(below + (above - below) * (place - np.floor(place))) + 0.0)  # no negative zero
    return result[0], result[1]


def describe(stored: np.ndarray) -> dict[str, float]:
    """Intensity statistics of a stored volume, as the index keeps them."""
    values = stored.astype(np.float32)
    low, high = percentiles(stored, MR_PERCENTILES)
    return {
        "background": float(values.min()),
        "low": low,
        "high": high,
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
    }
