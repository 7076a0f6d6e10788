"""The section of a report about fine-tuning: the label-efficiency table, and what the models say of a test case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..downstream.table import Row, label_table, read_lines
from ..errors import UserError
from . import curves, evidence, page, volumes
from .story import Story

Line = dict[str, Any]
ARMS = {"pretrained": "pretrained", "scratch": "from scratch"}
TABLE = (
    "±: standard deviation over seeds. Interval: bootstrap over the test cases, paired by case and seed. Both arms "
    "have the same cases, crops and number of steps; the from-scratch arm is not trained to its plateau."
)
SEGMENTATIONS = (
    "One test case, axial and coronal: the truth, what each arm says (fewest labels, first seed), and in white the "
    "voxels where it is wrong."
)


def finetuning(run: Path, story: Story) -> list[str]:
    """Tables and pictures of RUN/finetune, or a sentence where there is none."""
    results = run / "finetune" / "finetune.jsonl"
    if not results.is_file():
        return [page.note(f"No fine-tuning yet: `voxtrast finetune {run} STORE --labels N` writes {results}.")]
    lines = read_lines([results])
    if not lines:
        return [page.note(f"No fine-tuning yet: {results} is empty.")]
    rows = label_table(lines)
    blocks: list[str] = []
    for setting in dict.fromkeys(row.setting for row in rows):
        same = [row for row in rows if row.setting == setting]
        blocks += [page.paragraph(setting), _table(same, story)]
    blocks.append(page.faint(TABLE))
    fewest = min(row.labels for row in rows)
    blocks.append(
        page.figure(
            curves.draw_dice(_dice_by_arm(lines, fewest, story)),
            (f"Dice on the test cases, {fewest} labelled training {'case' if fewest == 1 else 'cases'}."),
            640,
        )
    )
    blocks += [page.heading("Every run"), _runs(lines, story)]
    try:
        shown = evidence.segmentations(lines)
    except UserError as error:
        return [*blocks, page.note(f"No picture of segmentations: {error}.")]
    predictions = {_arm(arm): volume for arm, volume in shown.predictions.items()}
    picture = volumes.draw_segmentations(
        shown.case, shown.frame, shown.image, shown.truth, predictions, story.class_names
    )
    return [*blocks, page.figure(picture, SEGMENTATIONS)]


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
        cells.append(
            (
                row.labels,
                ARMS["scratch"] if row.arm == "scratch" else row.arm,
                ", ".join(map(str, row.seeds)),
                f"{row.dice:.3f}{spread}",
                *(_dice(row.classes.get(value)) for value in classes),
                *difference,
            )
        )
    header = (
        "labels",
        "arm",
        "seeds",
        "Dice",
        *(story.class_name(value) for value in classes),
        "difference to scratch",
        "95 % interval",
        "cases better",
    )
    return page.table(header, cells)


def _runs(lines: Sequence[Line], story: Story) -> str:
    classes = list(dict.fromkeys(value for line in lines for value in line["dice"]["classes"]))
    header = (
        "arm",
        "labels",
        "seed",
        "Dice",
        *(story.class_name(value) for value in classes),
        "training loss, first",
        "last",
        "seconds",
    )
    return page.table(
        header,
        [
            (
                _arm(line["arm"]),
                line["labels"],
                line["seed"],
                _dice(line["dice"]["mean"]),
                *(_dice(line["dice"]["classes"].get(value)) for value in classes),
                f"{line['loss']['first']:.3f}",
                f"{line['loss']['last']:.3f}",
                f"{line['seconds']:.1f}",
            )
            for line in lines
        ],
    )


def _dice_by_arm(lines: Sequence[Line], labels: int, story: Story) -> dict[str, dict[str, list[float]]]:
    """{arm: {class: a Dice for each seed}}; a run that was repeated counts once, the last time."""
    last = {(line["arm"], line["seed"]): line for line in lines if line["labels"] == labels}
    arms: dict[str, dict[str, list[float]]] = {}
    for (arm, _), line in last.items():
        groups = arms.setdefault(_arm(arm), {})
        classes = {story.class_name(value): dice for value, dice in line["dice"]["classes"].items()}
        values: dict[str, float | None] = {"mean": line["dice"]["mean"], **classes}
        for name, dice in values.items():
            if dice is not None:
                groups.setdefault(name, []).append(dice)
    return arms


def _arm(name: str) -> str:
    return ARMS.get(name, name)


def _dice(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
