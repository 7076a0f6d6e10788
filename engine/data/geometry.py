"""The arithmetic of views, in float64 and without randomness: affine maps, boxes of voxels, separable tables.

Everything is in voxel indices, axes ordered (D, H, W) or (H, W): index 0 is the centre of the first voxel. An affine
is a (D, D+1) array that takes an index p of the crop to the index p + psi(p) at which the moving crop is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# DALI walks along the last axis by adding float32 steps; its coordinates stay within this of the exact ones.
COORDINATE_SLACK = 0.05

Array = NDArray[np.float64]


def identity_affine(dimensions: int) -> Array:
    return np.eye(dimensions, dimensions + 1)


def compose_affine(
    crop: Sequence[int],
    *,
    rotation_degrees: Sequence[float],
    scale: Sequence[float],
    shear_degrees: Sequence[float],
    translation_voxels: Sequence[float],
) -> Array:
    """The affine that rotates, then scales, then shears, then translates about the centre (size - 1) / 2 of the crop.

    Args:
        crop: (D, H, W) or (H, W).
        rotation_degrees: one angle in 2-D; in 3-D one about each axis, applied from the last axis to the first.
        scale: one factor an axis; above 1 the view shows more of the volume, smaller.
        shear_degrees: one angle a pair of axes, ordered (0, 1), (0, 2), (1, 2); the first moves along the second.
        translation_voxels: one shift an axis.
    """
    dimensions = len(crop)
    linear = np.eye(dimensions)
    planes = [(0, 1)] if dimensions == 2 else [(1, 2), (0, 2), (0, 1)]
    for (first, second), angle in reversed(list(zip(planes, np.radians(rotation_degrees), strict=True))):
        rotation = np.eye(dimensions)
        rotation[first, first] = rotation[second, second] = np.cos(angle)
        rotation[first, second], rotation[second, first] = -np.sin(angle), np.sin(angle)
        linear = rotation @ linear
    linear = np.diag(np.asarray(scale, np.float64)) @ linear
    shear = np.eye(dimensions)
    shear[np.triu_indices(dimensions, 1)] = np.tan(np.radians(shear_degrees))
    linear = shear @ linear
    centre = (np.asarray(crop, np.float64) - 1) / 2
    return np.column_stack([linear, centre - linear @ centre + np.asarray(translation_voxels, np.float64)])


@dataclass(frozen=True)
class Box:
    """Voxels lower <= index < upper, in indices of a volume; may reach beyond it."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))

    def union(self, other: "Box") -> "Box":
        return Box(
            tuple(min(pair) for pair in zip(self.lower, other.lower, strict=True)),
            tuple(max(pair) for pair in zip(self.upper, other.upper, strict=True)),
        )


def crop_box(origin: Sequence[int], crop: Sequence[int], volume: Sequence[int]) -> Box:
    """The voxels of a crop, clipped as in `affine_box`."""
    lower = np.asarray(origin)
    return _clip(lower, lower + np.asarray(crop), volume)


def affine_box(affine: Array, origin: Sequence[int], crop: Sequence[int], volume: Sequence[int]) -> Box:
    """The voxels that linear interpolation reads for a crop seen through an affine.

    Beyond the volume one shell of voxels is kept: filled with background and repeated outwards, it is all that a
    sampler with clamped coordinates needs to see background everywhere outside.
    """
    half = (np.asarray(crop, np.float64) - 1) / 2
    centre = affine[:, :-1] @ half + affine[:, -1] + np.asarray(origin)
    reach = np.abs(affine[:, :-1]) @ half + COORDINATE_SLACK
    lower, upper = np.floor(centre - reach), np.floor(centre + reach) + 2
    return _clip(lower.astype(np.int64), upper.astype(np.int64), volume)


def _clip(lower: NDArray[np.int64], upper: NDArray[np.int64], volume: Sequence[int]) -> Box:
    sizes = np.asarray(volume)
    return Box(tuple(np.clip(lower, -1, sizes).tolist()), tuple(np.clip(upper, 0, sizes + 1).tolist()))


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
