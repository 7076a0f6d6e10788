"""Time and memory of an operator against its size, drawn from a results file.

python -m voxtrast.benchmarks.kernels.plot RESULTS.jsonl OUT.png [--op local_correlation]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST_MB = 0.5  # what is less drowns in what the process allocates besides
Line = dict[str, Any]
Shape = dict[str, int]


@dataclass(frozen=True)
class Subject:
    """What is drawn of an operator."""

    op: str  # of the lines
    title: str
    size: str  # the entry of the shape along the axis
    size_label: str
    series: Callable[[Shape], int | None]  # lines with one answer are drawn together; None: not at all
    series_label: str
    guide_mb: Callable[[Shape], float]
    guide_label: str


def _cube(shape: Shape) -> int | None:
    return shape["radius"] if shape["D"] == shape["H"] == shape["W"] and shape["B"] == shape["units"] == 1 else None


SUBJECTS = {
    "info_nce": Subject(
        op="info_nce, symmetric",
        title="Symmetric InfoNCE",
        size="N",
        size_label="N, vectors in each set",
        series=lambda shape: shape["C"] if shape["problems"] == 1 else None,
        series_label="C",
        guide_mb=lambda shape: 4 * shape["N"] ** 2 / 2**20,
        guide_label="one N x N matrix, float32",
    ),
    "local_correlation": Subject(
        op="local_correlation",
        title="Local correlation of two volumes with 8 channels",
        size="D",
        size_label="voxels along each of the three axes",
        series=_cube,
        series_label="radius",
        guide_mb=lambda shape: 4 * 8 * (2 * shape["radius"] + 1) ** 3 * shape["D"] ** 3 / 2**20,
        guide_label="every product once, float32",
    ),
}


def read_lines(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def newest(lines: Iterable[Line], subject: Subject = SUBJECTS["info_nce"]) -> list[Line]:
    """The lines to draw: of one device and type (those of the newest line) and one series (that with the most sizes),
    the newest for each provider and size, sorted by size.

    Raises: ValueError where nothing was timed.
    """
    timed = [line for line in lines if line["op"] == subject.op and "median_s" in line and not line.get("other_work")]
    timed = [line for line in timed if subject.series(line["shape"]) is not None]
    if not timed:
        raise ValueError(f"expected timed lines of '{subject.op}', found none; run `voxtrast bench kernels`")
    timed.sort(key=lambda line: line["date"])  # stable: of one run, the last
    last = timed[-1]
    timed = [line for line in timed if all(line[name] == last[name] for name in ("device", "dtype"))]
    sizes: dict[int, set[int]] = {}
    for line in timed:
        sizes.setdefault(subject.series(line["shape"]) or 0, set()).add(line["shape"][subject.size])
    chosen_series = max(sizes, key=lambda number: (len(sizes[number]), -number))
    timed = [{**line, "provider": line["provider"].partition(", tiles of")[0]} for line in timed]
    chosen = {
        (line["provider"], line["shape"][subject.size]): line
        for line in timed
        if subject.series(line["shape"]) == chosen_series
    }
    return sorted(chosen.values(), key=lambda line: int(line["shape"][subject.size]))


def draw(lines: Iterable[Line], file: Path, subject: Subject = SUBJECTS["info_nce"]) -> None:
    """Writes the picture; the file's suffix chooses its format.

    Raises: ValueError where nothing was timed; SystemExit where matplotlib is not installed.
    """
    chosen = newest(lines, subject)
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise SystemExit("error: matplotlib is not installed; the plot needs voxtrast[report]") from missing
    figure: Any = Figure(figsize=(11.5, 4.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    time, memory = figure.subplots(1, 2)
    labelled = {}
    names = {line["provider"] for line in chosen}
    for place, name in enumerate(sorted(names, key=lambda name: (name != "ours", name))):
        own = [line for line in chosen if line["provider"] == name]
        label = "voxtrast (ours)" if name == "ours" else name
        labelled[label] = _draw_provider(time, memory, own, subject.size, place)
    last_of_size = {line["shape"][subject.size]: line for line in sorted(chosen, key=lambda line: line["date"])}
    sizes = sorted(last_of_size)
    limits = [1e3 * last_of_size[size]["limit_s"] for size in sizes]
    guides = [subject.guide_mb(last_of_size[size]["shape"]) for size in sizes]
    (limit,) = time.plot(sizes, limits, color="0.45", linestyle="--", linewidth=1.4, zorder=1)
    (guide,) = memory.plot(sizes, guides, color="0.45", linestyle=":", linewidth=1.4, zorder=1)
    labelled |= {"the limit, at the\nrates measured": limit, subject.guide_label: guide}
    _dress(time, sizes, subject.size_label, "time, ms")
    _dress(
        memory, sizes, subject.size_label, f"memory beyond inputs and gradients, MB\n({LEAST_MB} stands for less, too)"
    )
    figure.legend(list(labelled.values()), list(labelled), loc="outside right center", frameon=False)
    last = max(chosen, key=lambda line: line["date"])
    figure.suptitle(
        f"{subject.title}, forward and backward, {subject.series_label} = {subject.series(last['shape'])}, "
        f"{last['dtype']}\n{last['device']}, {last['date'][:10]}, commit {last['commit']}",
        fontsize="medium",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _draw_provider(time: Any, memory: Any, lines: list[Line], size: str, place: int) -> Any:
    """One line in each panel; ours, the first, stands out."""
    style: dict[str, Any] = {"color": f"C{place}", "marker": "osD^vP*X<>h"[place % 11], "markersize": 5}
    if place == 0:
        style |= {"color": "black", "linewidth": 2.6, "zorder": 3}
    (handle,) = time.plot([line["shape"][size] for line in lines], [1e3 * line["median_s"] for line in lines], **style)
    measured = [line for line in lines if line.get("peak_memory_mb") is not None]
    found = [max(line["peak_memory_mb"], LEAST_MB) for line in measured]
    memory.plot([line["shape"][size] for line in measured], found, **style)
    return handle


def _dress(axes: Any, sizes: list[int], size_label: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(size_label)
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m voxtrast.benchmarks.kernels.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines of any number of runs")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--op", choices=sorted(SUBJECTS), default="info_nce")
    chosen = parser.parse_args(arguments)
    try:
        draw(read_lines(chosen.results), chosen.picture, SUBJECTS[chosen.op])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
