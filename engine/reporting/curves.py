"""Pictures of numbers as SVG whose colours follow the page, light or dark: the log, several runs, Dice."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from ..downstream.table import Row
from .page import Picture

# Of the page, by what is drawn in them: (light, dark). A browser that shows the SVG picks one.
INK = {
    "ground": ("#fffffe", "#14171b"),
    "text": ("#1b1f24", "#e4e7eb"),
    "faint": ("#59636e", "#aab3bd"),
    "axis": ("#8a939e", "#59636e"),
    "grid": ("#e3e7eb", "#2a3037"),
}
LIGHT = {name: colours[0] for name, colours in INK.items()}
STYLE = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "voxtrast",
    "figure.facecolor": LIGHT["ground"],
    "axes.facecolor": LIGHT["ground"],
    "text.color": LIGHT["text"],
    "axes.edgecolor": LIGHT["axis"],
    "axes.labelcolor": LIGHT["text"],
    "axes.titlecolor": LIGHT["text"],
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
}
# Okabe and Ito's order, moved to tones that stand out from both grounds; lines also differ by dashes or markers.
COLOURS = ("#2f8fd8", "#e07b1a", "#1f9e77", "#c25a9a", "#8a7bd8", "#a8922a", "#6f7f8f")
BLUE, GREY = COLOURS[0], COLOURS[-1]
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vP*"
MOST_POINTS = 400  # of a line; more steps are drawn as the range and the mean of neighbours
SIZE = (4.0, 2.9)

Line = dict[str, Any]


def draw_number(
    name: str, training: Sequence[Line], validation: Sequence[Line], *, colour: str = BLUE, unit: str = ""
) -> Picture | None:
    """One number of the log: thin: each step or their range, thick: running mean, circles: held-aside cases.

    Returns: None where no line has it.
    """
    steps, values = series(training, name)
    held_steps, held = series(validation, held_name(name))
    if not len(values) and not len(held):
        return None

    def fill() -> Figure:
        figure, axes = _axes()
        _smoothed(axes, steps, values, colour, "training")
        if len(held):
            axes.plot(held_steps, held, "o", color=LIGHT["text"], ms=4.5, mfc="none", mew=1.6, label="held aside")
        for step in _stage_starts(training):
            axes.axvline(step, color=LIGHT["axis"], lw=1, ls=":")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        _from_zero(axes, [*values, *held])
        axes.legend() if len(held) else None
        return figure

    return _svg(fill)


def draw_displacement_error(training: Sequence[Line], validation: Sequence[Line]) -> Picture:
    """Mean Euclidean error of the displacement beside that of predicting zero."""

    def fill() -> Figure:
        figure, axes = _axes((5.6, 3.6))
        kinds = (("zero_error", GREY, "predicting zero", "s"), ("displacement_error", BLUE, "the method", "o"))
        for name, colour, words, marker in kinds:
            steps, values = series(training, f"monitor/{name}")
            held_steps, held = series(validation, name)
            _smoothed(axes, steps, values, colour, f"{words}, training")
            if len(held):
                axes.plot(
                    held_steps, held, ls="--", marker=marker, color=colour, ms=5, lw=1.2, mec=LIGHT["text"],
                    label=f"{words}, held aside",
                )  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("voxels")
        axes.set_ylim(bottom=0)
        axes.legend(ncols=2)
        return figure

    return _svg(fill)


def draw_overlaid(name: str, runs: Mapping[str, tuple[Sequence[Line], Sequence[Line]]]) -> Picture:
    """One number of several runs: running means as lines, held-aside cases as markers.

    Args:
        runs: {run: (training lines, validation lines)}.
    """

    def fill() -> Figure:
        figure, axes = _axes()
        everything: list[float] = []
        for number, (run, (training, validation)) in enumerate(runs.items()):
            steps, values = series(training, name)
            held_steps, held = series(validation, held_name(name))
            if not len(values) and not len(held):
                continue
            colour, label = COLOURS[number % len(COLOURS)], _short(run)
            if len(values):
                steps, means, *_ = _binned(steps, _running_mean(values))
                axes.plot(steps, means, color=colour, ls=DASHES[number % len(DASHES)], lw=1.8, label=label)
                label = ""
            if len(held):
                marker = MARKERS[number % len(MARKERS)]
                axes.plot(held_steps, held, marker, color=colour, ms=4.5, mfc="none", mew=1.4, label=label or None)
            everything += [*values, *held]
        axes.set_xlabel("step")
        _from_zero(axes, everything)
        axes.legend()
        return figure

    return _svg(fill)


def draw_dice(arms: dict[str, dict[str, list[float]]]) -> Picture:
    """Dice of each arm as dots (one a seed) with their mean, one group a class.

    Args:
        arms: {arm: {class name: one Dice a seed}}.
    """

    def fill() -> Figure:
        groups = list(dict.fromkeys(name for values in arms.values() for name in values))
        figure, axes = _axes((1.6 + 1.9 * len(groups), 3.3))
        width = 0.8 / max(3, len(arms))
        for number, (arm, values) in enumerate(arms.items()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            for place, group in enumerate(groups):
                dice = values.get(group, [])
                x = place + (number - (len(arms) - 1) / 2) * width
                axes.plot([x] * len(dice), dice, marker, color=colour, ms=6, alpha=0.75, label=arm * (place == 0))
                if dice:
                    axes.plot([x - 0.4 * width, x + 0.4 * width], [numpy.mean(dice)] * 2, color=colour, lw=2.5)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        _not_too_close(axes)
        axes.set_ylabel("Dice on test cases")
        axes.grid(visible=False, axis="x")
        axes.legend(loc="best")
        return figure

    return _svg(fill)


def draw_dice_by_labels(rows: Sequence[Row], dice: Callable[[Row], list[float]]) -> Picture:
    """Mean Dice of each arm against the number of labels; bars: standard deviation over seeds, small dots: seeds.

    Args:
        rows: of one setting.
        dice: one for each seed of a row.
    """

    def fill() -> Figure:
        figure, axes = _axes((5.6, 3.7))
        arms = list(dict.fromkeys(row.arm for row in rows))
        for number, arm in enumerate(arms):
            same = sorted((row for row in rows if row.arm == arm), key=lambda row: row.labels)
            places = _beside([row.labels for row in same], number, len(arms))
            colour = COLOURS[number % len(COLOURS)]
            for place, row in zip(places, same, strict=True):
                seeds = dice(row)
                axes.plot([place] * len(seeds), seeds, ".", color=colour, ms=4, alpha=0.6)
            axes.errorbar(
                places, [row.dice for row in same], [row.std for row in same], color=colour, lw=1.8, capsize=3,
                elinewidth=1.2, marker=MARKERS[number % len(MARKERS)], ms=5.5, ls=DASHES[number % len(DASHES)],
                label=_short(arm),
            )  # fmt: skip
        _label_axis(axes, rows)
        _not_too_close(axes)
        axes.set_ylabel("mean Dice on test cases")
        axes.legend()
        return figure

    return _svg(fill)


def draw_differences(rows: Sequence[Row]) -> Picture | None:
    """Dice of each arm minus that of the scratch arm, with 95 % intervals; None where nothing is paired."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    paired = [(row, row.difference) for row in rows if row.difference is not None]
    if not paired:
        return None

    def fill() -> Figure:
        figure, axes = _axes((5.6, 3.7))
        axes.axhline(0, color=LIGHT["text"], lw=1)
        for number, arm in enumerate(arms):
            same = sorted((pair for pair in paired if pair[0].arm == arm), key=lambda pair: pair[0].labels)
            if not same:
                continue
            means = numpy.array([found.mean for _, found in same])
            spans = numpy.array([(found.low, found.high) for _, found in same]).T
            axes.errorbar(
                _beside([row.labels for row, _ in same], number, len(arms)), means, numpy.abs(spans - means),
                color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)], ms=5.5, ls="none",
                capsize=4, lw=1.8, label=arm,
            )  # fmt: skip
        _label_axis(axes, [row for row, _ in paired])
        _not_too_close(axes)
        axes.set_ylabel("Dice minus from scratch")
        axes.legend()
        return figure

    return _svg(fill)


