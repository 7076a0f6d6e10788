"""The arithmetic of views, in float64 and without randomness: affine maps, boxes of voxels, separable tables.

Everything is in voxel indices, axes ordered (D, H, W) or (H, W): index 0 is the centre of the first voxel. An affine
is a (D, D+1) array that takes an index p of the crop to the index p + psi(p) at which the moving crop is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def affine_of_crop(to_volume: Array, origin: Sequence[int], dimensions: int) -> Array:
    """Of a map (3, 4) into the volume: the affine (D, D+1) into the crop that begins at `origin`."""
    affine = to_volume[-dimensions:, -dimensions - 1 :].copy()
    affine[:, -1] -= origin[-dimensions:]
    return affine


@dataclass(frozen=True)
class Box:
    """Voxels lower <= index < upper, in indices of a volume; may reach beyond it."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))


def sampling_matrix(affine: Array, origin: Sequence[int], region: Box) -> NDArray[np.float32]:
    """The affine as DALI's warp takes it: axes reversed (x, y, z), corner of the first voxel at 0, source = region."""
    linear = affine[::-1, -2::-1]
    offset = (affine[:, -1] + np.asarray(origin) - np.asarray(region.lower))[::-1]
    return np.column_stack([linear, offset + 0.5 - linear.sum(axis=1) * 0.5]).astype(np.float32)


@dataclass(frozen=True)
class FieldTables:
    """A displacement field and its mask as sums of small tables, since an affine field is separable.

    With D axes of sizes (.., H, W):  psi = rows + columns  and  mask = all over axes |position_rows +
    position_columns| <= position_limit, the position being p + psi(p) relative to the middle of what is valid.
    """

    rows: NDArray[np.float32]  # (D, .., H, 1)
    columns: NDArray[np.float32]  # (D, 1.., W)
    position_rows: NDArray[np.float32]  # (D, .., H, 1)
    position_columns: NDArray[np.float32]  # (D, 1.., W)
    position_limit: NDArray[np.float32]  # (D,)


def field_tables(affine: Array, origin: Sequence[int], crop: Sequence[int], volume: Sequence[int]) -> FieldTables:
    """Tables of psi(p) = affine (p, 1) - p in voxels, and of the p whose p + psi(p) lies in the crop and the volume.

    Positions are taken about the centres, where float32 holds the half integers of an identity exactly.
    """
    dimensions, sizes = len(crop), np.asarray(crop, np.float64)
    centre = (sizes - 1) / 2
    excess = affine[:, :-1] - np.eye(dimensions)
    axes = [
        (np.arange(size) - middle).reshape([-1 if other == axis else 1 for other in range(dimensions)])
        for axis, (size, middle) in enumerate(zip(crop, centre, strict=True))
    ]
    shift = excess @ centre + affine[:, -1]
    low = np.maximum(0.0, -np.asarray(origin, np.float64))
    high = np.minimum(sizes, np.asarray(volume, np.float64) - np.asarray(origin)) - 1
    row_shape = (*crop[:-1], 1)
    rows, columns, position_rows, position_columns = [], [], [], []
    for axis in range(dimensions):
        row = np.broadcast_to(sum(excess[axis, j] * axes[j] for j in range(dimensions - 1)) + shift[axis], row_shape)
        column = excess[axis, -1] * axes[-1]
        is_last = axis == dimensions - 1
        rows.append(row)
        columns.append(column)
        middle = centre[axis] - (low[axis] + high[axis]) / 2
        position_rows.append(row + middle + (0.0 if is_last else axes[axis]))
        position_columns.append(column + (axes[axis] if is_last else 0.0))

    def table(parts: list[Array]) -> NDArray[np.float32]:
        return np.stack(parts).astype(np.float32)

    return FieldTables(
        table(rows), table(columns), table(position_rows), table(position_columns), table(list((high - low) / 2))
    )
