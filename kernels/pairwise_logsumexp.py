"""Log-sum-exps over all pairs of two sets of vectors, without storing the pairs.

    row_i = log sum_j exp(scale <q_i, k_j>)        column_j = log sum_i exp(scale <q_i, k_j>)

The sums run over tiles of the matrix of similarities. While scale * max|q| * max|k| is at most 42 one constant shift
serves all of them, so that a pair costs one exponential for rows and columns together; beyond, each row and column
keeps its maximum (as in Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Backward computes
the similarities anew from the vectors and the saved log-sum-exps.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._checks import check_vectors
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)


def pairwise_logsumexp(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor,
    exclude_diagonal: bool = False,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp of all scaled dot products of two sets of vectors.

    Args:
        query: (..., N, C) float32, bfloat16, float16 or float64. Leading dimensions are independent problems.
        key: (..., M, C) with the same leading dimensions. The very tensor `query` for a set with itself: half the work.
            Where the types differ, both are promoted.
        scale: factor of the dot products, 1 / temperature; a tensor of shape (1,) may ask for a gradient.
        exclude_diagonal: leave out the pairs (i, i).
        columns: also sum over the queries for each key.

    Returns: row_lse (..., N), and column_lse (..., M) where asked for; float32 (float64 where an argument has that).
        -inf where every pair is excluded. NaN where a NaN or an infinity takes part.

    Memory beyond inputs and outputs grows with N + M, not with their product. Sums are the same for any number of
    threads. In float64, for gradients of gradients and under the transforms of `torch.func` the torch reference
    computes, which holds the matrix.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, a set is empty, or scale is not finite.
    """
    check_vectors("query", query)
    check_vectors("key", key, "query", query)
    factor = scale_tensor(scale, query)
    same = key is query
    common = torch.promote_types(query.dtype, key.dtype)
    if needs_functional_reference() or torch.float64 in (common, factor.dtype):
        return pairwise_logsumexp_reference(
            query, key, scale=factor, exclude_diagonal=exclude_diagonal, columns=columns
        )
    problems = as_problems(query.to(common))
    others = problems if same else as_problems(key.to(common))
    row, column = torch.ops.voxtrast.pairwise_logsumexp(
        problems, others, factor, same, exclude_diagonal, columns, False
    )
    row = row.to(torch.float32).reshape(query.shape[:-1])
    return (row, column.to(torch.float32).reshape(key.shape[:-1])) if columns else row


