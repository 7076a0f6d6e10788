"""Where a volume shows something: places that crops can be drawn around without labels."""

import numpy as np
from numpy.typing import NDArray

PLACES = 64  # a line of the index grows by a kilobyte
VOXELS_LOOKED_AT = 2**20  # on a coarser grid of the volume, where it has more
BINS = 256


def foreground_places(volume: NDArray[np.floating], low: float, high: float) -> list[list[int]]:
    """At most 64 voxels (d, h, w) brighter than Otsu's threshold, evenly spaced in the order of the array.

    Args:
        volume: (D, H, W), not constant.
        low, high: the ends of its intensity range; what lies beyond them is counted with them.
    Source: Otsu, 1979: of all thresholds of a histogram, the one with the largest variance between the two classes.
    """
    if not low < high:  # nearly all of it is background
        low, high = float(volume.min()), float(volume.max())
    stride = max(1, int(np.ceil((volume.size / VOXELS_LOOKED_AT) ** (1 / 3))))
    coarse = np.clip(volume[::stride, ::stride, ::stride].astype(np.float32), low, high)
    bright = np.flatnonzero(coarse > otsu_threshold(coarse, low, high))
    if not bright.size:
        bright = np.flatnonzero(coarse == coarse.max())
    count = min(PLACES, bright.size)
    chosen = bright[((np.arange(count) + 0.5) / count * bright.size).astype(np.int64)]
    found: list[list[int]] = (np.stack(np.unravel_index(chosen, coarse.shape), 1) * stride).tolist()
    return found


def otsu_threshold(values: NDArray[np.floating], low: float, high: float) -> float:
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):  # a class without values has no mean
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1 + np.argmax(np.nan_to_num(between))])
