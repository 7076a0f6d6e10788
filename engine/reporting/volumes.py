"""Pictures of volumes: cases, views, displacements, features, segmentations. Dark ground, as a viewer has it."""

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib import colormaps, rc_context
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .evidence import MatchedPair
from .page import Picture, draw
from .planes import Frame, Plane, centre_of, planes_through, show, window_of

GROUND, INK = "#14171b", "#e4e7eb"
TRUE_COLOUR, RECOVERED_COLOUR = "#4cc9f0", "#ffb703"
LABEL_COLOURS = ("#ff9f1c", "#2ec4b6", "#e05780", "#9b8cff", "#8ac926", "#f15bb5", "#00bbf9", "#fee440")
DARK = {
    "font.size": 10.0,
    "figure.facecolor": GROUND,
    "axes.facecolor": "#000000",
    "text.color": INK,
    "axes.edgecolor": "#59636e",
    "axes.labelcolor": "#aab3bd",
    "xtick.color": "#aab3bd",
    "ytick.color": "#aab3bd",
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.facecolor": "#1d2127",
    "legend.edgecolor": "#59636e",
    "hatch.color": "#3a414a",
}

SCALE = "viridis"

Volume = NDArray[Any]


def draw_cases(cases: Sequence[tuple[str, Frame, Volume, Volume | None]], class_names: dict[int, str]) -> Picture:
    """Axial, coronal and sagittal plane of some cases (name, frame, image, label), label outlines drawn in."""
    with rc_context(DARK):
        rows = len(planes_through([0, 0, 0], cases[0][1]))
        figure, grid = _grid(rows, len(cases), 2.35, 2.5)
        for column, (name, frame, image, label) in enumerate(cases):
            for row, plane in enumerate(planes_through(centre_of(image), frame)):
                axes = grid[row][column]
                show(axes, plane.cut(image), plane, frame, cmap="gray", **_window(image))
                if label is not None:
                    _outline(axes, plane.cut(label), plane, frame)
                _only_outer(axes, row, column)
                if row == 0:
                    axes.set_title(name)
        _label_legend(figure, [label for *_, label in cases if label is not None], class_names)
        return Picture(draw(figure))


def draw_views(pair: MatchedPair) -> Picture:
    """Moving, fixed, moving warped by the true displacement, what is left of the difference, and the mask."""
    with rc_context(DARK):
        planes = planes_through(centre_of(pair.mask), pair.frame)[:2]
        figure, grid = _grid(len(planes), 5, 2.5, 2.85)
        window = _window(pair.fixed)
        valid = pair.mask > 0
        # Contrast and brightness of M are changed on purpose: compare after matching mean and deviation.
        difference = numpy.abs(_standardised(pair.fixed, valid) - _standardised(pair.warped_true, valid))
        difference = numpy.where(valid, difference, numpy.nan)
        panels: list[tuple[str, Volume, dict[str, Any]]] = [
            ("moving M\n(changed appearance)", pair.moving, {"cmap": "gray", **_window(pair.moving)}),
            ("fixed F\n(moved by true ψ)", pair.fixed, {"cmap": "gray", **window}),
            (
                "W(M, true ψ)\n(M brought onto F)",
                numpy.where(valid, pair.warped_true, numpy.nan),
                {"cmap": _with_bad("gray"), **_window(pair.moving)},
            ),
            (
                "|F − W(M, true ψ)|\n(standard deviations)",
                difference,
                {"cmap": _with_bad("magma"), "vmin": 0, "vmax": 2},
            ),
            ("mask\n(white: ψ stays inside)", pair.mask, {"cmap": "gray", "vmin": 0, "vmax": 1}),
        ]
        for row, plane in enumerate(planes):
            for column, (title, volume, options) in enumerate(panels):
                axes = grid[row][column]
                image = show(axes, plane.cut(volume), plane, pair.frame, unit="voxels", **options)
                _only_outer(axes, row, column, len(planes))
                if row == 0:
                    axes.set_title(title)
                if column == 0:
                    axes.set_ylabel(f"{plane.name}\n{axes.get_ylabel()}")
                if column == 3:
                    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        return Picture(draw(figure))


