"""MONAI's array transforms on volumes in memory: one resampling a view that crops, turns, scales and deforms.

Rand3DElastic smooths noise of the size of the view by a Gaussian; its sigma is the lower end of what its tutorials use,
where it is fastest. The two views of a slot lie anywhere.
"""

from typing import Any

import numpy as np
import torch

from .recipe import BRIGHTNESS_STD, CONTRAST, GAMMA, NOISE_STD, ROTATION_DEGREES, SCALE, VIEWS, Volume

SIGMA_VOXELS = (5.0, 7.0)
MAGNITUDE = (100.0, 200.0)  # before smoothing; about a voxel after it


def _transform(volume: Volume, size: int, elastic: bool) -> Any:
    from monai import transforms

    room = [max(side - size, 0) / 2 for side in volume.voxels.shape]
    geometry: dict[str, Any] = {
        "prob": 1.0,
        "rotate_range": [np.radians(ROTATION_DEGREES)] * 3,
        "scale_range": [(SCALE[0] - 1, SCALE[1] - 1)] * 3,
        "translate_range": room,  # which is the crop
        "spatial_size": (size,) * 3,
        "mode": "bilinear",
        "padding_mode": "zeros",
    }
    shift = BRIGHTNESS_STD * volume.span
    return transforms.Compose(
        [
            transforms.Rand3DElastic(SIGMA_VOXELS, MAGNITUDE, **geometry)
            if elastic
            else transforms.RandAffine(**geometry),
            *(transforms.RandFlip(0.5, axis) for axis in range(3)),
            transforms.RandAdjustContrast(1.0, GAMMA),
            transforms.RandShiftIntensity((-2 * shift, 2 * shift), prob=1.0),
            transforms.RandScaleIntensityFixedMean(1.0, (CONTRAST[0] - 1, CONTRAST[1] - 1), preserve_range=False),
            transforms.RandGaussianNoise(1.0, std=NOISE_STD[1] * volume.span),
        ]
    )


class SlotMaker:
    def __init__(self, volumes: list[Volume], size: int, *, elastic: bool = True) -> None:
        from monai.data import set_track_meta

        set_track_meta(False)  # nobody asks for it here, and it takes time
        self._volumes = [torch.from_numpy(volume.voxels)[None] for volume in volumes]
        self._transforms = [_transform(volume, size, elastic) for volume in volumes]

    def __call__(self, generator: np.random.Generator) -> dict[str, Any]:
        number = int(generator.integers(len(self._volumes)))
        transform = self._transforms[number]
        transform.set_random_state(int(generator.integers(2**31)))
        return {name: transform(self._volumes[number])[None] for name in VIEWS}
