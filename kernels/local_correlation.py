"""Displacement by local correlation: where in a small window does each vector find itself again?

    s(p, j, delta) = scale <query(p, j), key(p + delta, j)>          delta in {-r..r}^D, p + delta inside the volume
    u(p) = 1/J sum_j sum_delta softmax_delta(s(p, j, .)) delta

(COVER, ICCV 2025, the mixture of vectors, with its 8 channels a unit and scale 1/sqrt(8).) No product, logit or softmax
is kept: with g the gradient of u over J and v(p, j) = sum_delta softmax_delta delta, backward computes

    dS(p, j, delta) = softmax_delta(p, j) <g(p), delta - v(p, j)>
    dquery(p, j) = scale sum_delta dS(p, j, delta) key(p + delta, j)
    dkey(p, j) = scale sum_delta dS(p - delta, j, delta) query(p - delta, j)

from the log-sum-exp and v, which are.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import check_map, check_same_shape
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)


def local_correlation(query: Tensor, key: Tensor, *, radius: int, units: int = 1, scale: float | None = None) -> Tensor:
    """Expected offset, under a softmax of dot products, of each query vector in a window of key vectors.

    Args:
        query: (B, units * d, H, W) or (B, units * d, D, H, W), float32, bfloat16, float16 or float64; unit j is
            channels j * d .. (j + 1) * d - 1.
        key: the same shape.
        radius: r of the window of (2 r + 1)^D offsets, at least 1. Offsets outside the volume take no part, so it may
            be larger than the volume.
        units: vectors at each voxel; their displacements are averaged.
        scale: factor of the dot products, 1 / sqrt(d) if not given.

    Returns: the displacement, (B, 2, H, W) or (B, 3, D, H, W), in voxels of this map, each component within -r .. r.
        float32 (float64 where one map has that), and computed in it.

    Memory beyond that: two float32 maps of the size of query in passing, and 1 + D numbers kept for each voxel and unit
    (1 of a single unit). NaN reaches the voxels whose window holds it. The result is the same bits for any number of
    threads. Where gradients of gradients are asked for, in float64, in forward mode and under the transforms of
    `torch.func`, the torch reference computes, which keeps (2 r + 1)^D numbers.

    Raises:
        TypeError: query or key is not a floating tensor.
        ValueError: shapes or devices do not fit, a map is empty, or radius, units or scale is out of range.
    """
    check_map("query", query)
    check_same_shape("key", key, "query", query)
    if radius < 1:
        raise ValueError(f"radius: expected at least 1 voxel, got {radius}")
    if units < 1 or query.shape[1] % units != 0:
        raise ValueError(f"units: expected a divisor of the {query.shape[1]} channels of query, got {units}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    common = torch.promote_types(query.dtype, key.dtype)
    if needs_functional_reference() or common == torch.float64:
        return local_correlation_reference(query, key, radius=radius, units=units, scale=scale)
    factor = 1 / math.sqrt(query.shape[1] // units) if scale is None else float(scale)
    displacement, _, _ = torch.ops.voxtrast.local_correlation(query.to(common), key.to(common), radius, units, factor)
    return displacement


def local_correlation_reference(
    query: Tensor, key: Tensor, *, radius: int, units: int = 1, scale: float | None = None
) -> Tensor:
    """The same in plain torch. Keeps the softmax, (2 r + 1)^D numbers for each voxel and unit, for backward."""
    factor = 1 / math.sqrt(query.shape[1] // units) if scale is None else scale
    return _mean_offsets(query, key, radius, units, factor)[0].mean(1)


def _mean_offsets(query: Tensor, key: Tensor, radius: int, units: int, scale: float) -> tuple[Tensor, Tensor]:
    """v (B, J, D, *S), and the logits (B, J, n, *S)."""
    batch, channels, *sizes = query.shape
    dimensions = len(sizes)
    depth = channels // units
    working_type = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        # Each unit is a problem of its own: (B * J, d, *S).
        vectors = query.to(working_type).reshape(batch * units, depth, *sizes)
        vectors = vectors * scale
        padded = functional.pad(key.to(working_type).reshape(batch * units, depth, *sizes), [radius] * (2 * dimensions))

        # 0 where p + delta lies inside, -inf where not: (n, *S)
        border = functional.pad(vectors.new_zeros(sizes), [radius] * (2 * dimensions), value=-torch.inf)
        for axis, size in enumerate(sizes):
            border = border.unfold(axis, size, 1)
        border = border.reshape(-1, *sizes)

        products = _window_products if needs_functional_reference() else _WindowProducts.apply
        logits = products(vectors, padded, border)  # (B * J, n, *S)
        steps = torch.arange(-radius, radius + 1, dtype=working_type, device=query.device)
        offsets = torch.stack(torch.meshgrid(*[steps] * dimensions, indexing="ij")).flatten(1)  # (D, n)
        mean = offsets @ logits.softmax(1).flatten(2)
        return mean.reshape(batch, units, dimensions, *sizes), logits.unflatten(0, (batch, units))


def _window_products(query: Tensor, padded_key: Tensor, border: Tensor) -> Tensor:
    """<query(p), key(p + delta)> + border(delta, p) for every offset delta: (B, n, *S)."""
    windows = _windows(padded_key, query.shape[2:])
    return torch.stack(
        [(query * padded_key[window]).sum(1) + edge for window, edge in zip(windows, border, strict=True)], 1
    )


class _WindowProducts(torch.autograd.Function):
    """The same, with a gradient that is written out from differentiable operations.

    Autograd's own makes a zero map of the size of the padded key for each of the n slices: 2.5 times the time of the
    whole operator.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, padded_key: Tensor, border: Tensor) -> Tensor:
        ctx.save_for_backward(query, padded_key)
        products = query.new_empty(query.shape[0], *border.shape)
        for index, window in enumerate(_windows(padded_key, query.shape[2:])):
            products[:, index] = (query * padded_key[window]).sum(1) + border[index]
        return products

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        query, padded_key = ctx.saved_tensors
        # Made from the gradient: a batch of gradients (is_grads_batched) then gets a batch of results.
        grad_query, grad_key = (gradients[0].new_zeros(tensor.shape) for tensor in (query, padded_key))
        for index, window in enumerate(_windows(padded_key, query.shape[2:])):
            gradient = gradients[0][:, index, None]
            grad_query.addcmul_(gradient, padded_key[window])
            grad_key[window].addcmul_(gradient, query)
        return grad_query, grad_key, None


