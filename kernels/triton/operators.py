"""The pairwise operators on CUDA tensors: what kernels/<operator>.py declares, by the kernels of this folder."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .pairwise import Pairs, Positives, SideGradient

EXACT_ABOVE = 40.0  # log(1 + exp(x)) is x in float64


def _on_device(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(operator)
    def launch(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return operator(first, *rest)

    return launch


@_on_device
def pairwise_logsumexp(
    query: Tensor, key: Tensor, scale: Tensor, same: bool, exclude_diagonal: bool, columns: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    pairs = Pairs(query, key, scale, same=same, normalize=normalize)
    row, column = pairs.log_sum_exponentials(excluded=0 if exclude_diagonal else None, both=columns)
    return row, row.new_empty((query.shape[0], 0)) if column is None else column


@_on_device
def pairwise_backward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    grad_row: Tensor,
    column_lse: Tensor,
    grad_column: Tensor,
    grad_positive: Tensor,
    offset: int,
    same: bool,
    exclude: bool,
    normalize: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = Pairs(query, key, scale, same=same, normalize=normalize)
    both = column_lse.numel() > 0
    if same:
        # Rows and columns of a set with itself have the same sums.
        row = column = SideGradient(grad_row + grad_column if both else grad_row, row_lse)
    else:
        row = SideGradient(grad_row, row_lse)
        column = SideGradient(grad_column, column_lse) if both else SideGradient(None)
    positives = None
    if grad_positive.numel():
        taken, rest = grad_positive.contiguous(), key.shape[1] - offset - query.shape[1]
        positives = Positives(taken, functional.pad(taken, (offset, rest)))
    return pairs.differentiate(
        row, column, positives, excluded=offset if exclude else None, offset=offset, need_key=need_key
    )


@_on_device
def info_nce(
    query: Tensor, key: Tensor, scale: Tensor, offset: int, symmetric: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = Pairs(query, key, scale, same=False, normalize=normalize)
    row, column = pairs.log_sum_exponentials(excluded=offset, both=symmetric)
    positive = pairs.paired(offset)
    loss = functional.softplus(row - positive, threshold=EXACT_ABOVE)
    if column is None:
        return loss.float(), row, row.new_empty((query.shape[0], 0)), positive
    back = functional.softplus(column[:, offset : offset + query.shape[1]] - positive, threshold=EXACT_ABOVE)
    return ((loss + back) / 2).float(), row, column, positive


@_on_device
def positional_info_nce(
    features: Tensor, order: Tensor, first: Tensor, last: Tensor, scale: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    order, first, last = order.contiguous(), first.contiguous(), last.contiguous()
    pairs = Pairs(features, features, scale, same=True, normalize=normalize, order=order)
    lse, _ = pairs.log_sum_exponentials(excluded=0, both=False)
    losses = torch.where(last - first > 1, lse - pairs.range_means(first, last), 0).float()
    return torch.empty_like(losses).scatter_(1, order.expand(losses.shape), losses), lse


@_on_device
def positional_info_nce_backward(
    grad_loss: Tensor,
    features: Tensor,
    order: Tensor,
    first: Tensor,
    last: Tensor,
    scale: Tensor,
    lse: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    order, first, last = order.contiguous(), first.contiguous(), last.contiguous()
    pairs = Pairs(features, features, scale, same=True, normalize=normalize, order=order)
    number = last - first - 1
    weight = torch.where(number > 0, grad_loss.gather(1, order.expand(grad_loss.shape)), 0)
    sides = SideGradient(weight, lse)
    share = weight / number.clamp(min=1)
    grad_features, _, grad_scale = pairs.differentiate(
        sides, sides, Positives(share, share, first, last), excluded=0, need_key=False
    )
    return grad_features, grad_scale


@_on_device
def softplus_sums(query: Tensor, bank: Tensor, scale: Tensor, shift: Tensor, normalize: bool) -> Tensor:
    return Pairs(query, bank, scale, same=False, normalize=normalize).softplus_sums(shift)


@_on_device
def softplus_sums_backward(
    grad: Tensor, query: Tensor, bank: Tensor, scale: Tensor, shift: Tensor, normalize: bool, need_bank: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = Pairs(query, bank, scale, same=False, normalize=normalize)
    return pairs.differentiate(
        SideGradient(grad), SideGradient(None), None, excluded=None, softplus=shift, need_key=need_bank
    )
