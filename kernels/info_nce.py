"""InfoNCE: each query against its own key, among all keys.

    l_i = log sum_j exp(s_ij) - s_ii           s_ij = <q_i, k_j> / temperature
    symmetric:  l_i = 1/2 (log sum_j exp(s_ij) + log sum_j exp(s_ji)) - s_ii

(van den Oord et al., "Representation learning with contrastive predictive coding", 2018; symmetric as in Radford et
al., CLIP, 2021.) The sums run over the negatives alone, n_i = log sum_{j != i} exp(s_ij), and

    l_i = softplus(n_i - s_ii)           d l_i / d s_ii = -sigmoid(n_i - s_ii)

so that nothing cancels near the minimum, where the loss and its gradient are small differences of large numbers.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_vectors, check_weights
from ._global_info_nce import global_info_nce
from ._ranks import ranks_of, sum_over_ranks
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_operator,
)
from .pairwise_logsumexp import as_problems, pairwise_gradients, similarities, unit_vectors


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    group: Any = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE loss of N pairs of vectors, without storing the N x N similarities.

    Args:
        query: (..., N, C) float32, bfloat16, float16 or float64. Leading dimensions are independent problems.
        key: (..., N, C); key i is the positive of query i, the others are its negatives.
        temperature: positive; a tensor of shape (1,) gets a gradient where it asks for one.
        symmetric: also each key against all queries, both directions weighing half.
        negatives: (..., K, C) more negatives of every query. With `symmetric` they take no part in the direction from
            the keys to the queries.
        weights: (..., N) weight of each pair, not negative, floating or bool; no gradient. A pair of weight 0 remains a
            negative of the others.
        group: a torch.distributed process group: the keys of all its ranks are negatives, and in the symmetric loss the
            queries of all its ranks. N must be the same on every rank. Each rank gets the loss of its own pairs; the
            mean of losses and gradients over the ranks, as data parallel training takes it, is that of one process
            with all pairs. Not for float64, gradients of gradients and `torch.func`.
        normalize: make every vector unit length first. A vector shorter than 1e-6 becomes zeros and gets no gradient.
        reduction: "mean" over all pairs (over the sum of the weights), "sum", or "none" for (..., N).

    Returns: the loss, float32 (float64 where an argument has that). "mean" is 0 with zero gradients where the weights
        sum to 0. NaN where a NaN or an infinity takes part.

    Gradients come from the saved log-sum-exps in backward, so every reduction and upstream gradient is exact.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, a set is empty, or temperature or reduction is not one of the above.
    """
    check_vectors("query", query)
    check_vectors("key", key, "query", query)
    if key.shape != query.shape:
        raise ValueError(
            f"key: expected one key for each query, {tuple(query.shape)}, got {tuple(key.shape)}; "
            f"give further keys as `negatives`"
        )
    if negatives is not None:
        check_vectors("negatives", negatives, "query", query)
    if weights is not None:
        check_weights("weights", weights, "query", query)
    check_reduction(reduction)
    scale = scale_of(temperature, query)
    keys = key if negatives is None else torch.cat((key, negatives), dim=-2)
    common = torch.promote_types(query.dtype, keys.dtype)
    if group is not None and ranks_of(group) > 1:
        if needs_functional_reference() or torch.float64 in (common, scale.dtype):
            raise ValueError("group: works in float32, bfloat16 and float16, outside the transforms of torch.func")
        local, theirs = (as_problems(vectors.to(common)) for vectors in (query, key))
        extra = None if negatives is None else as_problems(negatives.to(common))
        losses = global_info_nce(local, theirs, extra, scale, symmetric, normalize, group)
        return reduce_over_ranks(losses.reshape(query.shape[:-1]), weights, reduction, group)
    if needs_functional_reference() or torch.float64 in (common, scale.dtype):
        losses = _losses(query, keys, scale, 0, symmetric, normalize)
    else:
        problems = (as_problems(vectors.to(common)) for vectors in (query, keys))
        losses, *_ = torch.ops.voxtrast.info_nce(*problems, scale, 0, symmetric, normalize)
    return reduce_losses(losses.reshape(query.shape[:-1]), weights, reduction)


