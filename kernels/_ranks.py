"""What losses over the ranks of a process group share: the samples of all ranks in the order of the ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks_of(group: Any) -> int:
    """How many ranks share the batch. Raises ValueError where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed is not initialised; call init_process_group first, or leave it out")
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is no member of it")
    return dist.get_world_size(group)


def sum_over_ranks(value: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, without gradient."""
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def check_equal_sizes(name: str, tensor: Tensor, group: Any) -> None:
    """Raises ValueError where a rank has another shape."""
    sizes = torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)
    everywhere = [torch.empty_like(sizes) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everywhere, sizes, group=group)
    found = [tuple(each.tolist()) for each in everywhere]
    if len(set(found)) > 1:
        raise ValueError(f"{name}: expected the same shape on every rank of group, got {found}; drop the last batch")


def gather(tensor: Tensor, group: Any) -> Tensor:
    """The tensors (B, N, ...) of all ranks, one after the other along N."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=1)
