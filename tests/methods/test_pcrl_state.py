"""PCRL v1: what it keeps from step to step, and that any cut of a batch leaves the same."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_pcrl import doubled, gradients, rows, small_batch, small_pcrl, total
from torch import Tensor

from voxtrast.methods import Batch
from voxtrast.methods.pcrl import Pcrl

RANKS = 2


def trained_step(method: Pcrl, batches: list[Batch], step: int) -> tuple[float, dict[str, Tensor]]:
    method.exchange(batches, step)
    found = 0.0
    for batch in batches:
        loss = total(method(batch, step)) / len(batches)
        loss.backward()
        found += loss.item()
    method.after_step(step)
    return found, gradients(method)


@pytest.mark.parametrize("standardise", [False, True])
def test_parts_of_a_batch_sum_to_the_whole(standardise: bool) -> None:
    one, cut = (small_pcrl(2 + standardise, standardise=standardise).double() for _ in range(2))
    whole = doubled(small_batch(dimensions=2 + standardise))
    for step in range(2):  # the second meets a bank with keys, and the normaliser of the first
        loss, expected = trained_step(one, [{**whole}], step)
        found, of_parts = trained_step(cut, [rows(whole, slice(0, 2)), rows(whole, slice(2, 4))], step)
        assert found == pytest.approx(loss, rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(of_parts[name], gradient, rtol=1e-7, atol=1e-11)
    assert one.normalizer.item() == pytest.approx(cut.normalizer.item(), rel=1e-12)
    for name in ("bank.vectors", "standard.mean", "standard.variance"):
        torch.testing.assert_close(cut.state_dict()[name], one.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert cut.bank.pushed.item() == one.bank.pushed.item() == 2 * 3 * 4


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    whole = doubled(small_batch())
    for micro_batches in (1, 2):
        method, keys = small_pcrl(standardise=True).double(), []
        method.group = dist.group.WORLD
        twin = method.backbone_twin.network.network.encoder  # type: ignore[union-attr]
        twin.register_forward_hook(lambda _, inputs, __, keys=keys: keys.append(len(inputs[0])))  # type: ignore[operator]
        size = len(whole["x1"]) // (RANKS * micro_batches)
        for step in range(2):
            starts = [(part * RANKS + rank) * size for part in range(micro_batches)]
            found = trained_step(method, [rows(whole, slice(start, start + size)) for start in starts], step)
        torch.save([*found, sum(keys), method.bank.vectors, method.normalizer], f"{folder}/{micro_batches}_{rank}")
    dist.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_ranks_with_one_micro_batch_or_two_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    whole, method = doubled(small_batch()), small_pcrl(standardise=True).double()
    for step in range(2):
        loss, expected = trained_step(method, [{**whole}], step)
    for micro_batches, passes in ((1, 2), (2, 3)):  # of two, their own keys are encoded once more for the others
        ranks = [torch.load(tmp_path / f"{micro_batches}_{rank}") for rank in range(RANKS)]
        losses, of_ranks, keys, banks, normalizers = zip(*ranks, strict=True)
        assert sum(losses) / RANKS == pytest.approx(loss, rel=1e-9)
        for name, gradient in expected.items():
            mean = sum(each[name] for each in of_ranks) / RANKS
            torch.testing.assert_close(mean, gradient, rtol=1e-7, atol=1e-11)
        for bank, normalizer in zip(banks, normalizers, strict=True):
            torch.testing.assert_close(bank, method.bank.vectors, rtol=1e-9, atol=1e-12)
            assert normalizer.item() == pytest.approx(method.normalizer.item(), rel=1e-12)
        assert keys == (2 * passes * len(whole["x1"]) // RANKS,) * RANKS


def test_the_normaliser_is_measured_on_the_first_training_batch_and_is_part_of_the_checkpoint() -> None:
    method = small_pcrl()
    assert method.normalizer.item() == 0
    method(small_batch(), 0)
    measured = method.normalizer.item()
    assert measured > 0
    method.after_step(0)
    method(small_batch(seed=1), 1)
    assert method.normalizer.item() == measured
    assert method.state_dict()["normalizer"].item() == measured


@pytest.mark.parametrize("standardise", [False, True])
def test_the_normaliser_before_training_is_each_batch_s_own_and_is_forgotten(standardise: bool) -> None:
    method = small_pcrl(standardise=standardise).eval()
    batch = small_batch()
    first = method(batch, 0)["contrast"].item()
    assert method.normalizer.item() == 0
    method(small_batch(seed=1), 0)
    assert method(batch, 0)["contrast"].item() == first
    # The same from parts: the mean over all of them.
    parts = [rows(batch, slice(0, 2)), rows(batch, slice(2, 4))]
    method.exchange(parts, 0)
    found = sum(method(part, 0)["contrast"].item() for part in parts) / 2
    assert found == pytest.approx(first, rel=1e-5)
    assert method.normalizer.item() == 0


def test_evaluation_runs_and_changes_no_state() -> None:
    method = small_pcrl(norm="batch", standardise=True)
    for step in range(2):
        method(small_batch(), step)
        method.after_step(step)
    method.eval()
    before = copy.deepcopy(method.state_dict())
    parts = [small_batch(), small_batch(seed=1)]
    method.exchange(parts, 2)
    assert all(torch.isfinite(total(method(part, 2))) for part in parts)
    method.bank.push()  # nor is anything waiting to be pushed
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_taken_in_the_middle_continues_to_the_same_next_loss(steps: int) -> None:
    method = small_pcrl()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        total(method(small_batch(seed=step), step)).backward()
        optimizer.step()
        method.after_step(step)
    other = small_pcrl()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    batch = small_batch(seed=steps)
    assert total(other(batch, steps)).item() == total(method(batch, steps)).item()


def test_standardised_features_follow_the_running_statistics_and_stand_still_within_a_step() -> None:
    method = small_pcrl(standardise=True)
    first = method.backbone.encode(method._images(small_batch())[:, 0])[-1].flatten(2).mean(2)
    method(small_batch(), 0)
    torch.testing.assert_close(method.standard.mean, first.mean(0))
    torch.testing.assert_close(method.standard.variance, first.var(0, correction=0))
    method.after_step(0)
    other = small_batch(seed=1)
    seen = method.backbone.encode(method._images(other)[:, 0])[-1].flatten(2).mean(2)
    stayed = copy.deepcopy(method.standard.state_dict())
    method(other, 1)
    assert all(torch.equal(value, stayed[name]) for name, value in method.standard.state_dict().items())
    method.after_step(1)
    torch.testing.assert_close(method.standard.mean, torch.cat((first, seen)).mean(0))
    torch.testing.assert_close(method.standard.variance, torch.cat((first, seen)).var(0, correction=0))


def test_three_kinds_of_keys_go_into_the_bank_after_the_step_and_no_term_meets_them_before() -> None:
    method = small_pcrl()
    before = method.bank.vectors.clone()
    first = method(small_batch(), 0)["contrast"].item()
    assert torch.equal(method.bank.vectors, before)
    method.after_step(0)
    assert method.bank.pushed.item() == 3 * 4
    pushed = method.bank.vectors[:12]
    torch.testing.assert_close(pushed.norm(dim=1), torch.ones(12))
    assert not torch.equal(pushed[:4], pushed[4:8])
    assert not torch.equal(pushed[4:8], pushed[8:])
    assert torch.equal(method.bank.vectors[12:], before[12:])
    assert method(small_batch(), 0)["contrast"].item() != first


def test_the_bank_begins_uniform_within_the_root_of_three_over_its_channels() -> None:
    vectors = small_pcrl(bank_size=4000).bank.vectors
    limit = math.sqrt(3 / 12)
    assert 0.99 * limit < vectors.abs().max() <= limit
    assert vectors.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)


def test_the_twin_follows_with_its_momentum() -> None:
    method = small_pcrl(momentum=0.9)
    before = method.projector_twin.network[0].weight.clone()  # type: ignore[index]
    with torch.no_grad():
        method.projector[0].weight.add_(1)
    method.after_step(0)
    torch.testing.assert_close(method.projector_twin.network[0].weight, before + 0.1)  # type: ignore[index]
