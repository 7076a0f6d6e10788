"""Noise-contrastive estimation against a bank with a fixed normaliser (PCRL, ICCV 2021; Wu et al., CVPR 2018).

    l_i = log(1 + K / r(k_i)) + sum_j log(1 + r(b_j) / K)           r(v) = exp(<q_i, v> / temperature) / m0

K is the size of the bank and m0 the mean of exp(<q, v> / temperature) over the first batch, frozen then. The official
code writes the same with a count of the data set that cancels, and an epsilon of 1e-5 in each quotient. Every term is a
softplus: log(1 + exp(s - shift)) with shift = log(m0 K), and the sign turned for the positive.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)
from .bank_info_nce import check_bank, paired_similarities
from .info_nce import reduce_losses, scale_of
from .pairwise_logsumexp import as_problems, similarities, unit_vectors


def bank_nce(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    normalizer: float | Tensor,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """NCE loss of N pairs against the K vectors of a bank, without storing the N x K similarities.

    Args:
        query: (..., N, C) float32, bfloat16, float16 or float64.
        key: (..., N, C); key i is the positive of query i.
        bank: (K, C) for all queries, or (..., K, C).
        temperature: positive; a tensor of shape (1,) gets a gradient where it asks for one.
        normalizer: m0, positive; a tensor of shape (1,) gets no gradient.
        weights: (..., N) weight of each pair, not negative, floating or bool; no gradient.
        normalize: make every vector unit length first, those of the bank too. A vector shorter than 1e-6 becomes zeros
            and gets no gradient.
        reduction: "mean" over all pairs (over the sum of the weights), "sum", or "none" for (..., N).

    Returns: the loss, float32 (float64 where an argument has that). Where every r is 1 it is about log(K + 1) + 1.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, a set is empty, or an option is not one of the above.
    """
    query, key, bank, shape = check_bank(query, key, bank, weights, reduction)
    scale, shift = scale_of(temperature, query), _shift(normalizer, query, bank.shape[-2])
    common = torch.promote_types(query.dtype, bank.dtype)
    if needs_functional_reference() or torch.float64 in (common, scale.dtype):
        sums = _sums(query, bank, scale, shift, normalize)
    else:
        problems = (as_problems(vectors.to(common)) for vectors in (query, bank))
        sums = torch.ops.voxtrast.softplus_sums(*problems, scale, shift, normalize)
    paired = paired_similarities(query, key, scale, normalize)
    losses = (_softplus(shift - paired).reshape(shape) + sums.reshape(shape)).to(paired.dtype)
    return reduce_losses(losses, weights, reduction)


def bank_nce_reference(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    normalizer: float | Tensor,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The same in plain torch. Keeps the (..., N, K) matrix."""
    scale, shift = scale_of(temperature, query), _shift(normalizer, query, bank.shape[-2])
    paired = paired_similarities(query, key, scale, normalize)
    losses = _softplus(shift.to(paired.dtype) - paired) + _sums(query, bank, scale, shift, normalize, paired.dtype)
    return reduce_losses(losses, weights, reduction)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own rounds to x above 20."""
    return x.clamp(min=0) + (-x.abs()).exp().log1p()


def _shift(normalizer: float | Tensor, query: Tensor, size: int) -> Tensor:
    """log(m0 K), of shape (1,) and float64: every term shares its rounding."""
    if isinstance(normalizer, Tensor):
        if not normalizer.is_floating_point() or normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected a number or a floating tensor of shape (1,), "
                f"got {normalizer.dtype} of {tuple(normalizer.shape)}"
            )
        if normalizer.device != query.device:
            raise ValueError(
                f"normalizer: is on {normalizer.device} while query is on {query.device}; move one of them"
            )
        return normalizer.detach().reshape(1).double().log() + math.log(size)
    if not (math.isfinite(normalizer) and normalizer > 0):
        raise ValueError(f"normalizer: expected a positive finite number, got {normalizer}")
    return torch.full((1,), math.log(normalizer) + math.log(size), dtype=torch.float64, device=query.device)


def _sums(
    query: Tensor,
    bank: Tensor,
    scale: Tensor,
    shift: Tensor,
    normalize: bool,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    if normalize:
        query, bank = unit_vectors(query), unit_vectors(bank)
    similarity = similarities(query, bank, scale)
    return _softplus(similarity - shift.to(similarity.dtype)).sum(-1, dtype=dtype)


def _fake(query: Tensor, bank: Tensor, scale: Tensor, shift: Tensor, normalize: bool) -> Tensor:
    return scale.new_empty(query.shape[:2], dtype=torch.float64)


def _fake_backward(
    grad: Tensor, query: Tensor, bank: Tensor, scale: Tensor, shift: Tensor, normalize: bool, need_bank: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = bank.shape if need_bank else (0,)
    return query.new_empty(query.shape), bank.new_empty(shape), scale.new_empty((1,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, bank, scale, shift = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if needs_reference("softplus_sums_backward", grad.device):

        def sums(query: Tensor, bank: Tensor, scale: Tensor) -> Tensor:
            return _sums(query, bank, scale, shift, ctx.normalize)

        found = gradients_by_reference(sums, (query, bank, scale), needed, grad)
    else:
        found = torch.ops.voxtrast.softplus_sums_backward(
            grad.float(), query, bank, scale, shift, ctx.normalize, needed[1]
        )
    return (*(gradient if need else None for gradient, need in zip(found, needed, strict=True)), None, None)


register_operator(
    "softplus_sums(Tensor query, Tensor bank, Tensor scale, Tensor shift, bool normalize) -> Tensor",
    reference=_sums,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(2,),
)
register_backward(
    "softplus_sums_backward(Tensor grad, Tensor query, Tensor bank, Tensor scale, Tensor shift, bool normalize,"
    " bool need_bank) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
