"""That the parts of a global batch come together in its order, on one rank and on two."""

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from voxtrast.methods.parts.across_ranks import gather_parts, mean_over_ranks, own_part, sum_over_ranks

PARTS, RANKS, EACH = 3, 2, 2


def global_samples() -> torch.Tensor:
    return torch.arange(PARTS * RANKS * EACH * 2, dtype=torch.float64).reshape(-1, 2)


def test_parts_of_one_rank_are_put_one_after_the_other() -> None:
    samples = global_samples()
    parts = [own_part(samples, part, PARTS) for part in range(PARTS)]
    assert torch.equal(gather_parts(parts), samples)


def test_what_is_gathered_has_no_gradient() -> None:
    part = torch.ones(2, 3, requires_grad=True)
    assert not gather_parts([part]).requires_grad


def of_one_rank(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    group = dist.group.WORLD
    samples = global_samples()
    parts = [own_part(samples, part, PARTS, group) for part in range(PARTS)]
    # Micro-batch, rank, sample: the second rank's first part comes right behind the first rank's.
    assert parts[0][0, 0] == rank * EACH * 2
    assert torch.equal(gather_parts(parts, group), samples)

    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    own = torch.stack([part.sum() for part in parts]).sum()
    loss = sum_over_ranks(weight * own, group).square()
    loss.backward()
    mean_gradient = mean_over_ranks(weight.grad, group)
    alone = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    expected = (alone * samples.sum()).square()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert mean_gradient.item() == pytest.approx(alone.grad.item(), rel=1e-12)
    dist.destroy_process_group()


def test_two_ranks_see_the_batch_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_one_rank, (str(tmp_path),), RANKS)
