"""Several runs beside each other: a table, and their numbers in one picture each."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..config import Config
from . import page

Line = dict[str, Any]
Logs = tuple[Sequence[Line], Sequence[Line]]  # training, validation

ALWAYS = ("loss", "learning_rate", "samples_per_second", "data_wait")
MOST_PICTURES = 12
OVERLAID = (
    "Lines: running means over a twentieth of each run; markers: cases held aside. Losses of different methods, or of "
    "different terms, cannot be compared with each other."
)


def results(runs: Mapping[str, tuple[Config, Logs]]) -> list[str]:
    """A line a run: how far it came, its losses, its speed, and the displacement error where one has it."""
    displacement = any(held_aside_error(line) for _, (_, held) in runs.values() for line in held)
    rows = []
    for name, (config, (training, validation)) in runs.items():
        steps = f"{training[-1]['step'] if training else 0} of {config.train.steps}"
        losses = [line["loss"] for line in validation if isinstance(line.get("loss"), int | float)]
        rates = [line["samples_per_second"] for line in training if line.get("samples_per_second")]
        row = [name, config.method.name, config.recipe, steps, *_ends(losses, ".4g")]
        if displacement:
            errors = [found for line in validation if (found := held_aside_error(line))]
            row += [*_ends([error for error, _ in errors], ".2f"), f"{errors[-1][1]:.2f}" if errors else "–"]
        rows.append((*row, f"{median(rates):.2f}" if rates else "–"))
    header = ["run", "method", "recipe", "steps", "loss, held aside, at first", "at last"]
    if displacement:
        header += ["displacement error (voxels) at first", "at last", "predicting zero"]
    blocks = [page.table([*header, "samples/s"], rows)]
    if displacement:
        words = "Displacement error: mean Euclidean distance over the valid voxels of the cases held aside."
        blocks.append(page.faint(words))
    if any(config.stages for config, _ in runs.values()):
        blocks.append(page.faint("Where stages change what the loss is of, first and last are not of the same terms."))
    return blocks


def overlaid(logs: Mapping[str, Logs]) -> list[str]:
    """The numbers that at least two runs have."""
    from . import curves

    names = [name for name in ALWAYS if _shared(logs, name)]
    known = sorted({key for training, _ in logs.values() for line in training for key in line})
    terms = [key for prefix in ("loss/", "monitor/") for key in known if key.startswith(prefix)]
    names += [key for key in terms if _shared(logs, key)]
    if not names:
        return [page.note("No two runs have steps in their logs yet.")]
    figures = []
    for name in names[:MOST_PICTURES]:
        having = ", ".join(run for run, log in logs.items() if _has(log, name))
        figures.append(
            page.figure(
                curves.draw_overlaid(name, logs), title_of(name), alt=f"{title_of(name)} over steps of {having}"
            )
        )
    left = f" Not drawn: {', '.join(title_of(name) for name in names[MOST_PICTURES:])}."
    return [page.grid(figures), page.faint(OVERLAID + left * (len(names) > MOST_PICTURES))]


def title_of(name: str) -> str:
    """A number of the log in words."""
    known = {
        "loss": "total loss",
        "data_wait": "share of time waiting for views",
        "samples_per_second": "samples per second",
        "memory_mb": "memory (MB)",
        "skipped": "steps skipped so far",
        "save_seconds": "seconds held by saves",
    }
    words = known.get(name, name.removeprefix("monitor/").replace("_", " "))
    return f"loss: {words.removeprefix('loss/')}" if words.startswith("loss/") else words.replace("/", ": ")


def held_aside_error(line: Line) -> tuple[float, float] | None:
    """(error, error of predicting zero) in voxels, of a validation line that has them."""
    error, zero = line.get("displacement_error"), line.get("zero_error")
    return (error, zero) if isinstance(error, int | float) and isinstance(zero, int | float) else None


def _ends(values: Sequence[float], form: str) -> tuple[str, str]:
    return (format(values[0], form), format(values[-1], form)) if values else ("–", "–")


def _has(log: Logs, name: str) -> bool:
    return any(isinstance(line.get(name), int | float) for line in log[0])


def _shared(logs: Mapping[str, Logs], name: str) -> bool:
    return sum(_has(log, name) for log in logs.values()) > 1
