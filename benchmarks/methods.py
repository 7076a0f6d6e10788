"""What each method costs and whether it learns: one row a run, from real volumes.

voxtrast bench methods RUN... [--output FILE]             rows of finished runs
voxtrast bench methods --data STORE --into FOLDER [--recipes A,B] [--steps N] [key=value ...]

The second form pretrains each recipe (the tiny ones by default) with the words of `voxtrast pretrain`, one after the
other; a run that is there already is continued or left alone. Time and memory are those of the run's log. The spread of
the embeddings is measured on held-aside views, the same before and after training, with the method's own embeddings.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from voxtrast.engine.config import read_config
from voxtrast.engine.errors import UserError
from voxtrast.engine.runs import LoadedRun, build_method, load_run
from voxtrast.engine.validation_views import validation_views
from voxtrast.methods import Batch, Method, recipe_names
from voxtrast.methods.parts.monitors import EmbeddingMonitor, effective_rank, embedding_std

from .harness import append
from .machine import machine, results_file

EMBEDDINGS = 128  # looked at
ENDS = 10  # steps whose mean loss is the start, and the end; a bank is full at the start


def batches_aside(run: LoadedRun) -> Iterator[Batch]:
    """Views of the held-aside cases; those of training where none is."""
    with validation_views(run, run.validation_cases or run.cases) as views:
        for [batch] in views:
            yield batch


@contextmanager
def embeddings_seen() -> Iterator[list[Tensor]]:
    """What methods show their monitors while this lasts: that which is asked first, where there are several."""
    seen: list[Tensor] = []
    asked: list[EmbeddingMonitor] = []

    def see(monitor: EmbeddingMonitor, vectors: Tensor) -> None:
        asked.append(monitor)
        if monitor is asked[0]:
            seen.append(vectors.detach().float())

    with mock.patch.object(EmbeddingMonitor, "see", see):
        yield seen


@torch.no_grad()
def spread(method: Method, batches: Sequence[Batch], step: int) -> dict[str, float]:
    """Standard deviation and effective rank of the embeddings; nothing for a method that shows none."""
    method.eval()
    with embeddings_seen() as seen:
        for batch in batches:
            method(dict(batch), step)
    if not seen:
        return {}
    vectors = torch.cat(seen)
    return {"std": embedding_std(vectors).item(), "rank": effective_rank(vectors).item()}


def batches_for(run: LoadedRun) -> list[Batch]:
    """As many as give EMBEDDINGS vectors."""
    source, count = batches_aside(run), 0
    batches: list[Batch] = []
    while count < EMBEDDINGS and len(batches) < EMBEDDINGS:
        batches.append(next(source))
        with embeddings_seen() as seen, torch.no_grad():
            run.method(dict(batches[-1]), run.step)
        if not seen:
            break
        count += sum(len(vectors) for vectors in seen)
    return batches


def row_of(path: Path) -> dict[str, Any]:
    """Raises: UserError where the folder holds no run with a checkpoint."""
    run = load_run(path)
    config = run.config
    log = [json.loads(line) for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = batches_for(run)
    before, after = spread(build_method(config), batches, 0), spread(run.method, batches, run.step)
    views = run.method.views.views
    seconds = [config.train.global_batch / line["samples_per_second"] for line in log[1:] or log]
    trained = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    return {
        "op": f"training of {config.recipe}",
        "recipe": config.recipe,
        "store": Path(config.data).name,
        "steps": run.step,
        "batch": config.train.global_batch,
        "parameters": sum(p.numel() for p in run.method.parameters()),
        "trained_parameters": trained,
        "views_a_sample": len(views),
        "crop": list(config.views.crop),
        "median_s": statistics.median(seconds),
        "samples_a_second": config.train.global_batch / statistics.median(seconds),
        "data_wait": statistics.mean(line["data_wait"] for line in log),
        "memory_mb": max(line["memory_mb"] for line in log),
        "losses": losses_of(log),
        "std": [before.get("std"), after.get("std")],
        "rank": [before.get("rank"), after.get("rank")],
        "warnings": sum("warning" in line for line in log),
    }


def losses_of(log: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Each term's mean over the first and the last steps that had it; the sum's too, of a run of a single stage.

    The first are the first with a full bank, where there is one: while it fills, the contrast grows with the number of
    true negatives, whatever the network learns.
    """
    full = [line for line in log if line.get("monitor/bank_filled", 1) == 1]
    whole = [] if any("stage" in line for line in log) else ["loss"]
    names = whole + sorted({name for line in log for name in line if name.startswith(("loss/", "adversary/"))})
    found = {}
    for name in names:
        values = [line[name] for line in full or log if name in line]
        if values:
            found[name.removeprefix("loss/")] = [statistics.mean(values[:ENDS]), statistics.mean(values[-ENDS:])]
    return found


