"""The engine's step on one and more ranks, for each ZeRO stage and precision, by its parts.

voxtrast bench scaling RECIPE data=STORE [key=value ...] [--ranks 1,2] [--zero 0,1,2,3] [--precision none,bfloat16]
                       [--steps N] [--synthetic] [--output FILE] [--plot PICTURE]

Every row is a launch of its own with the same global batch, so that more ranks have less work each. Rows of
one rank without ZeRO also take turns with a bare torch loop of the same method: what the engine costs beyond it is
its bookkeeping, logging among it. `--synthetic` repeats one batch, so that nothing waits for data. Collectives are made
to end where they are called: overlap of communication and computing is not counted in its favour.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxtrast.engine.config import load_config
from voxtrast.engine.errors import UserError
from voxtrast.engine.meeting import free_port
from voxtrast.engine.precision import AUTOCAST

from .harness import append
from .machine import machine, results_file
from .scaling_rank import PARTS

Row = dict[str, Any]


def launch(recipe: str, words: Sequence[str], ranks: int, steps: int, options: Sequence[str], folder: Path) -> Row:
    """Raises: UserError with the end of what a launch that failed said."""
    result = folder / f"{ranks}-{len(list(folder.iterdir()))}.json"
    cores = len(os.sched_getaffinity(0))
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), "--module", "voxtrast.benchmarks.scaling_rank", recipe, *words]
    command += [f"train.threads={max(1, cores // ranks)}", "--steps", str(steps), "--result", str(result), *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
    if done.returncode or not result.exists():
        raise UserError(f"{ranks} rank(s): {_last_words(done.stderr)}")
    found: Row = json.loads(result.read_text(encoding="utf-8"))
    return found


def _last_words(said: str) -> str:
    lines = [line for line in said.splitlines() if "Error" in line or line.startswith("error")]
    return (lines or said.splitlines() or ["it ended without a word"])[-1]


def table(rows: Sequence[Row]) -> str:
    heading = ["ranks", "ZeRO", "precision", "s a step", "samples/s", *(f"{part} %" for part in PARTS), "MB a rank"]
    lines = ["  ".join(f"{cell:>13}" for cell in heading)]
    for row in rows:
        shares = [f"{100 * row['parts_s'][part] / row['median_s']:.1f}" for part in PARTS]
        cells = [str(row[key]) for key in ("ranks", "zero_stage", "precision")]
        cells += [f"{row['median_s']:.3f}", f"{row['samples_a_second']:.2f}"]
        lines.append("  ".join(f"{cell:>13}" for cell in [*cells, *shares, f"{row['memory_mb']:.0f}"]))
    for row in rows:
        if "bare_s" in row:
            beyond = row["engine_s"] / row["bare_s"] - 1
            lines.append(
                f"{row['precision']}, without data: engine {row['engine_s']:.4f} s, bare loop {row['bare_s']:.4f} s: "
                f"{beyond:+.1%}"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Stacked seconds by part, a bar a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.1 * len(rows), 4.5), layout="constrained")
    axes = figure.add_subplot()
    names = [
        f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}\nZeRO {row['zero_stage']}"
        + f"\n{row['precision']}" * (len({each["precision"] for each in rows}) > 1)
        for row in rows
    ]
    bottom = [0.0] * len(rows)
    for part in PARTS:
        seconds = [row["parts_s"][part] for row in rows]
        axes.bar(names, seconds, bottom=bottom, label=part)
        bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
    axes.set_ylabel("seconds a step")
    axes.set_title(f"{rows[0]['recipe']}, batch {rows[0]['batch']}, {rows[0]['device']}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="data=STORE train.global_batch=4 ...")
    parser.add_argument("--ranks", default="1,2", help="A,B,... (default: 1,2)")
    parser.add_argument("--zero", default="0,1", help="stages A,B,... of 0 to 3 (default: 0,1)")
    parser.add_argument("--precision", default="none", help="train.autocast: none,bfloat16,float16 (default: none)")
    parser.add_argument("--steps", type=int, default=20, help="counted, after a few that warm up (default: 20)")
    parser.add_argument("--synthetic", action="store_true", help="one batch again and again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE or FOLDER/DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, metavar="PICTURE")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        ranks, stages = _numbers("ranks", chosen.ranks, range(1, 4097)), _numbers("zero", chosen.zero, range(4))
        precisions = chosen.precision.split(",")
        for each in precisions:
            if each not in AUTOCAST:
                raise UserError(f"--precision: expected some of {', '.join(AUTOCAST)}, got {each!r}")
        config = load_config(chosen.recipe, chosen.settings)
        if not config.data:
            raise UserError("data: not given; say data=STORE")
        about = machine()
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder:
            for size, stage, precision in itertools.product(ranks, stages, precisions):
                bare = size == 1 and stage == 0
                options = ["--synthetic"] * chosen.synthetic + ["--bare"] * bare
                words = [*chosen.settings, f"deepspeed.zero_stage={stage}", f"train.autocast={precision}"]
                found = launch(chosen.recipe, words, size, chosen.steps, options, Path(folder))
                rows.append({**about, "op": f"engine's step of {config.recipe}", "recipe": config.recipe,
                             "provider": "ours", "ranks": size, "zero_stage": stage, "precision": precision,
                             "steps": chosen.steps, "synthetic": chosen.synthetic, **found})  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(about["device"], config.recipe, "batch", rows[0]["batch"], "crop", rows[0]["crop"])
    print(table(rows))
    if chosen.output:
        append(rows, results_file(chosen.output, about["device"]))
    if chosen.plot:
        plot(rows, chosen.plot)
    return 0


def _numbers(name: str, text: str, possible: range) -> list[int]:
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        raise UserError(f"--{name}: expected numbers as in 1,2, got {text!r}") from None
    for each in found:
        if each not in possible:
            raise UserError(f"--{name}: expected numbers from {possible[0]} to {possible[-1]}, got {each}")
    return found


if __name__ == "__main__":
    sys.exit(main())
