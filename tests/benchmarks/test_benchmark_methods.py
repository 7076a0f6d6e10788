"""That a row tells of a run what its log and its weights hold."""

import json
from pathlib import Path

import pytest

from voxtrast.benchmarks import methods

WORDS = [
    "views.crop=[8,16,16]",
    "backbone.features=[4,8]",
    "method.channels=8",
    "train.global_batch=4",
    "validation.fraction=0.34",
]


@pytest.mark.slow
def test_a_recipe_is_trained_and_told_of(tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "here.jsonl"
    words = ["--data", str(tiny_store), "--into", str(tmp_path), "--recipes", "pcl-tiny", "--steps", "3", *WORDS]
    assert methods.main([*words, "--output", str(lines)]) == 0
    said = capsys.readouterr().out
    (row,) = (json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines())
    run = tmp_path / f"pcl-tiny-{tiny_store.name}"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (row["steps"], row["batch"], row["views_a_sample"]) == (3, 4, 2)
    assert row["losses"]["contrast"] == pytest.approx([sum(line["loss/contrast"] for line in log) / 3] * 2)
    assert row["median_s"] == pytest.approx(sorted(4 / line["samples_per_second"] for line in log[1:])[0], rel=1)
    assert 0 < row["trained_parameters"] < row["parameters"]
    assert 0 < row["std"][0] < 1
    assert row["std"][1] != row["std"][0]  # it has learned
    assert 1 <= row["rank"][1] <= 8
    assert "| pcl-tiny | store | 3 x 4 |" in said
    assert methods.main([str(run)]) == 0  # a run that is there is told of as it is
    assert "| 3 x 4 |" in capsys.readouterr().out


def test_the_terms_of_stages_are_told_of_one_by_one() -> None:
    log = [{"stage": "a", "loss": 1.0, "loss/x": 1.0}] * 10 + [
        {"stage": "b", "loss": 9.0, "loss/x": 3.0, "loss/y": 6.0}
    ]
    found = methods.losses_of(log)
    assert found == {"x": [1.0, pytest.approx(1.2)], "y": [6.0, 6.0]}


def test_a_contrast_with_a_bank_begins_where_that_is_full() -> None:
    log = [{"loss": 1.0, "monitor/bank_filled": 0.5}] * 20 + [{"loss": 8.0, "monitor/bank_filled": 1.0}] * 10
    assert methods.losses_of([*log, *[{"loss": 4.0}] * 10]) == {"loss": [8.0, 4.0]}
    assert methods.losses_of(log[:20]) == {"loss": [1.0, 1.0]}  # never full


def test_a_folder_that_is_no_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere/config.yaml: not a run's")


@pytest.mark.parametrize(("words", "said"), [([], "expected folders"), (["--data", "x"], "go together")])
def test_words_that_do_not_go_together_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        methods.main(words)
    assert said in capsys.readouterr().err