def _windows(padded: Tensor, sizes: torch.Size) -> Iterator[tuple[Any, ...]]:
    """The slices of a padded map that lie at each offset, in the order of the offsets."""
    starts = (range(whole - size + 1) for whole, size in zip(padded.shape[2:], sizes, strict=True))
    for corner in itertools.product(*starts):
        yield (..., *(slice(start, start + size) for start, size in zip(corner, sizes, strict=True)))


def _run_reference(query: Tensor, key: Tensor, radius: int, units: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, logits = _mean_offsets(query, key, radius, units, scale)
    displacement = mean.mean(1)
    return displacement, logits.logsumexp(2), mean.flatten(1, 2) if units > 1 else displacement.new_empty(0)


def _fake(query: Tensor, key: Tensor, radius: int, units: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, *sizes = query.shape
    shapes: list[tuple[int, ...]] = [(batch, len(sizes), *sizes), (batch, units, *sizes)]
    shapes.append((batch, units * len(sizes), *sizes) if units > 1 else (0,))
    displacement, log_sum_exp, mean = (query.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return displacement, log_sum_exp, mean


def _fake_backward(
    grad_displacement: Tensor,
    query: Tensor,
    key: Tensor,
    log_sum_exp: Tensor,
    mean: Tensor,
    radius: int,
    units: int,
    scale: float,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape if need_query else (0,)), key.new_empty(key.shape if need_key else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, ctx.radius, ctx.units, ctx.scale = inputs
    displacement, log_sum_exp, mean = output
    ctx.mark_non_differentiable(log_sum_exp, mean)
    ctx.save_for_backward(query, key, log_sum_exp, mean if ctx.units > 1 else displacement)


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    query, key, log_sum_exp, mean = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    options = (ctx.radius, ctx.units, ctx.scale)
    if needs_reference("local_correlation_backward", gradient.device):
        keywords = dict(zip(("radius", "units", "scale"), options, strict=True))
        reference = functools.partial(local_correlation_reference, **keywords)
        return (*gradients_by_reference(reference, (query, key), needed, gradient), None, None, None)
    gradients = torch.ops.voxtrast.local_correlation_backward(
        gradient, query, key, log_sum_exp, mean, *options, *needed
    )
    return (*(found if need else None for found, need in zip(gradients, needed, strict=True)), None, None, None)


register_operator(
    "local_correlation(Tensor query, Tensor key, int radius, int units, float scale)"
    " -> (Tensor displacement, Tensor log_sum_exp, Tensor mean)",
    reference=_run_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(),
)
register_backward(
    "local_correlation_backward(Tensor grad_displacement, Tensor query, Tensor key, Tensor log_sum_exp, Tensor mean,"
    " int radius, int units, float scale, bool need_query, bool need_key) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