def info_nce_reference(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The same in plain torch. Keeps the (..., N, N + K) matrix."""
    keys = key if negatives is None else torch.cat((key, negatives), dim=-2)
    losses = _losses(query, keys, scale_of(temperature, query), 0, symmetric, normalize)
    return reduce_losses(losses, weights, reduction)


def scale_of(temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature as a tensor of shape (1,). Raises ValueError where it is not positive; a tensor's value is not
    looked at, which would make a GPU wait."""
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point() or temperature.numel() != 1:
            raise ValueError(
                f"temperature: expected a number or a floating tensor of shape (1,), "
                f"got {temperature.dtype} of {tuple(temperature.shape)}"
            )
        if temperature.device != like.device:
            raise ValueError(
                f"temperature: is on {temperature.device} while the vectors are on {like.device}; move one of them"
            )
        return 1 / temperature.reshape(1).to(torch.promote_types(temperature.dtype, torch.float32))
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
    working_type = torch.promote_types(like.dtype, torch.float32)
    return torch.full((1,), 1 / temperature, dtype=working_type, device=like.device)


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")


def reduce_losses(losses: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Weighs the losses (..., N) and reduces them; without weight a loss may be anything."""
    if weights is None:
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    share = weights.detach().to(losses.dtype)
    weighed = torch.where(share != 0, share * losses, 0)
    if reduction == "none":
        return weighed
    if reduction == "sum":
        return weighed.sum()
    total = share.sum()
    return weighed.sum() / torch.where(total == 0, 1, total)


def reduce_over_ranks(losses: Tensor, weights: Tensor | None, reduction: str, group: Any) -> Tensor:
    """As `reduce_losses`; the mean divides by the ranks' mean sum of weights, so that the mean over ranks is right."""
    if weights is None or reduction != "mean":
        return reduce_losses(losses, weights, reduction)
    total = sum_over_ranks(weights.to(losses.dtype).sum(), group) / ranks_of(group)
    return reduce_losses(losses, weights, "sum") / torch.where(total == 0, 1, total)


def _losses(query: Tensor, key: Tensor, scale: Tensor, offset: int, symmetric: bool, normalize: bool) -> Tensor:
    """The losses (..., N) in plain torch."""
    if normalize:
        query, key = unit_vectors(query), unit_vectors(key)
    similarity = similarities(query, key, scale)
    own = torch.arange(query.shape[-2], device=query.device)
    positive = similarity[..., own, own + offset]
    losses = similarity.logsumexp(-1) - positive
    if symmetric:
        losses = (losses + (similarity.logsumexp(-2)[..., own + offset] - positive)) / 2
    return losses


def _operator_reference(
    query: Tensor, key: Tensor, scale: Tensor, offset: int, symmetric: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (B, N), log-sum-exps over the negatives (B, N) and (B, M), positive similarities (B, N)."""
    losses = _losses(query, key, scale, offset, symmetric, normalize)
    if normalize:
        query, key = unit_vectors(query), unit_vectors(key)
    similarity = similarities(query.detach(), key.detach(), scale.detach())
    own = torch.arange(query.shape[-2], device=query.device)
    positive = similarity[..., own, own + offset]
    pair = torch.zeros_like(similarity, dtype=torch.bool)
    pair[..., own, own + offset] = True
    others = similarity.masked_fill(pair, -torch.inf)
    row, column = others.logsumexp(-1).double(), others.new_empty((*others.shape[:-2], 0), dtype=torch.float64)
    return losses, row, others.logsumexp(-2).double() if symmetric else column, positive.double()


def _fake(
    query: Tensor, key: Tensor, scale: Tensor, offset: int, symmetric: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = scale.new_empty((query.shape[0], query.shape[1]))
    row, positive = (loss.new_empty(loss.shape, dtype=torch.float64) for _ in range(2))
    return loss, row, row.new_empty((key.shape[0], key.shape[1] if symmetric else 0)), positive


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, scale, ctx.offset, ctx.symmetric, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, scale, *output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, scale, row, column, positive = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if needs_reference("pairwise_backward", grad_loss.device):

        def losses(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
            return _losses(query, key, scale, ctx.offset, ctx.symmetric, ctx.normalize)

        return (*gradients_by_reference(losses, (query, key, scale), needed, grad_loss), *[None] * 3)
    grad_row = grad_loss.double() / (2 if ctx.symmetric else 1)
    grad_positive = grad_row * torch.sigmoid(row - positive)
    of_columns = None
    if ctx.symmetric:
        own = slice(ctx.offset, ctx.offset + row.shape[1])
        grad_positive = grad_positive + grad_row * torch.sigmoid(column[:, own] - positive)
        column_lse, grad_column = column.clone(), torch.zeros_like(column)
        column_lse[:, own] = torch.logaddexp(column[:, own], positive)
        grad_column[:, own] = grad_row
        of_columns = (column_lse, grad_column)
    grad_query, grad_key, grad_scale = pairwise_gradients(
        query,
        key,
        scale,
        row=(torch.logaddexp(row, positive), grad_row),
        column=of_columns,
        positive=grad_positive,
        offset=ctx.offset,
        exclude=True,
        normalize=ctx.normalize,
        need_key=needed[1],
    )
    return (
        grad_query if needed[0] else None,
        grad_key if needed[1] else None,
        grad_scale if needed[2] else None,
        *[None] * 3,
    )


register_operator(
    "info_nce(Tensor query, Tensor key, Tensor scale, int offset, bool symmetric, bool normalize)"
    " -> (Tensor loss, Tensor row_lse, Tensor column_lse, Tensor positive)",
    reference=_operator_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(2,),
)
