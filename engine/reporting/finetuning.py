"""The sections of a report about fine-tuning: label-efficiency tables and plots, and what the models say of a case."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..downstream.scoring import DISTANCES
from ..downstream.table import DISTANCE_HEADINGS, Row, label_table, read_lines
from . import evidence, page
from .story import Story

Line = dict[str, Any]
ARMS = {"pretrained": "pretrained", "scratch": "from scratch"}
TABLE = (
    "±: standard deviation over seeds. Interval: bootstrap over seeds and test cases, paired by both. Arms of a table "
    "have the same cases, crops and number of steps; the from-scratch arm is not trained to its plateau."
)
BY_LABELS = "Mean Dice on the test cases against the number of labelled ones: mean and standard deviation, dots: seeds."
DIFFERENCES = "Difference to training from scratch, paired by seed and case, with its 95 % interval."
SEGMENTATIONS = (
    "One test case, axial and coronal: the truth, what each arm says (fewest labels, first seed), and in white the "
    "voxels where it is wrong."
)


def finetuning(run: Path, story: Story, left_out: list[str]) -> list[str]:
    """Tables and pictures of RUN/finetune, or a sentence where there is none."""
    results = run / "finetune" / "finetune.jsonl"
    if not results.is_file():
        return [page.note(f"No fine-tuning yet: `voxtrast finetune {run} STORE --labels N` writes {results}.")]
    lines = read_lines([results])
    if not lines:
        return [page.note(f"No fine-tuning yet: {results} is empty.")]
    blocks = label_efficiency(lines, story, left_out)
    blocks.append(page.folded(f"Every run ({len(lines)})", _runs(lines, story)))
    return [*blocks, *page.guarded(lambda: _segmentations(lines, story), "segmentations", left_out)]


def label_efficiency(lines: Sequence[Line], story: Story, left_out: list[str]) -> list[str]:
    """For each setting the table, Dice against labels, the paired differences, and the classes at fewest labels.

    Args:
        lines: as `voxtrast finetune` writes them.
        left_out: gets a line for each picture that could not be drawn.
    """
    rows = label_table(list(lines))
    blocks: list[str] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        same = [_named(row) for row in rows if row.setting == setting]
        blocks += [page.paragraph(setting), _table(same, story)]
        blocks += page.guarded(partial(_plots, same, lines, story), f"plots of {setting}", left_out)
    return [*blocks, page.faint(TABLE)]


def _named(row: Row) -> Row:
    return replace(row, arm=ARMS.get(row.arm, row.arm))


def _plots(rows: Sequence[Row], lines: Sequence[Line], story: Story) -> list[str]:
    from . import curves

    runs: dict[tuple[int, str, int], Line] = {}
    for line in lines:  # a run that was repeated counts once, the last time
        [only] = map(_named, label_table([line]))
        if only.setting == rows[0].setting:
            runs[only.labels, only.arm, only.seeds[0]] = line

    def dice(row: Row) -> list[float]:
        return [float(runs[row.labels, row.arm, seed]["dice"]["mean"]) for seed in row.seeds]

    said = "; ".join(f"{row.arm}, {row.labels} labels: {row.dice:.3f} ± {row.std:.3f}" for row in rows)
    figures = [page.figure(curves.draw_dice_by_labels(rows, dice), BY_LABELS, alt=f"{BY_LABELS} {said}")]
    differences = curves.draw_differences(rows)
    if differences is not None:
        found = [(row, row.difference) for row in rows if row.difference is not None]
        said = "; ".join(
            f"{row.arm}, {row.labels} labels: {paired.mean:+.3f}, {paired.low:+.3f} to {paired.high:+.3f}"
            for row, paired in found
        )
        figures.append(page.figure(differences, DIFFERENCES, alt=f"{DIFFERENCES} {said}"))
    fewest = min(row.labels for row in rows)
    arms = {row.arm: _by_class(row, runs, story) for row in rows if row.labels == fewest}
    words = (
        f"Dice with {fewest} labelled training {'case' if fewest == 1 else 'cases'}; marks: seeds, bars: their mean."
    )
    figures.append(page.figure(curves.draw_dice(arms), words))
    return [page.grid(figures)]


def _by_class(row: Row, runs: dict[tuple[int, str, int], Line], story: Story) -> dict[str, list[float]]:
    """{mean or class: a Dice for each seed}."""
    groups: dict[str, list[float]] = {}
    for seed in row.seeds:
        found = runs[row.labels, row.arm, seed]["dice"]
        classes = {story.class_name(value): dice for value, dice in found["classes"].items()}
        for name, dice in {"mean": found["mean"], **classes}.items():
            if dice is not None:
                groups.setdefault(name, []).append(dice)
    return groups


def _segmentations(lines: Sequence[Line], story: Story) -> list[str]:
    from . import volumes

    shown = evidence.segmentations(lines)
    predictions = {ARMS.get(arm, arm): volume for arm, volume in shown.predictions.items()}
    picture = volumes.draw_segmentations(
        shown.case, shown.frame, shown.image, shown.truth, predictions, story.class_names
    )
    return [page.heading("A test case"), page.figure(picture, SEGMENTATIONS, least_px=680)]


def _table(rows: Sequence[Row], story: Story) -> str:
    classes = list(dict.fromkeys(value for row in rows for value in row.classes))
    cells = []
    for row in rows:
        spread = f" ± {row.std:.3f}" if len(row.seeds) > 1 else ""
        difference = ("–", "–", "–")
        if row.difference is not None:
            found = row.difference
            difference = (
                f"{found.mean:+.3f}",
                f"{found.low:+.3f} to {found.high:+.3f}",
                f"{found.better} of {found.cases}",
            )
        dice = (_dice(row.classes.get(value)) for value in classes)
        seeds = ", ".join(map(str, row.seeds))
        cells.append((row.labels, row.arm, seeds, f"{row.dice:.3f}{spread}", *dice, *difference))
    names = (story.class_name(value) for value in classes)
    header = ("labels", "arm", "seeds", "Dice", *names, "difference to scratch", "95 % interval", "cases better")
    return page.table(header, cells)


def _runs(lines: Sequence[Line], story: Story) -> str:
    classes = list(dict.fromkeys(value for line in lines for value in line["dice"]["classes"]))
    names = (story.class_name(value) for value in classes)
    anywhere = any(name in line for line in lines for name in DISTANCES)
    measured = dict(zip(DISTANCES, DISTANCE_HEADINGS, strict=False)) if anywhere else {}
    header = ("arm", "labels", "seed", "Dice", *names, *measured.values(), "training loss, first", "last", "seconds")
    rows = []
    for line in lines:
        dice = (_dice(line["dice"]["classes"].get(value)) for value in classes)
        distances = (_distance(line[name]["mean"] if name in line else None) for name in measured)
        loss = (f"{line['loss'][when]:.3f}" for when in ("first", "last"))
        arm, mean = ARMS.get(line["arm"], line["arm"]), _dice(line["dice"]["mean"])
        rows.append((arm, line["labels"], line["seed"], mean, *dice, *distances, *loss, f"{line['seconds']:.1f}"))
    return page.table(header, rows)


def _dice(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
