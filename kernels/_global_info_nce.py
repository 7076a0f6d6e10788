"""InfoNCE with the keys of all ranks as negatives: rows stay where they are, keys and column sums travel.

Each rank holds N pairs. It sees its own queries against all keys; the sums over all queries, which the direction from
keys to queries needs, are merged from the ranks' parts as log-sum-exps. In backward the ranks' parts of the gradients
of the keys are added, and each takes its own. The mean over the ranks of the losses, and of the gradients as data
parallel training takes it, is that of one process with all pairs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ._ranks import check_equal_sizes, gather
from .pairwise_logsumexp import pairwise_gradients


def global_info_nce(
    query: Tensor, key: Tensor, negatives: Tensor | None, scale: Tensor, symmetric: bool, normalize: bool, group: Any
) -> Tensor:
    """Losses (B, N) of the own pairs.

    Args:
        query, key: (B, N, C), one type, N and B the same on every rank.
        negatives: (B, K, C) further negatives of the own queries alone.
    """
    check_equal_sizes("query", query, group)
    extra = key.new_empty((key.shape[0], 0, key.shape[2])) if negatives is None else negatives
    losses: Tensor = _GlobalInfoNCE.apply(query, key, extra, scale, symmetric, normalize, group)
    return losses


class _GlobalInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        extra: Tensor,
        scale: Tensor,
        symmetric: bool,
        normalize: bool,
        group: Any,
    ) -> Tensor:
        count, offset = key.shape[1], dist.get_rank(group) * key.shape[1]
        keys = torch.cat((gather(key, group), extra), dim=1)
        losses, row, column, positive = torch.ops.voxtrast.info_nce(query, keys, scale, offset, symmetric, normalize)
        if symmetric:
            everybody = count * dist.get_world_size(group)
            parts = gather(column[:, None, :everybody].contiguous(), group)  # (B, ranks, all keys)
            column = functional.pad(parts.logsumexp(1), (0, extra.shape[1]))
            back = functional.softplus(column[:, offset : offset + count] - positive)
            losses = ((functional.softplus(row - positive) + back) / 2).to(losses.dtype)
        ctx.save_for_backward(query, keys, scale, row, column, positive)
        ctx.options, ctx.offset, ctx.group, ctx.extra = (symmetric, normalize), offset, group, extra.shape[1]
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        query, keys, scale, row, column, positive = ctx.saved_tensors
        (symmetric, normalize), group = ctx.options, ctx.group
        count = query.shape[1]
        own = slice(ctx.offset, ctx.offset + count)
        grad_row = gradients[0].double() / (2 if symmetric else 1)
        grad_positive = grad_row * torch.sigmoid(row - positive)
        of_columns = None
        if symmetric:
            # Every query pulls at every key: the gradients and positives of all ranks are needed.
            grad_positive = grad_positive + grad_row * torch.sigmoid(column[:, own] - positive)
            grad_column, positives = (
                functional.pad(gather(each, group), (0, ctx.extra)) for each in (grad_row, positive)
            )
            of_columns = (torch.logaddexp(column, positives), grad_column)
        grad_query, grad_keys, grad_scale = pairwise_gradients(
            query,
            keys,
            scale,
            row=(torch.logaddexp(row, positive), grad_row),
            column=of_columns,
            positive=grad_positive,
            offset=ctx.offset,
            exclude=True,
            normalize=normalize,
        )
        everybody = keys.shape[1] - ctx.extra
        # Added in float32: low-precision parts of many ranks would round away.
        shared = grad_keys[:, :everybody].float().contiguous()
        dist.all_reduce(shared, group=group)
        grad_extra = grad_keys[:, everybody:] if ctx.extra else None
        return grad_query, shared[:, own].to(keys.dtype), grad_extra, grad_scale, None, None, None
