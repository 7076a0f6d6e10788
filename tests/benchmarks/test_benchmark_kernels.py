"""That the benchmarks compare like with like; not how fast anything is."""

import json
from pathlib import Path

import pytest
import torch

from voxtrast.benchmarks.harness import Case, Rates, append, measure_rates, peak_beyond_mb, run, table
from voxtrast.benchmarks.kernels import bank_info_nce, info_nce, positional_info_nce

RATES = Rates(flops=1e11, exponentials=1e9)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (info_nce, {"problems": 1, "N": 96, "C": 16}),
        (info_nce, {"problems": 3, "N": 8, "C": 16}),
        (positional_info_nce, {"problems": 3, "N": 8, "C": 16}),
        (bank_info_nce, {"N": 8, "K": 40, "C": 16, "fixed_normalizer": 0}),
        (bank_info_nce, {"N": 8, "K": 40, "C": 16, "fixed_normalizer": 1}),
    ],
    ids=str,
)
def test_all_providers_of_a_case_agree(module, shape: dict[str, int], tmp_path: Path) -> None:
    lines = run(module.build(shape), RATES, most_rounds=1)
    timed = [line for line in lines if "cannot" not in line]
    assert timed[0]["provider"] == "ours"
    assert timed[0]["ratio_to_ours"] == 1
    assert len(timed) >= 3
    assert all(line["median_s"] > 0 and line["share_of_limit"] > 0 for line in timed)
    assert all(line["provider"] in table(lines) for line in lines)
    file = tmp_path / "results" / "here.jsonl"
    for _ in range(2):
        append(lines, file)
    assert [json.loads(line)["op"] for line in file.read_text().splitlines()] == [line["op"] for line in lines] * 2


def test_a_provider_that_computes_something_else_is_refused() -> None:
    steps = {"ours": lambda: torch.ones(3), "wrong": lambda: torch.tensor([1.0, 1.0, 1.1])}
    with pytest.raises(AssertionError, match=r"wrong differs by 1\.0e-01"):
        run(Case("op", {"N": 1}, "float32", steps, 1.0, 1.0), RATES, most_rounds=1)


def test_rates_and_peaks_are_measured() -> None:
    rates = measure_rates()
    assert 1e8 < rates.flops < 1e14
    assert 1e7 < rates.exponentials < 1e13
    assert 60 < peak_beyond_mb(lambda: torch.ones(16 * 2**20)) < 90  # 64 MB
