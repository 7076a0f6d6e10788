"""Positional contrast: vectors whose positions are near each other are positives, all others negatives.

    P(i) = {j != i : |pos_j - pos_i| < threshold}
    l_i = log sum_{j != i} exp(s_ij) - 1/|P(i)| sum_{j in P(i)} s_ij           s_ij = <x_i, x_j> / temperature

(PCL, MICCAI 2021, and JCL/MACL, with positions of slices; supervised contrast as in Khosla et al., 2020. With the
index of the image as the position and a threshold of 1/2 it is NT-Xent of SimCLR.) Sorted by position the positives of
a vector are a range, found by bisection on the predicate itself in float32; their sums are differences of float64
prefix sums. In backward they are subtracted within the matrix of gradients.
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_device, check_floating, check_vectors, check_weights
from ._global_positional_info_nce import global_positional_info_nce
from ._position_ranges import ranges
from ._ranks import ranks_of
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)
from .info_nce import check_reduction, reduce_losses, reduce_over_ranks, scale_of
from .pairwise_logsumexp import as_problems, similarities, unit_vectors


def positional_info_nce(
    features: Tensor,
    positions: Tensor,
    *,
    threshold: float,
    temperature: float | Tensor = 0.1,
    weights: Tensor | None = None,
    group: Any = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Contrast of N vectors with positives by position, without storing the N x N similarities.

    Args:
        features: (..., N, C) float32, bfloat16, float16 or float64. Leading dimensions are independent problems: JCL
            has one for each pixel.
        positions: (..., N), or (N,) for all problems, floating; used in float32. NaN is near nothing.
        threshold: positives are nearer than this; more than 0.
        temperature: positive; a tensor of shape (1,) gets a gradient where it asks for one.
        weights: (..., N) weight of each vector's loss, not negative, floating or bool; no gradient. A vector of weight
            0 remains a positive or negative of the others.
        group: a torch.distributed process group: the vectors of all its ranks are positives or negatives of each other.
            The shapes must be the same on every rank. Each rank gets the loss of its own vectors; the mean of losses
            and gradients over the ranks, as data parallel training takes it, is that of one process with all vectors.
            Computed in float32. Not for float64, gradients of gradients and `torch.func`.
        normalize: make every vector unit length first. A vector shorter than 1e-6 becomes zeros and gets no gradient.
        reduction: "mean" over the vectors that have positives (over the sum of their weights), "sum", or "none" for
            (..., N).

    Returns: the loss, float32 (float64 where features or temperature has that). A vector without positives has the loss
        0 and no part in the mean; where none has positives the loss is 0 with zero gradients.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, a problem has a single vector, or an option is out of range.
    """
    check_vectors("features", features)
    if features.shape[-2] < 2:
        raise ValueError(f"features: expected at least 2 vectors to contrast, got shape {tuple(features.shape)}")
    check_floating("positions", positions)
    check_device("positions", positions, "features", features)
    if positions.shape not in (features.shape[:-1], features.shape[-2:-1]):
        raise ValueError(
            f"positions: expected shape {tuple(features.shape[:-1])} or {tuple(features.shape[-2:-1])}, one for each "
            f"vector of features, got {tuple(positions.shape)}"
        )
    if not threshold > 0:
        raise ValueError(f"threshold: expected more than 0, got {threshold}; a vector has no positives otherwise")
    if weights is not None:
        check_weights("weights", weights, "features", features)
    check_reduction(reduction)
    scale = scale_of(temperature, features)
    # (P, N): one row for all problems where they share their positions, or one for each.
    where = positions.detach().to(torch.float32).reshape(-1, features.shape[-2])
    by_reference = needs_functional_reference() or torch.float64 in (features.dtype, scale.dtype)
    if group is not None and ranks_of(group) > 1:
        if by_reference:
            raise ValueError("group: works in float32, bfloat16 and float16, outside the transforms of torch.func")
        losses, near = global_positional_info_nce(as_problems(features), where, threshold, scale, normalize, group)
        share = _share(near.reshape(features.shape[:-1]), weights)
        return reduce_over_ranks(losses.reshape(features.shape[:-1]), share, reduction, group)
    if by_reference:
        return positional_info_nce_reference(
            features,
            positions,
            threshold=threshold,
            temperature=temperature,
            weights=weights,
            normalize=normalize,
            reduction=reduction,
        )
    order = where.argsort(dim=-1, stable=True)
    first, last = ranges(where.gather(-1, order), threshold)
    problems = as_problems(features)
    losses, _ = torch.ops.voxtrast.positional_info_nce(problems, order, first, last, scale, normalize)
    has_positives = last - first > 1
    if weights is None and reduction == "mean":  # no mask: what has no positives has no loss
        return losses.sum() / (has_positives.sum() * (len(losses) // len(order))).clamp(min=1)
    placed = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, has_positives)
    share = _share(placed.expand(losses.shape).reshape(features.shape[:-1]), weights)
    return reduce_losses(losses.reshape(features.shape[:-1]), share, reduction)


def positional_info_nce_reference(
    features: Tensor,
    positions: Tensor,
    *,
    threshold: float,
    temperature: float | Tensor = 0.1,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The same in plain torch. Keeps the (..., N, N) matrix."""
    chosen = unit_vectors(features) if normalize else features
    where = positions.detach().to(torch.float32)
    limit = torch.tensor(threshold, dtype=torch.float32, device=where.device)
    near = (where[..., :, None] - where[..., None, :]).abs() < limit
    own = torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
    near = near & ~own
    count = near.sum(-1)
    similarity = similarities(chosen, chosen, scale_of(temperature, features))
    lse = similarity.masked_fill(own, -torch.inf).logsumexp(-1)
    mean = torch.where(near, similarity, 0).sum(-1) / count.clamp(min=1)
    losses = torch.where(count > 0, lse - mean, 0)
    return reduce_losses(losses, _share((count > 0).expand(losses.shape), weights), reduction)


def _share(has_positives: Tensor, weights: Tensor | None) -> Tensor:
    return has_positives if weights is None else torch.where(has_positives, weights.detach(), 0)


def _rows(
    features: Tensor, order: Tensor, first: Tensor, last: Tensor, scale: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The losses (B, N), and the log-sum-exps in the order of the positions."""
    count = features.shape[-2]
    order = order.expand(features.shape[:2])
    chosen = unit_vectors(features) if normalize else features
    chosen = chosen.gather(1, order[..., None].expand(features.shape))
    index = torch.arange(count, device=features.device)
    own = torch.eye(count, dtype=torch.bool, device=features.device)
    near = (index >= first[..., None]) & (index < last[..., None]) & ~own
    similarity = similarities(chosen, chosen, scale)
    lse = similarity.masked_fill(own, -torch.inf).logsumexp(-1)
    mean = torch.where(near, similarity, 0).sum(-1) / near.sum(-1).clamp(min=1)
    losses = torch.where(last - first > 1, lse - mean, 0)
    return torch.zeros_like(losses).scatter(1, order, losses), lse.double()


def _fake(
    features: Tensor, order: Tensor, first: Tensor, last: Tensor, scale: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    shape = features.shape[:2]
    return scale.new_empty(shape), scale.new_empty(shape, dtype=torch.float64)


def _fake_backward(
    grad_loss: Tensor,
    features: Tensor,
    order: Tensor,
    first: Tensor,
    last: Tensor,
    scale: Tensor,
    lse: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), scale.new_empty((1,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    features, order, first, last, scale, lse = ctx.saved_tensors
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    if needs_reference("positional_info_nce_backward", grad_loss.device):

        def losses(features: Tensor, scale: Tensor) -> Tensor:
            return _rows(features, order, first, last, scale, ctx.normalize)[0]

        found = gradients_by_reference(losses, (features, scale), needed, grad_loss)
    else:
        found = torch.ops.voxtrast.positional_info_nce_backward(
            grad_loss, features, order, first, last, scale, lse, ctx.normalize
        )
    return found[0] if needed[0] else None, None, None, None, found[1] if needed[1] else None, None


register_operator(
    "positional_info_nce(Tensor features, Tensor order, Tensor first, Tensor last, Tensor scale, bool normalize)"
    " -> (Tensor loss, Tensor lse)",
    reference=_rows,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(4,),
)
register_backward(
    "positional_info_nce_backward(Tensor grad_loss, Tensor features, Tensor order, Tensor first, Tensor last,"
    " Tensor scale, Tensor lse, bool normalize) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
