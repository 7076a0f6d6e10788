"""Which sorted positions are near each other."""

import torch
from torch import Tensor

FEW = 64  # vectors: up to here to compare all positions is faster than the many steps of a bisection


def ranges(positions: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """For each of the sorted positions (..., N) the first index and the index after the last that is nearer than the
    threshold. Bisection on the predicate: a search for position - threshold would round otherwise than it does."""
    count = positions.shape[-1]
    limit = torch.full((), threshold, dtype=torch.float32, device=positions.device)  # a copy would make a GPU wait
    if count <= FEW:
        far = ~((positions[..., :, None] - positions[..., None, :]).abs() < limit)
        return far.tril(-1).sum(-1), count - far.triu(1).sum(-1)
    own = torch.arange(count, device=positions.device).expand(positions.shape)
    below, above = torch.zeros_like(own), torch.full_like(own, count - 1)
    first, last = own.clone(), own.clone()  # near enough, as far as is known
    for _ in range(count.bit_length()):
        middle = (below + first) // 2
        near = (positions - positions.gather(-1, middle)) < limit
        near &= middle < first
        first, below = torch.where(near, middle, first), torch.where(near, below, torch.minimum(middle + 1, first))
        middle = (above + last + 1) // 2
        near = (positions.gather(-1, middle) - positions) < limit
        near &= middle > last
        last, above = torch.where(near, middle, last), torch.where(near, above, torch.maximum(middle - 1, last))
    return first, last + 1
