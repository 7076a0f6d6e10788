"""Label-efficiency tables from the lines of `finetune.jsonl`.

One table per setting: runs on another store, backbone, budget or set of test cases are not comparable and never share
one. A pretrained arm is paired with the scratch arm seed by seed and case by case. The interval of the difference is
a percentile bootstrap over seeds and test cases: over cases alone it would call the luck of one training run a result.
With one seed it knows nothing of that luck, with two or three little.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from .inference import AXES, OVERLAP
from .scoring import DISTANCES
from .tuning import Tuning

SETTINGS = ("store_sha256", "backbone", "steps", "batch", "learning_rate", "weight_decay", "crop", "flips")
# Settings that lines of before lack, with what was done then.
LATER_SETTINGS = {"overlap": OVERLAP, "mirror": [], "autocast": "none"}
RESAMPLES = 10_000
HEADINGS = ("labels", "arm", "seeds", "Dice", "per class", "difference to scratch", "95 % interval", "cases better")
DISTANCE_HEADINGS = ("HD95 mm", "surface distance mm", "missed", "spurious")


@dataclass(frozen=True)
class Difference:
    """Pretrained minus scratch, mean Dice per case, averaged over the seeds that both arms have."""

    mean: float
    low: float  # 95 % interval over seeds and test cases
    high: float
    better: int  # cases with a higher Dice than from scratch
    cases: int
    seeds: int


@dataclass(frozen=True)
class Distance:
    """Between surfaces in mm, over the cases and classes that prediction and label both have."""

    mean: float  # over seeds
    std: float  # over seeds; 0 for one seed


@dataclass(frozen=True)
class Row:
    setting: str
    labels: int
    arm: str  # "scratch", or "pretrained" with the method and the weights' checksum
    seeds: tuple[int, ...]
    dice: float  # mean over seeds of the mean over cases
    std: float  # over seeds; 0 for one seed
    classes: dict[str, float]
    difference: Difference | None  # None for scratch, and where no seed is shared
    distances: dict[str, Distance] = field(default_factory=dict)  # "hd95", "surface_distance"; what was measured
    left_out: dict[str, int] = field(default_factory=dict)  # "missed", "spurious": in how many cases and classes


def read_lines(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """The runs of one or more `finetune.jsonl`, or of folders that hold one.

    Raises: UserError for a missing file or a broken line.
    """
    lines: list[dict[str, Any]] = []
    for given in paths:
        path = Path(given) / "finetune.jsonl" if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the finetune.jsonl that `voxtrast finetune` writes")
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = json.loads(text)
                _key(line), _words(line)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: not a run of `voxtrast finetune` ({error!r}); remove the line"
                ) from error
            lines.append(line)
    return lines


def label_table(lines: list[dict[str, Any]], *, seed: int = 0) -> list[Row]:
    """Rows by setting, labels and arm. A run that was repeated counts once, the last time.

    Args:
        lines: from `read_lines`.
        seed: of the bootstrap.
    """
    last: dict[tuple[str, int, str, int], dict[str, Any]] = {}
    for line in lines:
        last[_key(line)] = line
    words: dict[str, str] = {}
    for line in lines:
        words.setdefault(setting_of(line), _words(line))
    groups: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for (setting, labels, arm, run_seed), line in last.items():
        groups.setdefault((setting, labels, arm), {})[run_seed] = line
    order = sorted(groups, key=lambda group: (words[group[0]], group[1], group[2] != "scratch", group[2]))
    return [
        _row((words[group[0]], *group[1:]), groups[group], groups.get((*group[:2], "scratch"), {}), seed)
        for group in order
    ]


def to_markdown(rows: list[Row]) -> str:
    """Plain tables, one a setting."""
    parts = []
    for setting in dict.fromkeys(row.setting for row in rows):
        headings, cells = _columns([row for row in rows if row.setting == setting])
        lines = [" | ".join(headings), " | ".join(["---"] * len(headings)), *(" | ".join(each) for each in cells)]
        parts.append("\n".join([f"{setting}\n", *(f"| {line} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def to_rich(rows: list[Row]) -> list[Table]:
    """The same tables for the terminal."""
    tables = []
    for setting in dict.fromkeys(row.setting for row in rows):
        table = Table(title=escape(setting))
        headings, cells = _columns([row for row in rows if row.setting == setting])
        for heading in headings:
            table.add_column(heading)
        for each in cells:
            table.add_row(*map(escape, each))
        tables.append(table)
    return tables


def paired_difference(pairs: list[tuple[dict[str, Any], dict[str, Any]]], seed: int = 0) -> Difference:
    """Of (pretrained, scratch) runs of equal seeds on equal test cases."""
    rows: list[list[float]] = []
    for pretrained, scratch in pairs:
        base = {case["case"]: case["mean"] for case in scratch["cases"]}
        # A case without foreground has no mean, in either arm and whatever the seed.
        rows.append([case["mean"] - base[case["case"]] for case in pretrained["cases"] if case["mean"] is not None])
    values = np.array(rows)  # (seeds, cases)
    seeds, cases = values.shape
    seed_weights, case_weights = _resampled(seeds, cases, seed)
    means = ((seed_weights @ values) * case_weights).sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    better = int((values.mean(axis=0) > 0).sum())
    return Difference(float(values.mean()), float(low), float(high), better, cases, seeds)


@cache
def _resampled(seeds: int, cases: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawing with replacement, as shares: (resamples, seeds) and (resamples, cases). Many differences share it."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    return (
        generator.multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES) / seeds,
        generator.multinomial(cases, [1 / cases] * cases, size=RESAMPLES) / cases,
    )


def _row(
    group: tuple[str, int, str], runs: dict[int, dict[str, Any]], scratch: dict[int, dict[str, Any]], seed: int
) -> Row:
    setting, labels, arm = group
    means = np.array([run["dice"]["mean"] for run in runs.values()], dtype=float)
    classes: dict[str, list[float]] = {}
    for run in runs.values():
        for value, dice in run["dice"]["classes"].items():
            if dice is not None:
                classes.setdefault(value, []).append(dice)
    measured = [run for run in runs.values() if "hd95" in run]
    distances = {}
    for name in DISTANCES:
        found = [run[name]["mean"] for run in measured if run[name]["mean"] is not None]
        if found:
            distances[name] = Distance(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else 0.0)
    left_out = {name: sum(sum(run[name].values()) for run in measured) for name in ("missed", "spurious") if measured}
    pairs = [(runs[number], scratch[number]) for number in sorted(runs) if number in scratch]
    return Row(
        setting,
        labels,
        arm,
        tuple(sorted(runs)),
        float(means.mean()),
        float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        {value: float(np.mean(dice)) for value, dice in classes.items()},
        paired_difference(pairs, seed) if arm != "scratch" and pairs else None,
        distances,
        left_out,
    )


def setting_of(line: dict[str, Any]) -> str:
    """A checksum of all that must be equal in runs that are compared."""
    # Skips are left out of pretraining alone: what is fine-tuned has them.
    network = {name: value for name, value in line["backbone"].items() if name != "skips"}
    values = [network if name == "backbone" else line[name] for name in SETTINGS]
    cases = sorted(case["case"] for case in line["cases"])
    later = _later(line)
    exact = json.dumps([values, cases, *([later] if later else [])], sort_keys=True)
    return hashlib.sha256(exact.encode()).hexdigest()[:8]


def _later(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name, before in LATER_SETTINGS.items() if line.get(name, before) != before}


def _words(line: dict[str, Any]) -> str:
    """The setting of a line."""
    backbone, later = line["backbone"], _later(line)
    features = "-".join(str(number) for number in backbone["features"])
    told = "".join(
        [f", {later['autocast']}" if "autocast" in later else "",
         f", overlap {later['overlap']:g}" if "overlap" in later else "",
         f", mirrored {','.join(AXES[axis] for axis in later['mirror'])}" if "mirror" in later else ""]
    )  # fmt: skip
    return (
        f"{Path(line['store']).name}: {len(line['cases'])} test cases, {backbone['architecture']} {features}, "
        f"{line['steps']} steps of {line['batch']} crops {'x'.join(map(str, line['crop']))}, "
        f"learning rate {line['learning_rate']:g}{told} (setting {setting_of(line)})"
    )


def _key(line: dict[str, Any]) -> tuple[str, int, str, int]:
    """What makes two lines the same run: setting, labels, arm and seed."""
    arm = "scratch"
    if line["arm"] == "pretrained":
        arm = f"pretrained, {line['recipe'] or line['method']} {line['weights_sha256'][:8]}"
        for item in fields(Tuning):
            if line.get(item.name, item.default) != item.default:
                arm += f", {item.name.replace('_', ' ')} {line[item.name]}"
        if line.get("test_cases_pretrained_on"):
            arm += ", pretrained on test images"
    return setting_of(line), int(line["labels"]), arm, int(line["seed"])


def _columns(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells; the distances only where a row has them."""
    if not any(row.left_out for row in rows):
        return HEADINGS, [_cells(row) for row in rows]
    return (*HEADINGS, *DISTANCE_HEADINGS), [(*_cells(row), *_distance_cells(row)) for row in rows]


def _distance_cells(row: Row) -> tuple[str, ...]:
    found = [row.distances.get(name) for name in DISTANCES]
    means = [f"{each.mean:.2f}" + (f" ± {each.std:.2f}" if each.std else "") if each else "" for each in found]
    return (*means, *(str(row.left_out.get(name, "")) for name in ("missed", "spurious")))


def _cells(row: Row) -> tuple[str, ...]:
    difference = row.difference
    spread = f" ± {row.std:.3f}" if len(row.seeds) > 1 else ""
    return (
        str(row.labels),
        row.arm,
        ", ".join(str(seed) for seed in row.seeds),
        f"{row.dice:.3f}{spread}",
        ", ".join(f"{value}: {dice:.3f}" for value, dice in row.classes.items()),
        f"{difference.mean:+.3f}" if difference else "",
        f"{difference.low:+.3f} to {difference.high:+.3f}" if difference else "",
        f"{difference.better} of {difference.cases}" if difference else "",
    )
