"""Positional contrast over the vectors of all ranks: rows stay where they are, vectors and positions travel.

Each rank sees its own vectors against those of all ranks. The log-sum-exps and their gradients are those of InfoNCE
without the own pair; the positives of a vector are a range of all vectors sorted by position, and what they add to
losses and gradients are differences of float64 prefix sums. All in float32 at least: only that lets the positives be
subtracted outside the matrix of gradients. The mean over the ranks of losses and gradients is that of one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ._position_ranges import ranges
from ._ranks import check_equal_sizes, gather
from .pairwise_logsumexp import pairwise_gradients, unit_vectors


def global_positional_info_nce(
    features: Tensor, positions: Tensor, threshold: float, scale: Tensor, normalize: bool, group: Any
) -> tuple[Tensor, Tensor]:
    """Losses of the own vectors (B, N), and which of them have positives.

    Args:
        features: (B, N, C), B and N the same on every rank.
        positions: (P, N) float32, one row for all problems or one for each.
    """
    check_equal_sizes("features", features, group)
    check_equal_sizes("positions", positions, group)
    everywhere = gather(positions, group)
    order = everywhere.argsort(dim=-1, stable=True)
    first, last = ranges(everywhere.gather(-1, order), threshold)
    back = order.argsort(dim=-1)  # where each vector stands among the sorted
    count, offset = positions.shape[1], dist.get_rank(group) * positions.shape[1]
    own = back[:, offset : offset + count]
    bounds = (first.gather(-1, own), last.gather(-1, own))
    losses: Tensor = _GlobalPositionalInfoNCE.apply(features.float(), order, *bounds, scale, normalize, group)
    return losses, (bounds[1] - bounds[0] > 1).expand(losses.shape)


class _GlobalPositionalInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        order: Tensor,
        first: Tensor,
        last: Tensor,
        scale: Tensor,
        normalize: bool,
        group: Any,
    ) -> Tensor:
        offset = dist.get_rank(group) * features.shape[1]
        keys = gather(features, group)
        _, row, _, _ = torch.ops.voxtrast.info_nce(features, keys, scale, offset, False, normalize)
        summed, own = _sums_of_positives(features, keys, order, first, last, normalize)
        number = last - first - 1
        mean = scale.double() * (own * summed).sum(-1) / number.clamp(min=1)
        ctx.save_for_backward(features, keys, order, first, last, scale, row)
        ctx.normalize, ctx.group, ctx.offset = normalize, group, offset
        return torch.where(number > 0, row - mean, 0).to(scale.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        features, keys, order, first, last, scale, row = ctx.saved_tensors
        number = last - first - 1
        grad_loss = torch.where(number > 0, gradients[0].double(), 0)
        grad_own, grad_keys, grad_scale = pairwise_gradients(
            features,
            keys,
            scale,
            row=(row, grad_loss),
            offset=ctx.offset,
            exclude=True,
            normalize=ctx.normalize,
        )
        summed, own = _sums_of_positives(features, keys, order, first, last, ctx.normalize)
        share = (grad_loss / number.clamp(min=1))[..., None]
        pull = scale.double() * share * own
        # Each vector pulls at the range of its positives: +pull where that begins, -pull where it ends, summed up.
        steps = own.new_zeros((*keys.shape[:1], keys.shape[1] + 1, keys.shape[2]))
        for bound, signed in ((first, pull), (last, -pull)):
            steps.scatter_add_(1, bound[..., None].expand(pull.shape), signed)
        pushed = torch.empty_like(steps[:, :-1])
        pushed.scatter_(1, order[..., None].expand(pushed.shape), steps.cumsum(1)[:, :-1])
        pushed[:, ctx.offset : ctx.offset + features.shape[1]] -= pull  # no vector is its own positive
        grad_own = grad_own - _through_length(scale.double() * share * summed, features, ctx.normalize)
        grad_keys = grad_keys - _through_length(pushed, keys, ctx.normalize)
        grad_scale = grad_scale - (share * own * summed).sum().to(grad_scale.dtype)
        dist.all_reduce(grad_keys, group=ctx.group)
        grad_own = grad_own + grad_keys[:, ctx.offset : ctx.offset + features.shape[1]]
        return grad_own, None, None, None, grad_scale, None, None


def _sums_of_positives(
    features: Tensor, keys: Tensor, order: Tensor, first: Tensor, last: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """For each own vector the sum of its positives, and itself: (B, N, C) float64."""
    own, everywhere = ((unit_vectors(vectors) if normalize else vectors).double() for vectors in (features, keys))
    ordered = everywhere.gather(1, order[..., None].expand(everywhere.shape))
    prefix = functional.pad(ordered.cumsum(1), (0, 0, 1, 0))
    below, above = (prefix.gather(1, bound[..., None].expand(own.shape)) for bound in (first, last))
    return above - below - own, own


def _through_length(gradient: Tensor, vectors: Tensor, normalize: bool) -> Tensor:
    """The gradient of vectors, float32, from that of what they are compared as."""
    if not normalize:
        return gradient.float()
    with torch.enable_grad():
        leaf = vectors.detach().requires_grad_()
        (found,) = torch.autograd.grad(unit_vectors(leaf), leaf, gradient.float())
    return found
