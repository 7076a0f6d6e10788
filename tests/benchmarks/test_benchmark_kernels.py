"""That the benchmarks compare like with like; not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxtrast.benchmarks.harness import Case, append, gradients_of, run, table
from voxtrast.benchmarks.kernels import (
    bank_info_nce,
    info_nce,
    local_correlation,
    nt_xent,
    peers,
    positional_info_nce,
    vector_pyramid,
    warp,
    warped_cosine_loss,
)
from voxtrast.benchmarks.kernels.__main__ import main
from voxtrast.benchmarks.kernels.tile_loop import compiled_tile_loop_info_nce
from voxtrast.benchmarks.machine import Rates, machine, measure_rates, results_file
from voxtrast.benchmarks.place import CPU, Cannot, Place, choose_place

SMALL_MAPS = {"D": 1, "H": 6, "W": 9, "B": 2, "units": 2, "radius": 1}
SMALL_PYRAMID = {"axes": 2, "size": 32, "B": 1, "heads": 1, "radius": 1}
RATES = Rates(flops=1e11, exponentials=1e9, bandwidth=1e10)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (info_nce, {"problems": 1, "N": 96, "C": 16}),
        (info_nce, {"problems": 3, "N": 8, "C": 16}),
        (nt_xent, {"images": 24, "C": 16}),
        (positional_info_nce, {"problems": 3, "N": 8, "C": 16}),
        (bank_info_nce, {"N": 8, "K": 40, "C": 16, "fixed_normalizer": 0}),
        (bank_info_nce, {"N": 8, "K": 40, "C": 16, "fixed_normalizer": 1}),
        pytest.param(local_correlation, SMALL_MAPS, marks=pytest.mark.slow),
        pytest.param(vector_pyramid, SMALL_PYRAMID, marks=pytest.mark.slow),
        (warp, {"B": 2, "C": 3, "size": 20, "axes": 2, "compose": 0}),
        (warp, {"B": 1, "C": 2, "size": 9, "axes": 3, "compose": 0}),
        (warp, {"B": 1, "C": 3, "size": 9, "axes": 3, "compose": 1}),
        (warped_cosine_loss, {"B": 1, "C": 4, "size": 9, "axes": 3}),
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
    assert [json.loads(line)["op"] for line in file.read_text(encoding="utf-8").splitlines()] == [
        line["op"] for line in lines
    ] * 2


@pytest.mark.parametrize(("module", "shape"), [(local_correlation, SMALL_MAPS), (vector_pyramid, SMALL_PYRAMID)])
def test_providers_that_take_long_to_compile_agree_as_they_are_written(module, shape: dict[str, int]) -> None:
    case = module.build(shape)
    case.steps = {name: step for name, step in case.steps.items() if "torch.compile" not in name}
    lines = [line for line in run(case, RATES, most_rounds=1) if not line.get("other_work")]
    assert len(lines) >= 3
    assert not any("cannot" in line for line in lines)


def test_a_provider_that_fails_or_computes_something_else_gets_no_time() -> None:
    def broken() -> list[torch.Tensor]:
        raise RuntimeError("no such kernel\nand a long story")

    steps = {"ours": lambda: [torch.ones(3)], "wrong": lambda: [torch.tensor([1.0, 1.0, 1.1])], "broken": broken}
    lines = run(Case("op", {"N": 1}, CPU, steps, 1.0, 1.0), RATES, most_rounds=1)
    assert [line.get("cannot") for line in lines] == [
        None,
        "refused: differs by 1.0e-01 of the largest gradient",
        "fails: RuntimeError: no such kernel",
    ]


def test_gradients_that_jump_are_compared_by_their_norm() -> None:
    jump = torch.zeros(10_000).index_fill_(0, torch.tensor([7]), 0.1)
    steps = {"ours": lambda: [torch.ones(10_000)], "jumps": lambda: [1 + jump], "wrong": lambda: [1 + 10 * jump]}
    lines = run(Case("op", {"N": 1}, CPU, steps, 1.0, 1.0, norm_tolerance=2e-3), RATES, most_rounds=1)
    assert [line.get("cannot") for line in lines] == [
        None,
        None,
        "refused: differs by 1.0e-02 of the norm of the gradient",
    ]


def test_other_work_is_timed_without_being_compared_and_says_so() -> None:
    steps = {"ours": lambda: [torch.ones(3)], "else": lambda: [torch.zeros(2)]}
    lines = run(Case("op", {"N": 1}, CPU, steps, 1.0, 1.0, other_work=frozenset({"else"})), RATES, most_rounds=1)
    assert [line.get("other_work") for line in lines] == [None, True]
    assert "else *" in table(lines)
    assert "* other work" in table(lines)


def test_a_gradient_that_is_not_a_number_is_refused() -> None:
    wrong = [torch.ones(2), torch.tensor([1.0, torch.nan])]
    steps = {"ours": lambda: [torch.ones(2)] * 2, "wrong": lambda: wrong}
    lines = run(Case("op", {"N": 1}, CPU, steps, 1.0, 1.0), RATES, most_rounds=1)
    assert lines[1]["cannot"].startswith("refused: differs by nan")


def test_a_peer_that_cannot_be_had_is_named_with_the_reason() -> None:
    with pytest.raises(Cannot, match="no_such_library is not installed"):
        peers.imported("no_such_library.losses", "Loss")
    with pytest.raises(Cannot, match=r"import torch: .* no attribute 'no_such_loss'"):
        peers.imported("torch", "no_such_loss")
    with pytest.raises(Cannot, match="needs a GPU"):
        peers.inf_cl_info_nce(0.1, torch.device("cpu"))
    with pytest.raises(Cannot, match="holds the matrix, 17 GB, several times"):
        CPU.check_holds(65536**2, "the matrix")


def test_rates_and_peaks_are_measured() -> None:
    rates = measure_rates()
    assert 1e7 < rates.flops < 1e14  # a machine that others use, too, may be slow
    assert 1e6 < rates.exponentials < 1e13
    assert 1e7 < rates.bandwidth < 1e13
    assert 60 < CPU.peak_beyond_mb(lambda: torch.ones(16 * 2**20)) < 90  # 64 MB
    for _ in range(2):  # in pieces so small that the process keeps what was freed
        assert 60 < CPU.peak_beyond_mb(lambda: [torch.ones(2**18) for _ in range(64)]) < 90


def test_the_limit_is_a_sum_on_a_processor_and_the_larger_part_on_a_gpu() -> None:
    assert Rates(flops=10, exponentials=2, bandwidth=5).limit(30, 2) == 4
    assert Rates(flops=10, exponentials=2, bandwidth=5, side_by_side=True).limit(30, 2) == 3


@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_limit_is_the_traffic_where_that_takes_longer_than_the_arithmetic(side_by_side: bool) -> None:
    rates = Rates(flops=10, exponentials=2, bandwidth=5, side_by_side=side_by_side)
    assert rates.limit(30, 2, 10) == rates.limit(30, 2)
    assert rates.limit(30, 2, 40) == 8
    case = Case("op", {"N": 1}, CPU, {"ours": lambda: [torch.ones(1)]}, 0.0, 0.0, moved_bytes=40.0)
    assert run(case, rates, most_rounds=1)[0]["limit_s"] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tile_loop_for_gpus_computes_the_same(dtype: torch.dtype) -> None:
    place = Place(torch.device("cpu"), dtype)
    query, key = (place.randn(70, 16) for _ in range(2))
    losses = {
        "ours": lambda q, k: info_nce.info_nce(q, k, **info_nce.OPTIONS),
        "tiles": lambda q, k: compiled_tile_loop_info_nce(q, k, info_nce.TEMPERATURE, 32),
    }
    steps = {name: gradients_of(loss, query, key) for name, loss in losses.items()}
    lines = run(Case("op", {"N": 70}, place, steps, 1.0, 1.0), RATES, most_rounds=1)
    assert ["cannot" in line for line in lines] == [False, False], table(lines)


def test_results_in_a_folder_are_named_for_the_device(tmp_path: Path) -> None:
    assert results_file(tmp_path, "NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.jsonl"
    assert results_file(tmp_path / "new", "AMD EPYC, 2 threads") == tmp_path / "new" / "amd-epyc-2-threads.jsonl"
    assert results_file(tmp_path / "here.jsonl", "any") == tmp_path / "here.jsonl"
    assert machine()["device"].endswith("threads")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_place(None, "bfloat16") == Place(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_benchmark_of_the_kernels_asks_for_torch_and_nothing_that_the_engine_brings() -> None:
    """Who takes the losses alone measures them alone, and so does a machine with a GPU and no network."""
    absent = ["deepspeed", "dynamic_network_architectures", "matplotlib", "monai", "numpy", "nvidia.dali", "omegaconf",
              "rich", "safetensors", "scipy", "typer", "yaml"]  # fmt: skip
    program = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from voxtrast.benchmarks.kernels import __main__ as benchmark, vector_pyramid
vector_pyramid.build({SMALL_PYRAMID!r}).steps["ours"]()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
