"""InfoNCE against a bank: each query and its positive key, with the vectors of a bank as negatives.

    l_i = log(exp(s_i) + sum_j exp(<q_i, b_j> / temperature)) - s_i           s_i = <q_i, k_i> / temperature
        = softplus(log sum_j exp(<q_i, b_j> / temperature) - s_i)

(MoCo v2, as DiRA's discriminative term.) In the second form nothing cancels near the minimum.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import check_vectors, check_weights
from ._registration import needs_functional_reference
from .info_nce import check_reduction, reduce_losses, scale_of
from .pairwise_logsumexp import as_problems, similarities, unit_vectors


def bank_info_nce(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE loss of N pairs with the K vectors of a bank as negatives, without storing the N x K similarities.

    Args:
        query: (..., N, C) float32, bfloat16, float16 or float64.
        key: (..., N, C); key i is the positive of query i. Pairs are no negatives of each other.
        bank: (K, C) for all queries, or (..., K, C).
        temperature: positive; a tensor of shape (1,) gets a gradient where it asks for one.
        weights: (..., N) weight of each pair, not negative, floating or bool; no gradient.
        normalize: make every vector unit length first, those of the bank too. A vector shorter than 1e-6 becomes zeros
            and gets no gradient.
        reduction: "mean" over all pairs (over the sum of the weights), "sum", or "none" for (..., N).

    Returns: the loss, float32 (float64 where an argument has that). Every tensor that asks for a gradient gets one; a
        bank that does not costs none.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, a set is empty, or temperature or reduction is not one of the above.
    """
    query, key, bank, shape = check_bank(query, key, bank, weights, reduction)
    scale = scale_of(temperature, query)
    common = torch.promote_types(query.dtype, bank.dtype)
    if needs_functional_reference() or torch.float64 in (common, scale.dtype):
        negative = _negatives(query, bank, scale, normalize)
    else:
        problems = (as_problems(vectors.to(common)) for vectors in (query, bank))
        options = (False, False, False, normalize)  # two sets, all pairs, rows alone
        negative, _ = torch.ops.voxtrast.pairwise_logsumexp(*problems, scale, *options)
    positive = paired_similarities(query, key, scale, normalize)
    losses = functional.softplus(negative.reshape(shape) - positive.reshape(shape)).to(positive.dtype)
    return reduce_losses(losses, weights, reduction)


def bank_info_nce_reference(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.2,
    weights: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """The same in plain torch. Keeps the (..., N, K) matrix."""
    scale = scale_of(temperature, query)
    negative = _negatives(query, bank, scale, normalize)
    positive = paired_similarities(query, key, scale, normalize)
    return reduce_losses(torch.logaddexp(negative, positive) - positive, weights, reduction)


def _negatives(query: Tensor, bank: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    if normalize:
        query, bank = unit_vectors(query), unit_vectors(bank)
    return similarities(query, bank, scale).logsumexp(-1)


def check_bank(
    query: Tensor, key: Tensor, bank: Tensor, weights: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """The arguments with one bank for each problem, and the shape of the losses. One bank for all makes one problem."""
    check_vectors("query", query)
    check_vectors("key", key, "query", query)
    if key.shape != query.shape:
        raise ValueError(f"key: expected one key for each query, {tuple(query.shape)}, got {tuple(key.shape)}")
    shape = query.shape[:-1]
    if weights is not None:
        check_weights("weights", weights, "query", query)
    check_reduction(reduction)
    if isinstance(bank, Tensor) and bank.dim() == 2:
        query, key = query.flatten(0, -2), key.flatten(0, -2)
    check_vectors("bank", bank, "query", query)
    return query, key, bank, shape


def paired_similarities(query: Tensor, key: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    """scale <q_i, k_i> in float32 at least: (..., N)."""
    working_type = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    if normalize:
        query, key = unit_vectors(query), unit_vectors(key)
    return scale * (query.to(working_type) * key.to(working_type)).sum(-1)