def draw_displacement(pair: MatchedPair) -> Picture:
    """Each component of the true and the recovered field with their difference, in the plane through the centre."""
    with rc_context(DARK):
        plane = planes_through(centre_of(pair.mask), pair.frame)[0]
        dimensions = len(pair.true)
        figure, grid = _grid(3, dimensions + 1, 2.75, 2.75)
        valid = plane.cut(pair.mask) > 0
        reach = float(numpy.abs(pair.true[:, pair.mask > 0]).max(initial=1.0))
        longest = float(pair.magnitude[pair.mask > 0].max(initial=1.0))
        names = ("true ψ", "recovered ψ'", "ψ' − ψ")
        for row, field in enumerate((pair.true, pair.recovered, pair.recovered - pair.true)):
            for column in range(dimensions):
                axes = grid[row][column]
                picture = numpy.where(valid, plane.cut(field[column]), numpy.nan)
                signed = show(
                    axes,
                    picture,
                    plane,
                    pair.frame,
                    unit="voxels",
                    cmap=_with_bad("RdBu_r"),
                    vmin=-reach,
                    vmax=reach,
                    letters=False,
                )
                _only_outer(axes, row, column, 3)
                low, high = pair.frame.letters[column]
                if row == 0:
                    axes.set_title(f"{'DHW'[-dimensions:][column]} component\n(blue {low}, red {high})")
                if column == 0:
                    axes.set_ylabel(f"{names[row]}\n{axes.get_ylabel()}")
            axes = grid[row][dimensions]
            length = numpy.where(valid, plane.cut(numpy.sqrt((field**2).sum(axis=0))), numpy.nan)
            unsigned = show(
                axes,
                length,
                plane,
                pair.frame,
                unit="voxels",
                cmap=_with_bad("viridis"),
                vmin=0,
                vmax=longest,
                letters=False,
            )
            _only_outer(axes, row, 1, 3)
            axes.set_title(("length of ψ", "length of ψ'", "error |ψ' − ψ|")[row])
        figure.colorbar(
            signed, ax=[grid[r][dimensions - 1] for r in range(3)], fraction=0.05, pad=0.04, label="voxels", shrink=0.7
        )
        figure.colorbar(
            unsigned, ax=[grid[r][dimensions] for r in range(3)], fraction=0.05, pad=0.04, label="voxels", shrink=0.7
        )
        return Picture(draw(figure))


def draw_arrows(pairs: Sequence[MatchedPair]) -> Picture:
    """In-plane arrows p -> p + psi, true and recovered, and the difference to F before and after, a row a pair."""
    with rc_context(DARK):
        figure, grid = _grid(len(pairs), 4, 3.0, 3.0)
        for row, pair in enumerate(pairs):
            plane = planes_through(centre_of(pair.mask), pair.frame)[0]
            valid = pair.mask > 0
            show(
                grid[row][0],
                plane.cut(pair.fixed),
                plane,
                pair.frame,
                unit="voxels",
                cmap="gray",
                **_window(pair.fixed),
            )
            _arrows(grid[row][0], pair, plane)
            warped = numpy.where(valid, pair.warped_recovered, numpy.nan)
            show(
                grid[row][1],
                plane.cut(warped),
                plane,
                pair.frame,
                unit="voxels",
                cmap=_with_bad("gray"),
                **_window(pair.moving),
            )
            fixed = _standardised(pair.fixed, valid)
            before = numpy.where(valid, numpy.abs(fixed - _standardised(pair.moving, valid)), numpy.nan)
            after = numpy.where(valid, numpy.abs(fixed - _standardised(pair.warped_recovered, valid)), numpy.nan)
            for column, difference in ((2, before), (3, after)):
                image = show(
                    grid[row][column],
                    plane.cut(difference),
                    plane,
                    pair.frame,
                    unit="voxels",
                    cmap=_with_bad("magma"),
                    vmin=0,
                    vmax=2,
                )
            figure.colorbar(image, ax=grid[row][3], fraction=0.046, pad=0.03, label="standard deviations")
            grid[row][0].set_ylabel(f"{pair.case}, {plane.name}\n{grid[row][0].get_ylabel()}")
            for column in range(4):
                _only_outer(grid[row][column], row, column, len(pairs))
        titles = ("arrows of ψ on F", "W(M, recovered ψ')", "|F − M|", "|F − W(M, recovered ψ')|")
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title)
        handles = [figure.axes[0].plot([], [], color=c, lw=2)[0] for c in (TRUE_COLOUR, RECOVERED_COLOUR)]
        figure.legend(handles, ["true ψ", "recovered ψ'"], loc="outside lower center", ncols=2)
        return Picture(draw(figure))


def coloured(share: Volume, inside: Volume) -> Volume:
    """(*S) from 0 to 1 -> (*S, 3) colours, black outside."""
    colours: Volume = colormaps[SCALE](share.clip(0, 1))[..., :3] * inside[..., None]
    return colours


def scale_of_colours(count: int = 9) -> list[str]:
    """The colours of `coloured` from 0 to 1."""
    return [to_hex(colormaps[SCALE](share)) for share in numpy.linspace(0, 1, count)]