def pairwise_logsumexp_reference(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor,
    exclude_diagonal: bool = False,
    columns: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in plain torch. Keeps the (..., N, M) matrix."""
    similarity = similarities(query, key, scale)
    if exclude_diagonal:
        own = torch.eye(*similarity.shape[-2:], dtype=torch.bool, device=query.device)
        similarity = similarity.masked_fill(own, -torch.inf)
    row = similarity.logsumexp(-1)
    return (row, similarity.logsumexp(-2)) if columns else row


def similarities(query: Tensor, key: Tensor, scale: float | Tensor) -> Tensor:
    """scale <q_i, k_j> in float32 at least: (..., N, M)."""
    working_type = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return scale * (query.to(working_type) @ key.to(working_type).mT)


def scale_tensor(scale: float | Tensor, like: Tensor) -> Tensor:
    """The scale as a tensor of shape (1,) on the device of `like`, float32 (float64 where it is that).

    Raises: TypeError or ValueError naming what is wrong with it. The value of a tensor is not looked at: that would
    make a GPU wait.
    """
    if isinstance(scale, Tensor):
        if not scale.is_floating_point() or scale.numel() != 1:
            raise ValueError(
                f"scale: expected a number or a floating tensor of shape (1,), "
                f"got {scale.dtype} of {tuple(scale.shape)}"
            )
        if scale.device != like.device:
            raise ValueError(f"scale: is on {scale.device} while query is on {like.device}; move one of them")
        return scale.reshape(1).to(torch.promote_types(scale.dtype, torch.float32))
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    working_type = torch.promote_types(like.dtype, torch.float32)
    return torch.full((1,), float(scale), dtype=working_type, device=like.device)


def as_problems(vectors: Tensor) -> Tensor:
    """(..., N, C) -> (B, N, C)"""
    return vectors.reshape(math.prod(vectors.shape[:-2]), *vectors.shape[-2:])


def pairwise_gradients(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    *,
    row: tuple[Tensor, Tensor],
    column: tuple[Tensor, Tensor] | None = None,
    positive: Tensor | None = None,
    offset: int = 0,
    same: bool = False,
    exclude: bool = False,
    normalize: bool = False,
    need_key: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and scale by the compiled operator.

    Args:
        row, column: log-sum-exps (float64) of the rows and of the columns, and the gradients with respect to them.
        positive: what the similarity of query i and key i + offset is to lose, (B, N).
        exclude: the pairs (i, i + offset) are in no log-sum-exp.
        need_key: otherwise the gradient of key is empty, as it is where `same`, whose gradients the query's hold.
    """
    of_columns = (row[0].new_empty((0,)), scale.new_empty((0,))) if column is None else column
    taken = scale.new_empty((0,)) if positive is None else positive.float()
    tensors = (query, key, scale, row[0], row[1].float(), of_columns[0], of_columns[1].float(), taken)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.voxtrast.pairwise_backward(
        *tensors, offset, same, exclude, normalize, need_key
    )
    return found


MINIMUM_NORM = 1e-6  # the same number stands in csrc/cpu/pairwise_vectors.cpp


def unit_vectors(vectors: Tensor) -> Tensor:
    """(..., C) of length one, float32 at least; zeros, without gradient, where the length is below 1e-6."""
    working = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    squared = (working * working).sum(-1, keepdim=True)
    directed = ~(squared < MINIMUM_NORM**2)  # asked this way round, NaN counts as a direction and shows in the loss
    inverse = torch.where(directed, squared, 1).rsqrt()
    inverse = torch.where(squared.isinf(), torch.nan, inverse)  # not a vector of zeros: its direction is unknown
    return torch.where(directed, working * inverse, 0)


def _reference(
    query: Tensor, key: Tensor, scale: Tensor, same: bool, exclude_diagonal: bool, columns: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    if normalize:
        query, key = unit_vectors(query), unit_vectors(key)
    found = pairwise_logsumexp_reference(query, key, scale=scale, exclude_diagonal=exclude_diagonal, columns=True)
    # float64: rounded to float32, they would limit the gradients where a softmax is nearly all on one pair.
    row, column = (each.to(torch.float64) for each in found)
    return row, column if columns else column.new_empty((query.shape[0], 0))


def _fake(
    query: Tensor, key: Tensor, scale: Tensor, same: bool, exclude_diagonal: bool, columns: bool, normalize: bool
) -> tuple[Tensor, Tensor]:
    row = scale.new_empty((query.shape[0], query.shape[1]), dtype=torch.float64)
    return row, row.new_empty((key.shape[0], key.shape[1] if columns else 0))


def _fake_backward(
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
    shape = key.shape if need_key and not same else (0,)
    return query.new_empty(query.shape), key.new_empty(shape), scale.new_empty((1,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, scale, ctx.same, ctx.exclude_diagonal, ctx.columns, ctx.normalize = inputs
    ctx.save_for_backward(query, key, scale, *output)


def _backward(ctx: Any, grad_row: Tensor, grad_column: Tensor) -> tuple[Tensor | None, ...]:
    query, key, scale, row, column = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if needs_reference("pairwise_backward", grad_row.device):

        def weighted(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
            options = (ctx.same, ctx.exclude_diagonal, ctx.columns, ctx.normalize)
            rows, of_columns = _reference(query, key, scale, *options)
            return (rows * grad_row).sum() + (of_columns * grad_column).sum()

        return (*gradients_by_reference(weighted, (query, key, scale), needed, torch.ones_like(row[0, 0])), *[None] * 4)
    grad_query, grad_key, grad_scale = pairwise_gradients(
        query,
        key,
        scale,
        row=(row, grad_row),
        column=(column, grad_column),
        same=ctx.same,
        exclude=ctx.exclude_diagonal,
        normalize=ctx.normalize,
        need_key=needed[1],
    )
    return (
        grad_query if needed[0] else None,
        grad_key if needed[1] and not ctx.same else None,
        grad_scale if needed[2] else None,
        *[None] * 4,
    )


register_operator(
    "pairwise_logsumexp(Tensor query, Tensor key, Tensor scale, bool same, bool exclude_diagonal, bool columns,"
    " bool normalize) -> (Tensor row_lse, Tensor column_lse)",
    reference=_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(2,),
)
register_backward(
    "pairwise_backward(Tensor query, Tensor key, Tensor scale, Tensor row_lse, Tensor grad_row, Tensor column_lse,"
    " Tensor grad_column, Tensor grad_positive, int offset, bool same, bool exclude, bool normalize,"
    " bool need_key) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
