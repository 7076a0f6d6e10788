"""The arithmetic of views, in float64 and without randomness: affine maps, boxes of voxels, separable tables.

Everything is in voxel indices, axes ordered (D, H, W) or (H, W): index 0 is the centre of the first voxel. An affine
is a (D, D+1) array that takes an index p of the crop to the index p + psi(p) at which the moving crop is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Box:
    """Voxels lower <= index < upper, in indices of a volume; may reach beyond it."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))
