"""Pictures of numbers: losses and displacement error over the steps, Dice per arm. Drawn for light and dark pages."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure

from .page import Picture, draw

LIGHT = {
    "font.size": 10.5,
    "figure.facecolor": "#ffffff",
    "axes.facecolor": "#ffffff",
    "text.color": "#1b1f24",
    "axes.edgecolor": "#8a939d",
    "axes.labelcolor": "#1b1f24",
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
DARK = {
    **LIGHT,
    "figure.facecolor": "#14171b",
    "axes.facecolor": "#14171b",
    "text.color": "#e4e7eb",
    "axes.edgecolor": "#59636e",
    "axes.labelcolor": "#e4e7eb",
    "xtick.color": "#aab3bd",
    "ytick.color": "#aab3bd",
    "grid.color": "#2a3037",
}
# Readable on both grounds and apart for colour-blind readers.
BLUE, ORANGE, GREEN, PINK, GREY = "#2f8fd8", "#e07b1a", "#1f9e77", "#c25a9a", "#8a939d"

Line = dict[str, Any]


def draw_losses(training: Sequence[Line], validation: Sequence[Line]) -> Picture:
    """One panel a loss term."""
    terms = sorted({key for line in training for key in line if key.startswith("loss/")})
    return draw_numbers(["loss", *terms] if len(terms) != 1 else terms, training, validation)


def draw_numbers(names: Sequence[str], training: Sequence[Line], validation: Sequence[Line]) -> Picture:
    """One panel a number of the log; thin: each step, thick: running mean, dots: held-aside cases."""
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    colours = (BLUE, ORANGE, GREEN, PINK, GREY) * len(names)

    def fill() -> Figure:
        figure = Figure(figsize=(3.75 * columns, 3.1 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes, name, colour in zip(panels, names, colours, strict=False):
            steps, values = _series(training, name)
            held_steps, held = _series(validation, name.rpartition("/")[2] if "/" in name else name)
            _smoothed(axes, steps, values, colour, "training")
            if len(held):
                axes.plot(
                    held_steps,
                    held,
                    "o",
                    color=axes.xaxis.label.get_color(),
                    ms=4.5,
                    mfc="none",
                    mew=1.6,
                    label="held aside",
                )
            axes.set_title({"loss": "total loss"}.get(name, name.removeprefix("loss/").removeprefix("monitor/")))
            axes.set_xlabel("step")
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if min(*values, *held) < 0 else 0)
            axes.legend(fontsize=9)
        return figure

    return _both(fill)


def draw_displacement_error(training: Sequence[Line], validation: Sequence[Line]) -> Picture:
    """Mean Euclidean error of the displacement beside that of predicting zero."""

    def fill() -> Figure:
        figure = Figure(figsize=(7.5, 3.3), layout="constrained")
        axes = figure.subplots()
        for name, colour, words in (("zero_error", GREY, "predicting zero"), ("displacement_error", BLUE, "COVER")):
            steps, values = _series(training, f"monitor/{name}")
            held_steps, held = _series(validation, name)
            if len(values):
                _smoothed(axes, steps, values, colour, f"{words}, training")
            if len(held):
                axes.plot(
                    held_steps,
                    held,
                    "o--",
                    color=colour,
                    ms=5,
                    lw=1.2,
                    mec=axes.xaxis.label.get_color(),
                    label=f"{words}, held aside",
                )
        axes.set_title("mean displacement error over valid voxels")
        axes.set_xlabel("step")
        axes.set_ylabel("voxels")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=9, ncols=2)
        return figure

    return _both(fill)


def draw_dice(arms: dict[str, dict[str, list[float]]]) -> Picture:
    """Dice of each arm as dots (one a seed) with their mean, one group a class.

    Args:
        arms: {arm: {class name: one Dice a seed}}.
    """

    def fill() -> Figure:
        groups = list(dict.fromkeys(name for values in arms.values() for name in values))
        figure = Figure(figsize=(1.6 + 1.9 * len(groups), 3.3), layout="constrained")
        axes = figure.subplots()
        for number, (arm, values) in enumerate(arms.items()):
            colour = (BLUE, ORANGE, GREEN, PINK, GREY)[number % 5]
            for place, group in enumerate(groups):
                dice = values.get(group, [])
                x = place + (number - (len(arms) - 1) / 2) * 0.26
                axes.plot([x] * len(dice), dice, "o", color=colour, ms=6, alpha=0.75, label=arm if place == 0 else None)
                if dice:
                    axes.plot([x - 0.1, x + 0.1], [numpy.mean(dice)] * 2, color=colour, lw=2.5)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        # At least a tenth of Dice from bottom to top: a hair's breadth must not look like a gulf.
        low, high = axes.get_ylim()
        missing = max(0.0, 0.1 - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)
        axes.set_ylabel("Dice on test cases")
        axes.set_title("dots: seeds, bars: their mean")
        axes.grid(visible=False, axis="x")
        axes.legend(fontsize=9, loc="best")
        return figure

    return _both(fill)


def _series(lines: Sequence[Line], name: str) -> tuple[Any, Any]:
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return numpy.array([step for step, _ in found]), numpy.array([value for _, value in found], dtype=float)


def _smoothed(axes: Any, steps: Any, values: Any, colour: str, label: str) -> None:
    """Each step thin, the mean over the last twentieth of the run thick."""
    window = max(1, len(values) // 20)
    if window < 2:
        axes.plot(steps, values, color=colour, lw=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.4)
    sums = numpy.cumsum(numpy.insert(values, 0, 0.0))
    means = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(steps, means, color=colour, lw=2.0, label=label)


def _both(fill: Callable[[], Figure]) -> Picture:
    pictures = []
    for style in (LIGHT, DARK):
        with rc_context(style):
            pictures.append(draw(fill()))
    return Picture(*pictures)
