"""The transforms that every row of the benchmark makes, as far as it can, and the random numbers that the rivals take.

A slot is two views of one volume: crop, affine, elastic, flips, then gamma, brightness, contrast and noise. Ours give
the field from the second view to the slot's crop and its mask besides.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtrast.methods.views import (
    AffineRanges,
    AppearanceRanges,
    Brightness,
    Contrast,
    ElasticRanges,
    Gamma,
    Noise,
    View,
    ViewSpec,
)

VIEWS = ("moving", "fixed")
ROTATION_DEGREES = 20.0
SCALE = (0.8, 1.25)
TRANSLATION_VOXELS = 4.0
SPACING_VOXELS = 16.0  # of the control points
MAGNITUDE_VOXELS = 4.0  # that they move at most
GAMMA = (0.7, 1.5)
BRIGHTNESS_STD, CONTRAST, NOISE_STD = 0.1, (0.75, 1.25), (0.01, 0.05)  # of the volume's intensity range


def fixed_spec(size: int) -> ViewSpec:
    """Crop, affine and flips alone: what can be compared voxel by voxel."""
    view = View(affine=_affine(), flips=[0.5] * 3)
    return ViewSpec((size,) * 3, dict.fromkeys(VIEWS, view))


def view_spec(size: int) -> ViewSpec:
    spacing = min(SPACING_VOXELS, size / 2)
    elastic = ElasticRanges(spacing, [min(MAGNITUDE_VOXELS, spacing / 4)] * 2)
    appearance = AppearanceRanges(
        order=["gamma", "brightness", "contrast", "noise"],
        gamma=Gamma(list(GAMMA)),
        brightness=Brightness(BRIGHTNESS_STD),
        contrast=Contrast(list(CONTRAST)),
        noise=Noise(list(NOISE_STD)),
    )
    moving, fixed = (
        View(affine=_affine(), elastic=elastic, flips=[0.5] * 3, appearance=appearance, displacement=field)
        for field in (False, True)
    )
    return ViewSpec((size,) * 3, {"moving": moving, "fixed": fixed})


def _affine() -> AffineRanges:
    return AffineRanges(ROTATION_DEGREES, list(SCALE), 0.0, TRANSLATION_VOXELS)


@dataclass(frozen=True)
class Volume:
    voxels: NDArray[np.float32]  # (D, H, W)
    background: float
    span: float  # of the intensity range


@dataclass(frozen=True)
class Draw:
    """What a rival makes one view of."""

    to_volume: NDArray[np.float64]  # (3, 4): index of the view -> index of the volume
    control_points: NDArray[np.float32]  # (3, k, k, k): voxels of the volume
    exponent: float
    shift: float  # this and the std in units of the volume
    factor: float
    noise_std: float


def draw_slot(generator: np.random.Generator, volume: Volume, size: int) -> tuple[NDArray[np.int64], list[Draw]]:
    """The first voxel of a slot's crop and both its views."""
    origin = np.array([generator.integers(max(side - size, 0) + 1) for side in volume.voxels.shape])
    points = math.ceil((size - 1) / SPACING_VOXELS) + 1
    magnitude = min(MAGNITUDE_VOXELS, size / 8)
    draws = [
        Draw(
            _random_affine(generator, origin, size),
            generator.uniform(-magnitude, magnitude, (3, points, points, points)).astype(np.float32),
            math.exp(generator.uniform(math.log(GAMMA[0]), math.log(GAMMA[1]))),
            generator.normal(0, BRIGHTNESS_STD) * volume.span,
            generator.uniform(*CONTRAST),
            generator.uniform(*NOISE_STD) * volume.span,
        )
        for _ in VIEWS
    ]
    return origin, draws


def _random_affine(generator: np.random.Generator, origin: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    linear = np.eye(3)
    for axis, angle in enumerate(np.radians(generator.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3))):
        first, second = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[[first, second], [first, second]] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        linear = linear @ turn
    scale = np.exp(generator.uniform(math.log(SCALE[0]), math.log(SCALE[1]), 3))
    linear = scale[:, None] * linear * generator.choice([-1.0, 1.0], 3)  # flips
    centre = np.full(3, (size - 1) / 2)
    shift = generator.uniform(-TRANSLATION_VOXELS, TRANSLATION_VOXELS, 3)
    return np.column_stack([linear, origin + centre - linear @ centre + shift])
