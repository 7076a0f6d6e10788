"""From the store's grid back to that of the file: probabilities, not labels, and one class at a time.

A label resampled by nearest voxels has the staircase of the store's voxels in it, and where the file's are finer it is
wrong by up to half a store voxel; the border of linearly resampled probabilities lies where it lies in the network's
own output. They are sampled at the file's voxel centres without a low-pass: where its slices are thick, a label of the
slice says what is at its centre.
"""

import numpy as np

from ..data.resampling import Grid, resample_image


def back_to(shape: tuple[int, ...], grid: Grid) -> Grid:
    """The grid of `shape` that `grid` was made from, seen from `grid`."""
    pairs = zip(grid.offset, grid.ratio, strict=True)
    return Grid(shape, tuple(1 / ratio for ratio in grid.ratio), tuple(-offset / ratio for offset, ratio in pairs))


def most_probable(probabilities: np.ndarray, shape: tuple[int, ...], grid: Grid) -> np.ndarray:
    """Class indices on the grid of the file.

    Args:
        probabilities: (classes, d, h, w) float32 on the store's grid; their sum over classes is 1.
        shape: (D, H, W) of the file's volume.
        grid: the store's, seen from the file's.

    Returns: (D, H, W) uint8, uint16 for more than 256 classes. Of equal probabilities the lower class counts.

    Memory: that of four volumes of the file's size in float32, whatever the number of classes.
    """
    back, classes = back_to(shape, grid), len(probabilities)
    result = np.zeros(shape, np.uint8 if classes <= 256 else np.uint16)
    largest = np.zeros(shape, np.float32)
    for index, probability in enumerate(probabilities):
        if probability.max() * classes < 0.999:  # somewhere another is above 1 / classes wherever this one is below
            continue
        values = resample_image(probability, back, order=1, low_pass=False)
        result[values > largest] = index
        np.maximum(largest, values, out=largest)
    return result