def _short(name: str) -> str:
    """A legend must leave room for what it explains; paths differ at their ends."""
    return name if len(name) <= 36 else f"…{name[-35:]}"


def series(lines: Sequence[Line], name: str) -> tuple[Any, Any]:
    """The steps and values of the lines that have a finite number of this name."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return numpy.array([step for step, _ in found]), numpy.array([value for _, value in found], dtype=float)


def held_name(name: str) -> str:
    """What validation calls a number of the log."""
    return name.partition("/")[2] if name.startswith(("loss/", "monitor/")) else name


def _stage_starts(lines: Sequence[Line]) -> list[int]:
    """The steps at which a later stage begins."""
    staged = [(line["step"], line["stage"]) for line in lines if "stage" in line]
    return [step for (_, before), (step, now) in itertools.pairwise(staged) if now != before]


def _running_mean(values: Any) -> Any:
    """Over the last twentieth of the run."""
    window = max(1, len(values) // 20)
    sums = numpy.cumsum(numpy.insert(values, 0, 0.0))
    ends = numpy.arange(1, len(values) + 1)
    starts = numpy.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _binned(steps: Any, values: Any) -> tuple[Any, Any, Any, Any]:
    """(steps, means, lowest, highest) of at most MOST_POINTS groups of neighbours."""
    groups = [part for part in numpy.array_split(numpy.arange(len(values)), MOST_POINTS) if len(part)]
    columns = [(steps[g[-1]], values[g].mean(), values[g].min(), values[g].max()) for g in groups]
    shown, means, lowest, highest = (numpy.array(column) for column in zip(*columns, strict=True))
    return shown, means, lowest, highest


def _smoothed(axes: Any, steps: Any, values: Any, colour: str, label: str) -> None:
    if not len(values):
        return
    if len(values) < 2 * 20:
        axes.plot(steps, values, color=colour, lw=1.8, marker="." if len(values) == 1 else None, label=label)
        return
    shown, means, lowest, highest = _binned(steps, values)
    if len(values) > MOST_POINTS:
        axes.fill_between(shown, lowest, highest, color=colour, alpha=0.25, lw=0)
    else:
        axes.plot(shown, means, color=colour, lw=0.7, alpha=0.4)
    axes.plot(shown, _binned(steps, _running_mean(values))[1], color=colour, lw=2.0, label=label)


def _axes(size: tuple[float, float] = SIZE) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, axes


def _from_zero(axes: Any, values: Sequence[float]) -> None:
    """The axis begins at zero, or below the lowest negative value."""
    if not len(values) or min(values) >= 0:
        axes.set_ylim(bottom=0)
        if not len(values) or max(values) == 0:
            axes.set_ylim(0, 1)


def _not_too_close(axes: Any) -> None:
    """At least a tenth of Dice from bottom to top: a hair's breadth must not look like a gulf."""
    low, high = axes.get_ylim()
    missing = max(0.0, 0.1 - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def _beside(labels: Sequence[int], number: int, count: int) -> list[float]:
    """Arms side by side on an axis that doubles: their bars must not hide each other."""
    return [float(label * 2 ** (0.09 * (number - (count - 1) / 2))) for label in labels]


def _label_axis(axes: Any, rows: Sequence[Row]) -> None:
    labels = sorted({row.labels for row in rows})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(labels, [str(label) for label in labels])
    axes.set_xlim(labels[0] / 2**0.6, labels[-1] * 2**0.6)
    axes.set_xlabel("labelled training cases")


def _svg(fill: Callable[[], Figure]) -> Picture:
    buffer = io.BytesIO()
    with rc_context(STYLE):
        # No date and no maker: equal numbers give an equal page.
        fill().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode("utf-8")
    for name, (light, _) in INK.items():
        text = text.replace(light, f"var(--{name})")
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in INK.items()) for i in (0, 1))
    rules = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    return Picture(re.sub(r"(<svg\b[^>]*>)", rf"\1{rules}", text, count=1).encode("utf-8"), "svg+xml")
