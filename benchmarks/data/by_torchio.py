"""TorchIO: its single resampling for an affine and a B-spline deformation, by SimpleITK, on a crop of the volume.

It resamples an image onto that image's own grid: beyond the crop is padding, where ours and the others read on.
Brightness and contrast about the mean it does not have.
"""

from typing import Any

import numpy as np
import torch

from .recipe import GAMMA, MAGNITUDE_VOXELS, NOISE_STD, ROTATION_DEGREES, SCALE, VIEWS, Volume

CONTROL_POINTS = 7  # at most: two of them beyond either end, as those of a cubic B-spline are


def _transform(volume: Volume, size: int) -> Any:
    import torchio

    affine = {"scales": (1 / SCALE[1], 1 / SCALE[0]), "degrees": ROTATION_DEGREES, "translation": 4.0}
    elastic = {"num_control_points": CONTROL_POINTS, "max_displacement": min(MAGNITUDE_VOXELS, size / 16)}
    return torchio.Compose(
        [
            torchio.RandomAffineElasticDeformation(affine_kwargs=affine, elastic_kwargs=elastic),
            torchio.RandomFlip((0, 1, 2)),
            torchio.RandomGamma(tuple(np.log(GAMMA))),
            torchio.RandomNoise(std=(NOISE_STD[0] * volume.span, NOISE_STD[1] * volume.span)),
        ]
    )


class SlotMaker:
    def __init__(self, volumes: list[Volume], size: int) -> None:
        import SimpleITK

        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        self._volumes, self._size = volumes, size
        self._transforms = [_transform(volume, size) for volume in volumes]

    def __call__(self, generator: np.random.Generator) -> dict[str, Any]:
        import torchio

        number = int(generator.integers(len(self._volumes)))
        voxels, size = self._volumes[number].voxels, self._size
        torch.manual_seed(int(generator.integers(2**31)))
        origin = [int(generator.integers(max(side - size, 0) + 1)) for side in voxels.shape]
        crop = torch.from_numpy(voxels[tuple(slice(first, first + size) for first in origin)])[None]
        subjects = (torchio.Subject(image=torchio.ScalarImage(tensor=crop)) for _ in VIEWS)
        made = (self._transforms[number](subject)["image"].data[None] for subject in subjects)
        return dict(zip(VIEWS, made, strict=True))
