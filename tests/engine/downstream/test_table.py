"""The table says what the lines say, and never pairs runs that are not comparable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from voxtrast.engine.downstream.scoring import summarise
from voxtrast.engine.downstream.table import label_table, read_lines, to_markdown, to_rich
from voxtrast.engine.errors import UserError
from voxtrast.methods.backbone import BackboneConfig


def line(arm: str, seed: int, scores: list[float], labels: int = 4, **changes: Any) -> dict[str, Any]:
    cases = [{"case": f"c{number}", "dice": {"1": score}, "mean": score} for number, score in enumerate(scores)]
    return {
        "arm": arm,
        "labels": labels,
        "seed": seed,
        "steps": 10,
        "batch": 2,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "crop": [8, 8, 8],
        "flips": False,
        "cases": cases,
        "dice": summarise(cases),
        "store": "/somewhere/spheres",
        "store_sha256": "1",
        "backbone": BackboneConfig().to_dict(),
        "weights_sha256": "abcdef0123",
        "method": "cover",
        "recipe": "cover-3d",
        **changes,
    }


def test_means_spread_and_paired_difference() -> None:
    lines = [
        line("scratch", 0, [0.4, 0.6]),
        line("scratch", 1, [0.5, 0.7]),
        line("pretrained", 0, [0.5, 0.6]),
        line("pretrained", 1, [0.7, 0.8]),
        line("pretrained", 0, [0.9, 0.9], labels=8),
    ]
    scratch, pretrained, unpaired = label_table(lines)
    assert (scratch.arm, scratch.dice, scratch.difference) == ("scratch", pytest.approx(0.55), None)
    assert scratch.std == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert pretrained.arm == "pretrained, cover-3d abcdef01"
    difference = pretrained.difference
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    # By seed and case: 0.1, 0.0 and 0.2, 0.1. One resample in 16 holds the lowest alone, one the highest.
    assert (difference.low, difference.high) == (pytest.approx(0.0), pytest.approx(0.2))
    assert (difference.better, difference.cases, difference.seeds) == (2, 2, 2)
    assert (unpaired.labels, unpaired.difference) == (8, None)


def test_for_one_seed_the_interval_is_the_bootstrap_of_the_cases() -> None:
    generator = np.random.default_rng(0)
    scratch = generator.uniform(0.2, 0.6, 50)
    gain = generator.normal(0.05, 0.1, 50)
    [_, row] = label_table([line("scratch", 0, scratch.tolist()), line("pretrained", 0, (scratch + gain).tolist())])
    assert row.difference is not None
    half = 1.96 * gain.std() / np.sqrt(50)
    assert row.difference.low == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert row.difference.high == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_the_luck_of_a_run_widens_the_interval() -> None:
    lines = []
    for seed, luck in enumerate([0.1, -0.1, 0.12]):  # every case of a run shares it
        lines += [line("scratch", seed, [0.5] * 20), line("pretrained", seed, [0.5 + luck] * 20)]
    difference = label_table(lines)[1].difference
    assert difference is not None
    assert difference.low < 0 < difference.mean < difference.high


def test_only_comparable_runs_share_a_table_and_a_repetition_counts_once() -> None:
    rows = label_table(
        [
            line("scratch", 0, [0.1]),
            line("scratch", 0, [0.3]),
            line("pretrained", 0, [0.5], steps=20),
            line("pretrained", 0, [0.5, 0.5]),
        ]
    )
    assert len({row.setting for row in rows}) == 3
    assert all(row.difference is None for row in rows)
    assert [row.dice for row in rows if row.arm == "scratch"] == [0.3]


def test_runs_of_one_network_and_store_are_compared_whatever_pretraining_and_folder_were() -> None:
    scratch = line("scratch", 0, [0.5])
    # PCRLv2 leaves the skips out, of the pretraining alone; a store goes by more than one name.
    other = line("pretrained", 0, [0.6], backbone=BackboneConfig(skips=False).to_dict(), store=".")
    rows = label_table([scratch, other])
    assert [row.setting for row in rows] == [rows[0].setting] * 2
    assert rows[0].setting.startswith("spheres: 1 test cases")
    assert rows[1].difference is not None


def test_an_arm_whose_pretraining_saw_the_test_images_is_told_apart() -> None:
    seen = line("pretrained", 0, [0.9], test_cases_pretrained_on=1)
    rows = label_table([line("pretrained", 0, [0.5], test_cases_pretrained_on=0), seen])
    assert [row.arm for row in rows] == [
        "pretrained, cover-3d abcdef01",
        "pretrained, cover-3d abcdef01, pretrained on test images",
    ]


def test_names_in_brackets_are_no_markup() -> None:
    (table,) = to_rich(label_table([line("scratch", 0, [0.5], store="/data/store[v2]")]))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table)
    assert "store[v2]" in shown.get()


def test_scratch_serves_every_pretrained_network_of_its_shape() -> None:
    rows = label_table(
        [line("scratch", 0, [0.5]), line("pretrained", 0, [0.6]), line("pretrained", 0, [0.4], weights_sha256="other")]
    )
    assert [row.difference.mean for row in rows if row.difference] == [pytest.approx(0.1), pytest.approx(-0.1)]


def test_both_forms_show_every_number(tmp_path: Path) -> None:
    lines = [line("scratch", 0, [0.4, 0.6]), line("pretrained", 0, [0.5, 0.6])]
    (tmp_path / "finetune.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    rows = label_table(read_lines([tmp_path]))
    markdown = to_markdown(rows)
    assert "| 4 | scratch | 0 | 0.500 | 1: 0.500 |  |  |  |" in markdown
    assert "| 0 | 0.550 | 1: 0.550 | +0.050 | +0.000 to +0.100 | 1 of 2 |" in markdown
    console = Console(width=200)
    with console.capture() as printed:
        for table in to_rich(rows):
            console.print(table)
    assert "+0.000 to +0.100" in printed.get()


def measured(arm: str, seed: int, hd95: float, missed: int = 0, **changes: Any) -> dict[str, Any]:
    found = {"hd95": {"mean": hd95, "classes": {"1": hd95}}, "surface_distance": {"mean": 0.5, "classes": {"1": 0.5}}}
    return line(arm, seed, [0.5], **found, missed={"1": missed}, spurious={"1": 0}, **changes)


def test_distances_have_columns_where_they_were_measured() -> None:
    assert "HD95" not in to_markdown(label_table([line("scratch", 0, [0.5])]))
    rows = label_table(
        [measured("scratch", 0, 4.0, missed=1), measured("scratch", 1, 6.0), line("pretrained", 0, [0.6])]
    )
    markdown = to_markdown(rows)
    assert "| HD95 mm | surface distance mm | missed | spurious |" in markdown
    assert "| 5.00 ± 1.41 | 0.50 | 1 | 0 |" in markdown
    assert "| 1 of 1 |  |  |  |  |" in markdown


def test_how_the_pretrained_tensors_were_tuned_names_an_arm_and_how_the_test_was_run_a_setting() -> None:
    usual = line("pretrained", 0, [0.5])
    later = {"freeze": "none", "layer_decay": 1.0, "head_warmup": 0, "overlap": 0.5, "mirror": []}
    tuned = {**later, "freeze": "encoder:5", "layer_decay": 0.75}
    rows = label_table(
        [usual, line("pretrained", 0, [0.6], **later), line("pretrained", 0, [0.7], **tuned), line("scratch", 0, [0.4])]
    )
    # A line of before, without the words, is the same run as one with their defaults.
    assert [(row.arm, row.dice) for row in rows] == [
        ("scratch", 0.4),
        ("pretrained, cover-3d abcdef01", 0.6),
        ("pretrained, cover-3d abcdef01, freeze encoder:5, layer decay 0.75", 0.7),
    ]
    assert all(row.difference for row in rows[1:])
    mirrored = label_table([usual, line("pretrained", 0, [0.5], mirror=[0, 2], overlap=0.25)])
    assert len({row.setting for row in mirrored}) == 2
    assert any("overlap 0.25, mirrored d,w" in row.setting for row in mirrored)
    mixed = label_table([usual, line("pretrained", 0, [0.5], autocast="bfloat16")])
    assert ["bfloat16" in row.setting for row in mixed].count(True) == 1


def test_a_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune.jsonl: no such file"):
        read_lines([tmp_path])
    (tmp_path / "finetune.jsonl").write_text(json.dumps(line("scratch", 0, [0.1])) + '\n{"arm":\n')
    with pytest.raises(UserError, match="line 2: not a run"):
        read_lines([tmp_path / "finetune.jsonl"])