def draw_segmentations(
    name: str, frame: Frame, image: Volume, truth: Volume, predictions: dict[str, Volume], class_names: dict[int, str]
) -> Picture:
    """Truth and each arm's prediction as colours on the image; wrong voxels are shown beside them in white."""
    with rc_context(DARK):
        planes = planes_through(centre_of(image), frame)[:2]
        figure, grid = _grid(len(planes), 2 + 2 * len(predictions), 2.2, 2.6)
        colours = ListedColormap([(0, 0, 0, 0), *LABEL_COLOURS])
        painted: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": len(LABEL_COLOURS), "alpha": 0.75}
        for row, plane in enumerate(planes):
            for axes in grid[row]:
                show(axes, plane.cut(image), plane, frame, cmap="gray", letters=axes is grid[row][0], **_window(image))
            show(grid[row][1], _numbered(plane.cut(truth)), plane, frame, letters=False, **painted)
            for number, predicted in enumerate(predictions.values()):
                show(grid[row][2 + 2 * number], _numbered(plane.cut(predicted)), plane, frame, letters=False, **painted)
                wrong = (plane.cut(predicted) != plane.cut(truth)).astype(float)
                show(grid[row][3 + 2 * number], wrong, plane, frame, cmap="gray", vmin=0, vmax=1, letters=False)
            for column, axes in enumerate(grid[row]):
                _only_outer(axes, row, column, len(planes))
        titles = [name, "truth"]
        for arm in predictions:
            titles += [f"{arm}:\nprediction", f"{arm}:\nwrong voxels"]
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title)
        _label_legend(figure, [truth], class_names)
        return Picture(draw(figure))


def _numbered(label: Volume) -> Volume:
    """Label values -> numbers of their colours, from 1, as outlines and legend count them; 0 stays."""
    return numpy.where(label > 0, (label.astype(numpy.int64) - 1) % len(LABEL_COLOURS) + 1, 0)


def _arrows(axes: Any, pair: MatchedPair, plane: Plane, every: int = 5) -> None:
    points = numpy.argwhere(plane.cut(pair.mask) > 0)
    rows, columns = points[(points % every == 0).all(axis=1)].T
    for field, colour, width in ((pair.true, TRUE_COLOUR, 0.014), (pair.recovered, RECOVERED_COLOUR, 0.005)):
        up, across = (plane.cut(field[axis])[rows, columns] for axis in (plane.vertical, plane.horizontal))
        axes.quiver(
            columns,
            rows,
            across,
            up,
            color=colour,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=width,
            headwidth=3.0 if width > 0.01 else 5.0,
        )


def _standardised(image: Volume, valid: Volume) -> Volume:
    """Zero mean and unit deviation over the valid voxels, so that two appearances can be compared."""
    inside = image[valid] if valid.any() else image
    return (image - inside.mean()) / (inside.std() + 1e-6)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Any]]]:
    figure = Figure(figsize=(columns * width, rows * height + 0.3), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _only_outer(axes: Any, row: int, column: int, rows: int = 0) -> None:
    """Labels at the left of the figure alone, and, where all rows share their horizontal axis, at its bottom alone."""
    if row < rows - 1:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
    if column > 0:
        axes.set_ylabel("")
        axes.tick_params(labelleft=False)


def _window(image: Volume) -> dict[str, Any]:
    low, high = window_of(image)
    return {"vmin": low, "vmax": high}


def _with_bad(name: str) -> Any:
    return colormaps[name].with_extremes(bad="#2b3138")


def _outline(axes: Any, label: Volume, plane: Plane, frame: Frame) -> None:
    vertical = numpy.arange(label.shape[0]) * frame.spacing_mm[plane.vertical]
    horizontal = numpy.arange(label.shape[1]) * frame.spacing_mm[plane.horizontal]
    for value in numpy.unique(label[label > 0]):
        axes.contour(
            horizontal,
            vertical,
            (label == value).astype(float),
            levels=[0.5],
            linewidths=0.8,
            colors=LABEL_COLOURS[(int(value) - 1) % len(LABEL_COLOURS)],
        )


def _label_legend(figure: Figure, labels: Sequence[Volume], class_names: dict[int, str]) -> None:
    values = sorted({int(v) for label in labels for v in numpy.unique(label) if v > 0})
    if not values:
        return
    handles = [figure.axes[0].plot([], [], color=LABEL_COLOURS[(v - 1) % len(LABEL_COLOURS)], lw=3)[0] for v in values]
    figure.legend(
        handles,
        [class_names.get(v, f"class {v}") for v in values],
        loc="outside lower center",
        ncols=min(6, len(values)),
    )
