"""Intensity: what turns values as a scanner wrote them into values that a network takes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .headers import check_finite
from .rejection import RejectedError

CT_WINDOW_HU = (-1000.0, 1000.0)
MR_PERCENTILES = (0.5, 99.5)
PIECE = 2**17
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
    distribution = Distribution.of(foreground)
    low, high = distribution.percentiles(MR_PERCENTILES)
    if not low < high:
        reason = f"nearly constant: 99 % of the voxels above the background are {low:g}"
        raise RejectedError(reason, "remove the file; there is nothing to learn from it (is it a mask?)")
    mean, deviation = distribution.moments(low, high)
    result = np.clip(values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32, copy=False), low, high)
    result -= mean
    result /= deviation
    return result.astype(np.float32, copy=False)


def describe(stored: np.ndarray) -> dict[str, float]:
    """Intensity statistics of a stored volume, as the index keeps them."""
    distribution = Distribution.of(stored)
    low, high = distribution.percentiles(MR_PERCENTILES)
    mean, deviation = distribution.moments(-np.inf, np.inf)
    return {"background": distribution.minimum(), "low": low, "high": high, "mean": mean, "std": deviation}


@dataclass(frozen=True)
class Distribution:
    """Values and how often each of them is there. Those of 16 bits, as scanners and stores have them, are counted once
    and not sorted or added up one by one; all others (`counts` is None) are kept as they are."""

    numbers: np.ndarray
    counts: np.ndarray | None

    @staticmethod
    def of(values: np.ndarray) -> "Distribution":
        flat = np.ascontiguousarray(values).reshape(-1)
        if flat.dtype.itemsize != 2:
            return Distribution(flat, None)
        counts = np.zeros(2**16, np.int64)
        for piece in _pieces(flat.view(np.uint16)):  # bincount makes eight bytes of each
            counts += np.bincount(piece, minlength=2**16)
        present = np.flatnonzero(counts)
        numbers = present.astype(np.uint16).view(flat.dtype).astype(np.float64)
        order = np.argsort(numbers, kind="stable")
        return Distribution(numbers[order], counts[present][order])

    def minimum(self) -> float:
        return float(self.numbers.min()) + 0.0  # no negative zero

    def percentiles(self, wanted: tuple[float, float]) -> tuple[float, float]:
        """As np.percentile, in float64."""
        if self.counts is None:
            low, high = np.percentile(self.numbers, wanted)
            return float(low), float(high)
        last = np.cumsum(self.counts) - 1  # the rank of the last of equal values
        result = []
        for each in wanted:
            place = each / 100 * last[-1]
            ranks = np.searchsorted(last, (np.floor(place), np.ceil(place)))
            below, above = self.numbers[ranks]
            result.append(float(below + (above - below) * (place - np.floor(place))) + 0.0)
        return result[0], result[1]

    def moments(self, low: float, high: float) -> tuple[float, float]:
        """Mean and standard deviation of the values clipped to [low, high], in float64."""
        if self.counts is not None:
            clipped = np.clip(self.numbers, low, high)
            mean = float(np.average(clipped, weights=self.counts))
            return mean, float(np.sqrt(np.average((clipped - mean) ** 2, weights=self.counts)))
        total = sum(float(np.clip(piece, low, high).sum(dtype=np.float64)) for piece in _pieces(self.numbers))
        mean = total / self.numbers.size
        squares = sum(
            float(np.square(np.clip(piece, low, high) - np.float64(mean)).sum()) for piece in _pieces(self.numbers)
        )
        return mean, float(np.sqrt(squares / self.numbers.size))


def _pieces(flat: np.ndarray) -> Iterator[np.ndarray]:
    """The array in parts that a cache holds."""
    return (flat[start : start + PIECE] for start in range(0, flat.size, PIECE))
