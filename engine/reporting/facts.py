"""The sections of a report that are words and numbers: what a run is, its settings, its speed, where it ran."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ...methods.stages import Stage
from ..checkpoint import finished_checkpoints
from ..config import Config, load_config, settings_of
from ..data.store import Case
from ..errors import UserError
from ..runs import LoadedRun
from ..starts import read_starts
from ..weights import RUN_WEIGHTS, load_weights
from . import page

Line = dict[str, Any]
OF_THE_RUN = ("data", "data_sha256", "output", "recipe")  # of every run its own
SPEED = (
    "Waiting: until the views of the next step were there. Saving: what a checkpoint keeps the next step from; it is "
    "written beside the training. Validation is in none of them."
)


def what_it_is(run: Path, config: Config, training: Sequence[Line], loaded: LoadedRun | None) -> list[str]:
    """Method, recipe, network, data, steps and files."""
    optimizer, backbone, batch = config.optimizer, config.backbone, config.train.global_batch
    done = training[-1]["step"] if training else 0
    rows = [
        ("method, recipe", f"{config.method.name}, {config.recipe}"),
        (
            "network",
            f"{backbone.architecture}, {backbone.norm} norm, channels {', '.join(map(str, backbone.features))}",
        ),
        ("steps", f"{done} of {config.train.steps}" + ("" if done >= config.train.steps else " (not finished)")),
        ("batch, seed", f"{batch} samples a step, seed {config.seed}"),
        ("crop", f"{_times(config.views.crop)} voxels"),
        (
            "optimizer",
            f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {config.schedule.name} schedule, "
            f"{config.schedule.warmup_steps} warm-up steps",
        ),
    ]
    if config.stages:
        batches = _batches(config)
        rows.append(("stages", "; ".join(_stage(stage, batches[stage.name]) for stage in config.stages)))
    if loaded is not None:
        parameters = sum(parameter.numel() for parameter in loaded.method.parameters())
        counts = f"{len(loaded.cases)} to train on, {len(loaded.validation_cases)} held aside"
        rows.insert(2, ("parameters", f"{parameters / 1e6:.2f} million"))
        rows.insert(3, ("volumes", f"{counts}; {_sizes(loaded.store.cases)}"))
    rows += [("checkpoints", _checkpoints(run)), ("weights", _weights(run))]
    return [page.table(("", ""), rows)]


def _checkpoints(run: Path) -> str:
    steps = [step for step, _ in finished_checkpoints(run / "checkpoints")]
    return f"of step {', '.join(map(str, steps))}" if steps else "none yet"


def _weights(run: Path) -> str:
    path = run / RUN_WEIGHTS
    if not path.is_file():
        return f"{RUN_WEIGHTS} is not there yet: the end of the run writes it"
    try:
        tensors, description = load_weights(path)
    except UserError as error:
        return str(error)
    untrained = description.get("untrained", [])
    rest = f"; {len(untrained)} of them have their initial values" if untrained else ""
    size = path.stat().st_size / 1e6
    return f"{RUN_WEIGHTS}, step {description.get('step', '–')}, {len(tensors)} tensors, {size:.1f} MB{rest}"


def configuration(config: Config) -> list[str]:
    """What was set otherwise than in the recipe, and everything."""
    own = settings_of(config)
    everything = page.folded(f"All {len(own)} settings", page.table(("setting", "value"), _shown(own)))
    places = [("data", config.data), ("output", config.output)]
    try:
        of_recipe = settings_of(load_config(config.recipe))
    except UserError as error:
        words = f"The recipe cannot be read any more, so the settings are not compared with it: {error}."
        return [page.table(("", ""), places), page.note(words), everything]
    changed = [
        (key, _value(of_recipe.get(key, "–")), _value(own.get(key, "–")))
        for key in sorted(set(own) | set(of_recipe))
        if own.get(key) != of_recipe.get(key) and key not in OF_THE_RUN
    ]
    if changed:
        difference = page.table(("setting", f"in {config.recipe}", "in this run"), changed)
    else:
        difference = page.paragraph(f"All other settings are those of {config.recipe}.")
    return [page.table(("", ""), places), difference, everything]


def _shown(settings: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, _value(value)) for key, value in sorted(settings.items())]


def _value(value: Any) -> str:
    return "–" if value is None or value == "" else str(value)


def speed(config: Config, training: Sequence[Line]) -> list[str]:
    """Where the time of the steps went."""
    batches, batch = _batches(config), config.train.global_batch
    timed = [line for line in training if line.get("samples_per_second")]
    if not timed:
        return [page.note("No step is in log.jsonl yet, so nothing was timed.")]
    seconds = [batches.get(line.get("stage", ""), batch) / line["samples_per_second"] for line in timed]
    waits = [second * line.get("data_wait", 0.0) for second, line in zip(seconds, timed, strict=True)]
    saves = [line.get("save_seconds") or 0.0 for line in training]
    work = [second - wait for second, wait in zip(seconds, waits, strict=True)]
    whole = sum(seconds) + sum(saves)
    rate = median(line["samples_per_second"] for line in timed)
    parts = [("waiting for views", waits), ("forward, backward, optimizer", work), ("saving checkpoints", saves)]
    rows = [
        (name, f"{sum(part):.1f}", f"{sum(part) / max(whole, 1e-12):.1%}", f"{1000 * median(part):.1f}")
        for name, part in parts
    ]
    rows.append(("sum", f"{whole:.1f}", "100.0%", ""))
    words = (
        f"{sum(seconds):.0f} s for {len(seconds)} steps, median {median(seconds):.2f} s a step, {rate:.2f} samples/s"
    )
    if memory := [line["memory_mb"] for line in training if isinstance(line.get("memory_mb"), int | float)]:
        words += f"; {max(memory):.0f} MB of memory at most"
    if skipped := max((line.get("skipped") or 0 for line in training), default=0):
        words += f"; {skipped:g} steps were skipped"
    else:
        words += "; no step was skipped"
    table = page.table(("part", "seconds", "share", "median of a step (ms)"), rows)
    return [page.paragraph(words + "."), table, page.faint(SPEED)]


def where_it_ran(run: Path) -> list[str]:
    """Every start of the run: device, commit and versions."""
    starts = read_starts(run)
    if not starts:
        return [page.note("Not known: the run has no starts.jsonl, which pretraining writes as it starts.")]
    header = ("start (UTC)", "after step", "device", "ranks", "threads", "commit", "versions")
    rows = []
    for start in starts:
        known = start.get("versions")
        packages = [f"{name} {found}" for name, found in known.items()] if isinstance(known, dict) else []
        date = str(start.get("date", "–")).partition("+")[0].replace("T", " ")
        numbers = (start.get(name, "–") for name in ("ranks", "threads"))
        rows.append((
            date, start.get("step", "–"), start.get("device", "–"), *numbers,
            start.get("commit") or "–", ", ".join(packages),
        ))  # fmt: skip
    return [page.table(header, rows)]


def _batches(config: Config) -> dict[str, int]:
    return {stage.name: stage.global_batch or config.train.global_batch for stage in config.stages}


def _stage(stage: Stage, batch: int) -> str:
    terms = ", ".join(stage.terms) or "all terms"
    return f"{stage.name}: {terms}, {batch} samples a step, from {stage.start}"


def _sizes(cases: Sequence[Case]) -> str:
    shapes = sorted({case.shape for case in cases})
    spacings = sorted({f"{size:g}" for case in cases for size in case.spacing_mm})
    sizes = ", ".join(_times(shape) for shape in shapes)
    if len(shapes) > 3:
        low, high = (_times(bound(axis) for axis in zip(*shapes, strict=True)) for bound in (min, max))
        sizes = f"between {low} and {high}"
    return f"{sizes} voxels of {', '.join(spacings)} mm"


def _times(sides: Any) -> str:
    return " × ".join(map(str, sides))
