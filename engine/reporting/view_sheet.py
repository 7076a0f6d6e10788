"""A sheet of views as the data plane makes them: a row for each slot, with points that belong together."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from numpy.typing import NDArray

from ..data.matching import Points, to_view, to_volume
from ..data.planner import ViewPlan
from .page import draw

NEAR_VOXELS = 0.6  # a point this close to a plane is drawn in it
MATCHES = 5
PANEL_INCHES = 2.3


@dataclass(frozen=True)
class Panel:
    """One output of a slot; points are drawn in the views themselves, not in what else has their geometry."""

    title: str
    image: NDArray[np.float32]  # (D, H, W) or (H, W)
    view: ViewPlan
    window: tuple[float, float]
    with_points: bool = False


def draw_sheet(rows: Sequence[tuple[str, Sequence[Panel]]]) -> bytes:
    """A PNG: each slot in planes across its first axis, and in 3-D across the last as well.

    Lines join the same point of the volume in two neighbouring views. In 3-D the second view is cut where it shows the
    middle of the first, and points that lie in both planes are shown.
    """
    axes_cut = (0, 2) if rows[0][1][0].image.ndim == 3 else (None,)
    columns = max(len(panels) for _, panels in rows)
    with rc_context({"font.size": 7}):
        figure = Figure((PANEL_INCHES * columns, PANEL_INCHES * len(rows) * len(axes_cut)), layout="constrained")
        grid = figure.subplots(len(rows) * len(axes_cut), columns, squeeze=False)
        for number, (name, panels) in enumerate(rows):
            for offset, axis in enumerate(axes_cut):
                line = grid[number * len(axes_cut) + offset]
                _draw_row(figure, line, panels, axis)
                line[0].set_ylabel(name if axis is None else f"{name}\nacross {'DHW'[axis]}")
        return draw(figure, dots_per_inch=110)


def _draw_row(figure: Figure, line: Any, panels: Sequence[Panel], axis: int | None) -> None:
    middle = middles(panels, axis)
    for axes, panel, index in zip(line, panels, middle, strict=False):
        picture = panel.image if axis is None else np.take(panel.image, index, axis=axis)
        low, high = panel.window
        axes.imshow(picture, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
        axes.set_title(panel.title if axis is None else f"{panel.title} [{'DHW'[axis]} = {index}]")
    for axes in line:
        axes.set(xticks=[], yticks=[])
    for axes in line[len(panels) :]:
        axes.set_axis_off()
    with_place = [number for number, panel in enumerate(panels) if panel.with_points]
    for first, second in itertools.pairwise(with_place):
        _join(figure, line, (first, panels[first], middle[first]), (second, panels[second], middle[second]), axis)


def middles(panels: Sequence[Panel], axis: int | None) -> list[int]:
    """The plane of each panel: its middle, or where it shows the middle of the first."""
    if axis is None:
        return [0] * len(panels)
    first = panels[0].view
    place = to_volume(first, (np.array([first.size], np.float64) - 1) / 2)
    chosen: list[int] = []
    for panel in panels:
        found = round(float(to_view(panel.view, place)[0, axis]))
        size = panel.image.shape[axis]
        chosen.append(found if 0 <= found < size else size // 2)
    return chosen


def _join(
    figure: Figure, line: Any, one: tuple[int, Panel, int], other: tuple[int, Panel, int], axis: int | None
) -> None:
    for number, (here, there) in enumerate(zip(*matches(one[1:], other[1:], axis), strict=True)):
        colour = colormaps["tab10"](number)
        seen = [tuple(np.delete(point, axis or 0)[::-1]) for point in (here, there)]
        for (column, *_), (x, y) in zip((one, other), seen, strict=True):
            line[column].plot(x, y, "o", color=colour, markersize=3.5, markeredgecolor="black", markeredgewidth=0.5)
        joint = ConnectionPatch(
            seen[0], seen[1], "data", "data", axesA=line[one[0]], axesB=line[other[0]], color=colour, linewidth=0.6
        )
        figure.add_artist(joint)


def matches(one: tuple[Panel, int], other: tuple[Panel, int], axis: int | None) -> tuple[Points, Points]:
    """Up to five points, far from each other, that both planes show: indices in the one view and in the other."""
    (first, index), (second, index_there) = (one[0].view, one[1]), (other[0].view, other[1])
    ranges = [np.arange(1, max(2, size - 1)) if size > 1 else np.arange(1) for size in first.size]
    if axis is not None:
        ranges[axis] = np.array([index])
    here = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3).astype(np.float64)
    there = to_view(second, to_volume(first, here))
    limit = np.array(second.size) - 1
    fits = ((there >= -0.01) & (there <= limit + 0.01)).all(1)
    if axis is not None:
        fits &= np.abs(there[:, axis] - index_there) < NEAR_VOXELS
    here, there = here[fits], there[fits]
    chosen: list[int] = []
    while len(chosen) < min(MATCHES, len(here)):
        if chosen:
            distances = np.linalg.norm(here[:, None] - here[chosen], axis=2).min(1)
        else:
            distances = -np.linalg.norm(here - here.mean(0), axis=1)
        chosen.append(int(distances.argmax()))
    return here[chosen], there[chosen]