HEADINGS = (
    "recipe", "store", "steps x batch", "parameters, M", "views a step", "s a step", "samples/s", "MB",
    "losses", "embedding std", "effective rank", "warnings",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    def pair(numbers: Sequence[float | None], form: str) -> str:
        return " -> ".join("-" if number is None else format(number, form) for number in numbers)

    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    lines += [
        (
            row["recipe"],
            row["store"],
            f"{row['steps']} x {row['batch']}",
            f"{row['trained_parameters'] / 1e6:.2f} of {row['parameters'] / 1e6:.2f}",
            str(row["views_a_sample"] * row["batch"]),
            f"{row['median_s']:.2f}",
            f"{row['samples_a_second']:.2f}",
            f"{row['memory_mb']:.0f}",
            "; ".join(f"{name} {pair(ends, '.4g')}" for name, ends in row["losses"].items()),
            pair(row["std"], ".3f"),
            pair(row["rank"], ".1f"),
            str(row["warnings"]),
        )
        for row in rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def train(recipes: Sequence[str], store: Path, folder: Path, steps: int, words: Sequence[str]) -> list[Path]:
    """The runs' folders; a run that fails is said and left out."""
    runs = []
    for recipe in recipes:
        run = folder / f"{recipe}-{store.name}"
        command = [sys.executable, "-m", "voxtrast.engine.pretrain", recipe, f"data={store}", f"output={run}"]
        command += [f"train.steps={steps}", "validation.every=0", "loader.verify=sizes", *words]
        print(" ".join(command[1:]), file=sys.stderr)
        if subprocess.run(command).returncode:
            print(f"{recipe}: failed, no row", file=sys.stderr)
        else:
            runs.append(run)
    return runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench methods", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="RUN | key=value", help="runs to tell of, or settings for all")
    parser.add_argument("--data", type=Path, metavar="STORE", help="train on it first")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="of the runs")
    parser.add_argument("--recipes", help="A,B,...; default: all that end in -tiny")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE or FOLDER/DEVICE.jsonl")
    chosen = parser.parse_intermixed_args(arguments)
    if bool(chosen.data) != bool(chosen.into):
        parser.error("--data and --into go together")
    if not chosen.data and not chosen.words:
        parser.error("expected folders of runs, or --data STORE --into FOLDER")
    try:
        if chosen.data:
            tiny = [name for name in recipe_names() if name.endswith("-tiny")]
            recipes = chosen.recipes.split(",") if chosen.recipes else tiny
            runs = train(recipes, chosen.data, chosen.into, chosen.steps, chosen.words)
        else:
            runs = [Path(word) for word in chosen.words]
            for run in runs:
                read_config(run / "config.yaml")
        rows = [row_of(run) for run in runs]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = machine()
    print(about["device"])
    print(table(rows))
    if chosen.output:
        lines = [{**about, **row, "provider": "ours"} for row in rows]
        append(lines, results_file(chosen.output, about["device"]))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
