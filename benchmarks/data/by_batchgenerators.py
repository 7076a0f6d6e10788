"""nnU-Net's augmentation, batchgeneratorsv2: one grid_sample a view, its field smoothed by a Fourier transform.

Its spatial transform takes crops from whole volumes. The two views of a slot lie anywhere.
"""

from typing import Any

import numpy as np
import torch

from .recipe import (
    BRIGHTNESS_STD,
    CONTRAST,
    GAMMA,
    MAGNITUDE_VOXELS,
    NOISE_STD,
    ROTATION_DEGREES,
    SCALE,
    SPACING_VOXELS,
    VIEWS,
    Volume,
)


def _transform(volume: Volume, size: int) -> Any:
    from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
    from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

    angle = np.radians(ROTATION_DEGREES)
    noise = (NOISE_STD[0] * volume.span, NOISE_STD[1] * volume.span)
    return ComposeTransforms(
        [
            SpatialTransform(
                (size,) * 3,
                patch_center_dist_from_border=size // 2,
                random_crop=True,
                p_elastic_deform=1.0,
                elastic_deform_scale=(0.5 * SPACING_VOXELS / size,) * 2,  # as a cubic B-spline smooths
                elastic_deform_magnitude=(0.0, min(MAGNITUDE_VOXELS, size / 8)),
                p_rotation=1.0,
                rotation=(-angle, angle),
                p_scaling=1.0,
                scaling=SCALE,
            ),
            MirrorTransform((0, 1, 2)),
            GammaTransform(GAMMA, p_invert_image=0, synchronize_channels=True, p_per_channel=1, p_retain_stats=0),
            BrightnessAdditiveTransform(0.0, BRIGHTNESS_STD * volume.span, synchronize_channels=False),
            ContrastTransform(CONTRAST, preserve_range=False, synchronize_channels=True),
            GaussianNoiseTransform(noise),
        ]
    )


class SlotMaker:
    def __init__(self, volumes: list[Volume], size: int) -> None:
        self._volumes = [torch.from_numpy(volume.voxels)[None] for volume in volumes]
        self._transforms = [_transform(volume, size) for volume in volumes]

    def __call__(self, generator: np.random.Generator) -> dict[str, Any]:
        number = int(generator.integers(len(self._volumes)))
        np.random.seed(int(generator.integers(2**31)))  # noqa: NPY002 - it draws from numpy's own generator
        made = (self._transforms[number](image=self._volumes[number]) for _ in VIEWS)
        return {name: views["image"][None] for name, views in zip(VIEWS, made, strict=True)}
