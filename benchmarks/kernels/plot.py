"""Time and memory of symmetric InfoNCE against the number of vectors, drawn from a results file.

python -m voxtrast.benchmarks.kernels.plot RESULTS.jsonl OUT.png
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OP = "info_nce, symmetric"
LEAST_MB = 0.5  # what is less drowns in what the process allocates besides
Line = dict[str, Any]


def read_lines(file: Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def newest(lines: Iterable[Line]) -> list[Line]:
    """The lines to draw: of one device and type (those of the newest line) and one C (that with the most sizes), the
    newest for each provider and size, sorted by size.

    Raises: ValueError where nothing was timed.
    """
    timed = [line for line in lines if line["op"] == OP and line["shape"]["problems"] == 1 and "median_s" in line]
    if not timed:
        raise ValueError(f"expected timed lines of '{OP}' with one problem, found none; run `voxtrast bench kernels`")
    timed.sort(key=lambda line: line["date"])  # stable: of one run, the last
    last = timed[-1]
    timed = [line for line in timed if all(line[name] == last[name] for name in ("device", "dtype"))]
    sizes: dict[int, set[int]] = {}
    for line in timed:
        sizes.setdefault(line["shape"]["C"], set()).add(line["shape"]["N"])
    channels = max(sizes, key=lambda number: (len(sizes[number]), -number))
    timed = [{**line, "provider": line["provider"].partition(", tiles of")[0]} for line in timed]
    chosen = {(line["provider"], line["shape"]["N"]): line for line in timed if line["shape"]["C"] == channels}
    return sorted(chosen.values(), key=lambda line: int(line["shape"]["N"]))


def draw(lines: Iterable[Line], file: Path) -> None:
    """Writes the picture; the file's suffix chooses its format.

    Raises: ValueError where nothing was timed; SystemExit where matplotlib is not installed.
    """
    chosen = newest(lines)
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise SystemExit("error: matplotlib is not installed; the plot needs voxtrast[demo]") from missing
    figure: Any = Figure(figsize=(11.5, 4.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    time, memory = figure.subplots(1, 2)
    labelled = {}
    names = {line["provider"] for line in chosen}
    for place, name in enumerate(sorted(names, key=lambda name: (name != "ours", name))):
        own = [line for line in chosen if line["provider"] == name]
        labelled["voxtrast (ours)" if name == "ours" else name] = _draw_provider(time, memory, own, place)
    last_of_size = {line["shape"]["N"]: line for line in sorted(chosen, key=lambda line: line["date"])}
    sizes = sorted(last_of_size)
    limits = [1e3 * last_of_size[size]["limit_s"] for size in sizes]
    matrices = [4 * size**2 / 2**20 for size in sizes]
    (limit,) = time.plot(sizes, limits, color="0.45", linestyle="--", linewidth=1.4, zorder=1)
    (matrix,) = memory.plot(sizes, matrices, color="0.45", linestyle=":", linewidth=1.4, zorder=1)
    labelled |= {"products and exponentials\nat the rates measured": limit, "one N x N matrix, float32": matrix}
    _dress(time, sizes, "time, ms")
    _dress(memory, sizes, f"memory beyond inputs and gradients, MB\n({LEAST_MB} stands for less, too)")
    figure.legend(list(labelled.values()), list(labelled), loc="outside right center", frameon=False)
    last = max(chosen, key=lambda line: line["date"])
    figure.suptitle(
        f"Symmetric InfoNCE, forward and backward, C = {last['shape']['C']}, {last['dtype']}\n"
        f"{last['device']}, {last['date'][:10]}, commit {last['commit']}",
        fontsize="medium",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _draw_provider(time: Any, memory: Any, lines: list[Line], place: int) -> Any:
    """One line in each panel; ours, the first, stands out."""
    style: dict[str, Any] = {"color": f"C{place}", "marker": "osD^vP*X<>h"[place % 11], "markersize": 5}
    if place == 0:
        style |= {"color": "black", "linewidth": 2.6, "zorder": 3}
    (handle,) = time.plot([line["shape"]["N"] for line in lines], [1e3 * line["median_s"] for line in lines], **style)
    measured = [line for line in lines if line.get("peak_memory_mb") is not None]
    found = [max(line["peak_memory_mb"], LEAST_MB) for line in measured]
    memory.plot([line["shape"]["N"] for line in measured], found, **style)
    return handle


def _dress(axes: Any, sizes: list[int], label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
    axes.set_xlabel("N, vectors in each set")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m voxtrast.benchmarks.kernels.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines of any number of runs")
    parser.add_argument("picture", type=Path)
    chosen = parser.parse_args(arguments)
    try:
        draw(read_lines(chosen.results), chosen.picture)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
