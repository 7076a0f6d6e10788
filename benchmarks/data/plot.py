"""Views a second against the size of the crop, a line for each row, drawn from a results file.

python -m voxtrast.benchmarks.data.plot RESULTS.jsonl OUT.png
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..kernels.plot import read_lines
from .rows import OURS

Line = dict[str, Any]


def newest(lines: Iterable[Line]) -> list[Line]:
    """Of the device and number of workers of the newest line: the newest line for each row and size, sorted by size.

    Raises: ValueError where nothing was measured.
    """
    measured = [line for line in lines if line["op"] == "views" and "views_per_s" in line]
    if not measured:
        raise ValueError("expected measured lines of 'views', found none; run `voxtrast bench data`")
    measured.sort(key=lambda line: line["date"])  # stable: of one run, the last
    last = measured[-1]
    alike = [line for line in measured if all(line[name] == last[name] for name in ("device", "workers"))]
    chosen = {(line["provider"], line["shape"]["crop"]): line for line in alike}
    return sorted(chosen.values(), key=lambda line: int(line["shape"]["crop"]))


def draw(lines: Iterable[Line], file: Path) -> None:
    """Writes the picture; the file's suffix chooses its format.

    Raises: ValueError where nothing was measured; SystemExit where matplotlib is not installed.
    """
    chosen = newest(lines)
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
    except ImportError as missing:
        raise SystemExit("error: matplotlib is not installed; the plot needs voxtrast[report]") from missing
    figure: Any = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(line["provider"] for line in sorted(chosen, key=lambda line: -line["views_per_s"]))
    for place, name in enumerate(names):
        own = [line for line in chosen if line["provider"] == name]
        style: dict[str, Any] = {"color": f"C{place % 10}", "marker": "osD^vP*X<>h"[place % 11], "markersize": 5}
        if name.startswith(OURS):
            style |= {"color": "black", "linewidth": 2.6 if name == OURS else 1.4, "zorder": 3}
            style["linestyle"] = "-" if name == OURS else "--" if "alone" in name else ":"
        rates = {line["shape"]["crop"]: line["views_per_s"] for line in own}
        axes.plot(list(rates), list(rates.values()), label=_label(own), **style)
    sizes = sorted({line["shape"]["crop"] for line in chosen})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size}^3" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("voxels of a view, float32")
    axes.set_ylabel("views a second")
    axes.grid(True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    last = max(chosen, key=lambda line: line["date"])
    figure.suptitle(
        "Crop, affine, elastic, flips, gamma, brightness, contrast, noise\n"
        f"{last['device']}, {last['workers']} workers, {last['date'][:10]}, commit {last['commit']}",
        fontsize="medium",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _label(lines: list[Line]) -> str:
    name, lacks = lines[-1]["provider"], lines[-1]["lacks"]
    name = name.replace(OURS, "voxtrast (ours)", 1) if name.startswith(OURS) else name
    return f"{name}\n({', '.join(lacks)})" if lacks else name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m voxtrast.benchmarks.data.plot", description=__doc__)
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
