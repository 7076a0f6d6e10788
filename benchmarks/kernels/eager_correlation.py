"""Local correlation and the vector pyramid as one writes them in plain torch: what a user would have."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .warp import by_grid_sample

Head = Callable[[Tensor], Tensor]


def loop_correlation(query: Tensor, key: Tensor, radius: int, units: int) -> Tensor:
    """One offset after the other, as the released code of COVER does it, without its search for the border."""
    _, channels, *sizes = query.shape
    padding = [radius] * (2 * len(sizes))
    padded = functional.pad(key, padding)
    inside = functional.pad(torch.ones(sizes, dtype=torch.bool, device=query.device), padding)
    logits, offsets = [], list(itertools.product(range(2 * radius + 1), repeat=len(sizes)))
    for offset in offsets:
        window: tuple[Any, ...] = (
            ...,
            *(slice(start, start + size) for start, size in zip(offset, sizes, strict=True)),
        )
        products = (query * padded[window]).unflatten(1, (units, -1)).sum(2)
        logits.append((products / math.sqrt(channels // units)).masked_fill(~inside[window], -1000.0))
    share = torch.stack(logits, 2).softmax(2)  # (B, J, n, *S)
    vectors = torch.tensor(offsets, dtype=share.dtype, device=share.device) - radius
    return torch.einsum("bjn...,nd->bd...", share, vectors) / units


def unfold_correlation(query: Tensor, key: Tensor, radius: int, units: int) -> Tensor:
    """All windows at once, by strides."""
    channels, sizes = query.shape[1], query.shape[2:]
    padding, window = [radius] * (2 * len(sizes)), 2 * radius + 1
    padded = functional.pad(key, padding)
    inside = functional.pad(torch.ones(sizes, dtype=torch.bool, device=query.device), padding)
    for axis in range(len(sizes)):
        padded, inside = padded.unfold(2 + axis, window, 1), inside.unfold(axis, window, 1)
    here = query[(..., *[None] * len(sizes))]
    logits = (here * padded).unflatten(1, (units, -1)).sum(2) / math.sqrt(channels // units)
    share = logits.masked_fill(~inside, -1000.0).flatten(-len(sizes)).softmax(-1)
    steps = torch.arange(-radius, radius + 1, dtype=share.dtype, device=share.device)
    vectors = torch.cartesian_prod(*[steps] * len(sizes))
    return (share @ vectors).mean(1).movedim(-1, 1)


def eager_pyramid(
    fixed: Sequence[Tensor],
    moving: Sequence[Tensor],
    radius: int,
    units: Sequence[int],
    heads: Sequence[Head],
    correlate: Callable[..., Tensor] = loop_correlation,
) -> Tensor:
    """The vector pyramid over these."""

    def twice_as_fine(field: Tensor) -> Tensor:
        mode = "trilinear" if field.ndim == 5 else "bilinear"
        return functional.interpolate(2 * field, scale_factor=2, mode=mode)

    field: Tensor | None = None
    for level, head in enumerate(heads):
        aligned = moving[level] if field is None else by_grid_sample(moving[level], field)
        vectors = correlate(head(fixed[level]), head(aligned), radius, units[level])
        if level < len(heads) - 1:
            vectors, field = twice_as_fine(vectors), None if field is None else twice_as_fine(field)
        field = vectors if field is None else by_grid_sample(field, vectors) + vectors
    assert field is not None
    return field
