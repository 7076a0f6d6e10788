"""That the engine's step is taken apart on every rank, and that mistakes are one line."""

import json
from pathlib import Path

import pytest
import torch

from voxtrast.benchmarks import scaling
from voxtrast.benchmarks.scaling_rank import PARTS

WORDS = ["pcl-tiny", "views.crop=[8,16,16]", "backbone.features=[4,8]", "method.channels=8", "train.global_batch=4",
         "loader.threads=1", "device=cpu"]  # fmt: skip


@pytest.mark.slow  # two launches
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the ranks of a CPU")
def test_every_number_of_ranks_has_a_row_whose_parts_make_up_the_step(tiny_store: Path, tmp_path: Path, capsys) -> None:
    lines, picture = tmp_path / "here.jsonl", tmp_path / "bars.png"
    words = [
        *WORDS,
        f"data={tiny_store}",
        "--ranks",
        "1,2",
        "--zero",
        "0",
        "--steps",
        "4",
        "--synthetic",
        "--precision",
        "bfloat16",
    ]
    assert scaling.main([*words, "--output", str(lines), "--plot", str(picture)]) == 0
    one, two = (json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for row in (one, two):
        assert (row["batch"], row["precision"]) == (4, "bfloat16")
        assert set(row["parts_s"]) == set(PARTS)
        assert all(row["parts_s"][part] > 0 for part in ("forward", "backward", "optimizer"))
        assert sum(row["parts_s"].values()) == pytest.approx(row["median_s"], rel=0.5)
    assert two["parts_s"]["communication"] > 0
    assert one["bare_s"] > 0
    assert "bare_s" not in two
    assert "bare loop" in capsys.readouterr().out
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pcl-tiny"], "error: data: not given"),
        (["pcl-tinny", "data=x"], "error: recipe"),
        (["pcl-tiny", "data=x", "--ranks", "two"], "error: --ranks: expected numbers as in 1,2, got 'two'"),
        (["pcl-tiny", "data=x", "--zero", "0,4"], "error: --zero: expected numbers from 0 to 3, got 4"),
        (["pcl-tiny", "data=x", "--precision", "half"], "error: --precision: expected some of none, bfloat16, float16"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(words) == 2
    assert capsys.readouterr().err.startswith(said)


def test_the_table_has_shares_and_what_the_engine_costs_beyond_a_bare_loop() -> None:
    parts = dict.fromkeys(PARTS, 0.25) | {"data": 0.0, "rest": 0.0}
    row = {"ranks": 1, "zero_stage": 0, "precision": "none", "median_s": 1.0, "samples_a_second": 4.0,
           "parts_s": parts, "memory_mb": 99.0, "engine_s": 1.02, "bare_s": 1.0}  # fmt: skip
    said = scaling.table([row]).splitlines()
    assert said[1].split() == ["1", "0", "none", "1.000", "4.00", "0.0", "25.0", "25.0", "25.0", "25.0", "0.0", "99"]
    assert said[2].endswith("+2.0%")
