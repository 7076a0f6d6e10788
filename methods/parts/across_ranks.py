"""The parts of a global batch brought together: micro-batches of this rank, and those of the other ranks.

The global order of samples is micro-batch, rank, sample, as the data plane deals them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process and how many share a batch; (0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def gather_parts(parts: Sequence[Tensor], group: Any = None) -> Tensor:
    """The samples of all parts in the global order, without gradients.

    Args:
        parts: (b, ...), one a micro-batch of this rank; the same shapes on every rank.

    Returns: (parts * ranks * b, ...).
    """
    own = torch.stack([part.detach() for part in parts])  # (A, b, ...)
    _, size = rank_and_size(group)
    if size == 1:
        return own.flatten(0, 1)
    everywhere = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(everywhere, own.contiguous(), group=group)
    return torch.stack(everywhere, dim=1).flatten(0, 2)


def own_part(samples: Tensor, part: int, parts: int, group: Any = None) -> Tensor:
    """The rows of this rank's micro-batch `part` of `parts` out of what is in the global order."""
    rank, size = rank_and_size(group)
    count = len(samples) // (parts * size)
    first = (part * size + rank) * count
    return samples[first : first + count]


def mean_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The mean over the ranks, without gradients; the same on each of them."""
    _, size = rank_and_size(group)
    if size == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total / size


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The sum over the ranks, with gradients. A loss of it that every rank computes alike has, in the mean over the
    ranks that data parallel training takes, the gradients of one process."""
    if group is None or dist.get_world_size(group) == 1:
        return value
    total: Tensor = _SumOverRanks.apply(value, group)
    return total
