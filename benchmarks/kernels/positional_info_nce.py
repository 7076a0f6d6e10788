"""Positional contrast in the shape of JCL: an independent problem of two views of a batch of slices at each pixel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import positional_info_nce, positional_info_nce_reference

from ..harness import Case, gradients_of
from ..place import CPU, Place

TEMPERATURE, THRESHOLD = 0.1, 0.1


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    return [{"problems": 256 if quick else 1024, "N": 32, "C": 128}]


def by_product(vectors: Tensor) -> Tensor:
    unit = functional.normalize(vectors, dim=-1)
    return unit @ unit.T


def by_broadcast(vectors: Tensor) -> Tensor:
    """As JCL is published: N x N x C numbers for each pixel."""
    return functional.cosine_similarity(vectors[:, None, :], vectors[None, :, :], dim=2)


def one_call_a_pixel(features: Tensor, positions: Tensor, cosines: Callable[[Tensor], Tensor]) -> Tensor:
    """The published loop over the pixels, each with its own masks."""
    total = features.new_zeros(())
    for vectors in features.float():
        logits = cosines(vectors) / TEMPERATURE
        near = ((positions[:, None] - positions[None, :]).abs() < THRESHOLD).float()
        others = 1 - torch.eye(len(vectors), device=vectors.device)
        near = near * others
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        log_share = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        total = total - ((near * log_share).sum(1) / near.sum(1)).mean()
    return total / len(features)


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    problems, count, channels = shape["problems"], shape["N"], shape["C"]
    torch.manual_seed(0)
    features = place.randn(problems, count, channels)
    positions = torch.rand(count // 2, device=place.device).repeat(2)
    options: dict[str, Any] = {"threshold": THRESHOLD, "temperature": TEMPERATURE}
    compiled = torch.compile(positional_info_nce_reference, dynamic=False)

    plain_type = "" if place.dtype == torch.float32 else ", float32"  # the plain forms compute in it whatever they get
    losses: dict[str, Callable[..., Tensor]] = {
        "ours": lambda x: positional_info_nce(x, positions, **options),
        f"eager, all pixels{plain_type}": lambda x: positional_info_nce_reference(x, positions, **options),
        f"torch.compile{plain_type}": lambda x: compiled(x, positions, **options),
        f"a call a pixel{plain_type}": lambda x: one_call_a_pixel(x, positions, by_product),
        f"a call a pixel, published{plain_type}": lambda x: one_call_a_pixel(x, positions, by_broadcast),
    }
    steps = {name: gradients_of(loss, features) for name, loss in losses.items()}
    pairs = problems * count * count
    return Case("positional_info_nce", shape, place, steps, *work_of_a_set_with_itself(pairs, channels, place))


def work_of_a_set_with_itself(pairs: int, channels: int, place: Place) -> tuple[float, float]:
    """Floating-point operations and exponentials, forward and backward. The matrix is symmetric and one gradient of two
    is enough; panels that meet in rounds compute half of it, independent blocks compute each its rows."""
    products, exponentials = (3, 2) if place.on_gpu else (2, 1)
    return 2.0 * products * pairs * channels, float(exponentials * pairs)
