"""Which plane of a volume a picture shows, which way it lies, and where its axes point in the body."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

AXES = ("D", "H", "W")
_DIRECTIONS = (("L", "R"), ("P", "A"), ("I", "S"))  # low and high end of x, y, z in RAS


@dataclass(frozen=True)
class Frame:
    """What ties a grid to the body: voxel size, and the letters at the low and high end of each array axis."""

    spacing_mm: tuple[float, ...]
    letters: tuple[tuple[str, str], ...]  # empty ones where the grid is turned against the body

    @property
    def dimensions(self) -> int:
        return len(self.spacing_mm)


@dataclass(frozen=True)
class Plane:
    """A slice across `axis` at `index`. The picture's vertical axis grows upwards along `vertical`."""

    name: str
    axis: int | None  # None where the grid is two-dimensional already
    index: int
    vertical: int
    horizontal: int

    def cut(self, volume: NDArray[Any]) -> NDArray[Any]:
        """(*S) -> (vertical, horizontal)."""
        return volume if self.axis is None else numpy.take(volume, self.index, axis=self.axis)


def frame_of(affine: Sequence[Sequence[float]], spacing_mm: Sequence[float], dimensions: int = 3) -> Frame:
    """The frame of a stored volume, or of its (H, W) slices where `dimensions` is 2.

    Args:
        affine: 4 x 4, (d, h, w, 1) voxel index to RAS millimetres.
        spacing_mm: D, H, W.
        dimensions: of the grid that is drawn.
    """
    directions = numpy.asarray(affine, dtype=float)[:3, :3]
    letters = []
    for column in directions.T:
        world = int(numpy.abs(column).argmax())
        low, high = _DIRECTIONS[world]
        letters.append((low, high) if column[world] >= 0 else (high, low))
    return Frame(tuple(float(s) for s in spacing_mm)[-dimensions:], tuple(letters)[-dimensions:])


def planes_through(point: Sequence[int], frame: Frame) -> list[Plane]:
    """The three planes of a volume through a voxel, or the one that a slice is."""
    if frame.dimensions == 2:
        return [Plane("slice", None, 0, 0, 1)]
    names = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "R": "sagittal", "L": "sagittal"}
    return [
        Plane(
            names.get(frame.letters[axis][1], f"across {AXES[axis]}"),
            axis,
            int(point[axis]),
            *(other for other in range(3) if other != axis),
        )
        for axis in range(3)
    ]


def centre_of(weight: NDArray[Any]) -> list[int]:
    """The voxel in the middle of what is brighter than the volume's mean."""
    bright = weight > weight.mean(dtype=numpy.float64)
    if not bright.any():
        return [size // 2 for size in weight.shape]
    middle = []
    for axis in range(weight.ndim):
        counts = bright.sum(axis=tuple(a for a in range(weight.ndim) if a != axis)).cumsum()
        middle.append(int(numpy.searchsorted(counts, counts[-1] / 2)))
    return middle


def window_of(image: NDArray[Any]) -> tuple[float, float]:
    """The values to show as black and white: few voxels lie beyond them."""
    low, high = numpy.percentile(image.astype(numpy.float32), (0.5, 99.7))
    return float(low), float(max(high, low + 1e-6))


def show(
    axes: Any,
    picture: NDArray[Any],
    plane: Plane,
    frame: Frame,
    *,
    unit: str = "mm",
    letters: bool = True,
    **options: Any,
) -> Any:
    """Draws a cut through `plane` with true proportions, the unit on its axes and the body's directions at its rim.

    Args:
        axes: of matplotlib.
        picture: (vertical, horizontal) or (vertical, horizontal, 3).
        unit: `mm` or `voxels`, of the tick labels.

    Returns: what imshow returns.
    """
    from matplotlib.patheffects import withStroke  # here: pages without pictures need the planes as well

    vertical_mm, horizontal_mm = frame.spacing_mm[plane.vertical], frame.spacing_mm[plane.horizontal]
    rows, columns = picture.shape[:2]
    scale = (vertical_mm, horizontal_mm) if unit == "mm" else (1.0, 1.0)
    extent = (-0.5 * scale[1], (columns - 0.5) * scale[1], -0.5 * scale[0], (rows - 0.5) * scale[0])
    aspect = 1.0 if unit == "mm" else vertical_mm / horizontal_mm
    image = axes.imshow(picture, origin="lower", extent=extent, aspect=aspect, interpolation="nearest", **options)
    names = AXES[-frame.dimensions :]
    axes.set_xlabel(f"{names[plane.horizontal]} ({unit})", labelpad=1)
    axes.set_ylabel(f"{names[plane.vertical]} ({unit})", labelpad=1)
    if letters:
        marks = (
            (0.02, 0.5, "left", "center", frame.letters[plane.horizontal][0]),
            (0.98, 0.5, "right", "center", frame.letters[plane.horizontal][1]),
            (0.5, 0.02, "center", "bottom", frame.letters[plane.vertical][0]),
            (0.5, 0.98, "center", "top", frame.letters[plane.vertical][1]),
        )
        for x, y, across, up, letter in marks:
            axes.text(
                x,
                y,
                letter,
                transform=axes.transAxes,
                ha=across,
                va=up,
                color="#ffd166",
                fontsize=9,
                fontweight="bold",
                path_effects=[withStroke(linewidth=2.5, foreground="#000000")],
            )
    return image
