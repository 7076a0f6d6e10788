"""The emulation itself: right kernels are right under it, wrong ones are reported."""

import pytest
import torch


def test_threads_meet_at_barriers(emulate) -> None:
    run = emulate("emulation")
    values, sums = run.copy(torch.arange(100.0)), run.empty(100)
    run("sum_blocks", values, sums, 100, 48, False)
    expected = torch.tensor([part.sum() for part in values.split(48)]).repeat_interleave(48)[:100]
    assert torch.equal(sums, expected)


def test_a_forgotten_barrier_gives_nan(emulate) -> None:
    run = emulate("emulation")
    values, sums = run.copy(torch.arange(100.0)), run.empty(100)
    run("sum_blocks", values, sums, 100, 48, True)
    assert sums.isnan().any()


def test_warps_exchange_values(emulate) -> None:
    run = emulate("emulation")
    values, total = run.copy(torch.arange(96.0)), run.copy(torch.zeros(1))
    run("sum_by_warps", values, total, 96)
    assert total.item() == values.sum().item()


@pytest.mark.parametrize(("way", "words"), [(0, "has finished"), (1, "waits at"), (2, "waits at")])
def test_a_barrier_that_threads_miss_is_an_error(emulate, way: int, words: str) -> None:
    run = emulate("emulation")
    with pytest.raises(RuntimeError, match=rf"thread .* of block \(0, 0, 0\) waits at .*emulation.cpp:\d+.*{words}"):
        run("miss_a_barrier", run.empty(32), way)


def test_memory_outside_a_tensor_is_an_error(emulate) -> None:
    run = emulate("emulation")
    values = run.copy(torch.zeros(7))
    run("touch_at", values, 6, False)
    assert values.tolist() == [0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(RuntimeError, match=r"thread \(0, 0, 0\) of block \(0, 0, 0\) touches 0x.*, outside"):
        run("touch_at", values, -1 if run.backwards else 7, False)
    run("touch_at", values, 15, True)
    assert values[0].isnan()
    with pytest.raises(RuntimeError, match="outside"):
        run("touch_at", values, -1 if run.backwards else 16, True)


@pytest.mark.parametrize("launch", [(65536, 1, 0), (1, 1025, 0), (1, 0, 0), (1, 1, 100_000 + 2048)], ids=str)
def test_a_launch_beyond_the_limits_is_an_error(emulate, launch: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="beyond the limits"):
        emulate("emulation")("launch_with", *launch)
