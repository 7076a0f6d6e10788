"""Displacement by local correlation: where in a small window does each vector find itself again?

    s(p, j, delta) = scale <query(p, j), key(p + delta, j)>          delta in {-r..r}^D, p + delta inside the volume
    u(p) = 1/J sum_j sum_delta softmax_delta(s(p, j, .)) delta

(COVER, ICCV 2025, the mixture of vectors, with its 8 channels a unit and scale 1/sqrt(8).)
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._checks import check_map, check_same_shape
from ._registration import needs_functional_reference


def local_correlation(query: Tensor, key: Tensor, *, radius: int, units: int = 1, scale: float | None = None) -> Tensor:
    """Expected offset, under a softmax of dot products, of each query vector in a window of key vectors.

    Args:
        query: (B, units * d, H, W) or (B, units * d, D, H, W), float32, bfloat16, float16 or float64; unit j is
            channels j * d .. (j + 1) * d - 1.
        key: the same shape.
        radius: r of the window of (2 r + 1)^D offsets, at least 1. Offsets outside the volume take no part.
        units: vectors at each voxel; their displacements are averaged.
        scale: factor of the dot products, 1 / sqrt(d) if not given.

    Returns: the displacement, (B, 2, H, W) or (B, 3, D, H, W), in voxels of this map, each component within -r .. r.
        float32 (float64 where one map has that), and computed in it.

    There is no compiled implementation yet: the torch reference computes.

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
    return local_correlation_reference(query, key, radius=radius, units=units, scale=scale)


def local_correlation_reference(
    query: Tensor, key: Tensor, *, radius: int, units: int = 1, scale: float | None = None
) -> Tensor:
    """The same in plain torch. Keeps the softmax, (2 r + 1)^D numbers for each voxel and unit, for backward."""
    batch, channels, *sizes = query.shape
    dimensions = len(sizes)
    depth = channels // units
    working_type = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        # Each unit is a problem of its own: (B * J, d, *S).
        vectors = query.to(working_type).reshape(batch * units, depth, *sizes)
        vectors = vectors * (1 / math.sqrt(depth) if scale is None else scale)
        padded = functional.pad(key.to(working_type).reshape(batch * units, depth, *sizes), [radius] * (2 * dimensions))

        # 0 where p + delta lies inside, -inf where not: (n, *S)
        border = functional.pad(vectors.new_zeros(sizes), [radius] * (2 * dimensions), value=-torch.inf)
        for axis, size in enumerate(sizes):
            border = border.unfold(axis, size, 1)
        border = border.reshape(-1, *sizes)

        products = _window_products if needs_functional_reference() else _WindowProducts.apply
        share = products(vectors, padded, border).softmax(1)  # (B * J, n, *S)
        steps = torch.arange(-radius, radius + 1, dtype=working_type, device=query.device)
        offsets = torch.stack(torch.meshgrid(*[steps] * dimensions, indexing="ij")).flatten(1)  # (D, n)
        displacement = offsets @ share.flatten(2)
        return displacement.reshape(batch, units, dimensions, *sizes).mean(1)


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
