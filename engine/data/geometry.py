"""Boxes of voxels. Axes are ordered (D, H, W) or (H, W); index 0 is the centre of the first voxel."""

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
