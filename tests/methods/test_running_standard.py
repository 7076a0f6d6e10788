"""Averages over the steps: which, when they move, and that no cut of a batch changes them."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtrast.methods.parts.heads import projector
from voxtrast.methods.parts.running_standard import EPSILON, RunningStandard, standardised, update_standards

RANKS = 2


def batches(steps: int, samples: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drift = torch.arange(float(steps), dtype=torch.float64).view(-1, 1, 1)
    return 3 + 2 * torch.randn(steps, samples, 2, dtype=torch.float64, generator=generator) + drift


def after(steps: Tensor, **options: float) -> RunningStandard:
    standard = RunningStandard(2, **options).double()
    for features in steps:
        standard(features)
        standard.update()
    return standard


def test_at_first_all_samples_so_far_count_alike() -> None:
    steps = batches(10)
    standard = after(steps, momentum=0.9)
    everything = steps.flatten(0, 1)
    torch.testing.assert_close(standard.mean, everything.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(standard.variance, everything.var(0, correction=0), rtol=1e-12, atol=0)


def test_later_the_older_ones_are_forgotten_with_the_momentum() -> None:
    steps = batches(6)
    standard = after(steps, momentum=0.5)
    shares = torch.tensor([0.5**5, 0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5], dtype=torch.float64).view(-1, 1, 1) / 4
    mean = (shares * steps).sum((0, 1))
    torch.testing.assert_close(standard.mean, mean, rtol=1e-12, atol=0)
    variance = (shares * (steps - mean).square()).sum((0, 1))
    torch.testing.assert_close(standard.variance, variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("measured", [False, True])
def test_they_stand_still_within_a_step_and_outside_training(measured: bool) -> None:
    first, second = batches(2)
    standard = RunningStandard(2).double()
    if measured:
        standard.measure(first)
    expected = standardised(first, (first.mean(0), first.var(0, correction=0))) if measured else first
    standard(second)
    found = torch.cat([standard(sample) for sample in first.split(1)])  # whoever else is there
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    standard = after(batches(3)).eval()
    before = copy.deepcopy(standard.state_dict())
    standard(first)
    standard.measure(first)
    standard.update()
    for name, value in standard.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_measured_on_the_first_batch_they_are_what_its_update_would_make_them() -> None:
    [first] = batches(1)
    standard = RunningStandard(2).double()
    statistics = standard.measure(first)
    assert all(torch.equal(kept, found) for kept, found in zip(standard.statistics, statistics, strict=True))
    standard.collect(first)
    standard.update()
    for kept, found in zip(standard.statistics, statistics, strict=True):
        torch.testing.assert_close(kept, found, rtol=1e-12, atol=0)
    found = standardised(first, statistics)
    torch.testing.assert_close(found.mean(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(2, dtype=torch.float64), rtol=EPSILON, atol=1e-8)


def test_features_of_one_value_stay_finite_and_no_gradient_passes_through_the_averages() -> None:
    standard = after(torch.full((2, 3, 2), 0.7, dtype=torch.float64))
    features = torch.tensor([[0.7, 0.7], [0.8, 0.7]], dtype=torch.float64, requires_grad=True)
    found = standard(features)
    torch.testing.assert_close(found, torch.tensor([[0, 0], [0.1 / EPSILON**0.5, 0]], dtype=torch.float64))
    found.sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad, torch.full_like(features, EPSILON).rsqrt())


def test_low_precision_features_are_averaged_in_float32() -> None:
    standard = RunningStandard(2)
    features = (100 + batches(1)[0]).bfloat16()
    assert standard(features).dtype == torch.float32
    standard.update()
    torch.testing.assert_close(standard.mean, features.float().mean(0))


def test_a_state_dict_taken_in_the_middle_continues_alike() -> None:
    steps = batches(5)
    other = RunningStandard(2).double()
    other.load_state_dict(copy.deepcopy(after(steps[:3]).state_dict()))
    for features in steps[3:]:
        other(features)
        other.update()
    expected = after(steps).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_a_projector_standardises_its_inputs_where_it_is_asked_to() -> None:
    torch.manual_seed(0)
    plain = projector(2, 4, 3).double()
    torch.manual_seed(0)
    head = projector(2, 4, 3, standardise=True).double()
    [features] = batches(1)
    torch.testing.assert_close(head(features), plain(features), rtol=1e-7, atol=1e-7)  # nothing is known yet
    update_standards(head)
    expected = plain(standardised(features, (features.mean(0), features.var(0, correction=0))))
    torch.testing.assert_close(head(features), expected, rtol=1e-9, atol=1e-12)


def test_parts_of_a_batch_are_averaged_as_the_whole() -> None:
    standard = RunningStandard(2).double()
    for features in batches(3):
        for part in features.chunk(2):
            standard(part)
        standard.update()
    expected = after(batches(3)).state_dict()
    for name, value in standard.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0)


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    standard = RunningStandard(2).double()
    for features in batches(3):
        standard(features.chunk(RANKS)[rank])
        standard.update(dist.group.WORLD)
    torch.save(standard.state_dict(), Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_ranks_have_the_averages_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    expected = after(batches(3)).state_dict()
    for rank in range(RANKS):
        for name, value in torch.load(tmp_path / f"rank{rank}").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0)
