"""Positional contrast in the shape of JCL: an independent problem of two views of a batch of slices at each pixel."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from voxtrast.kernels import positional_info_nce, positional_info_nce_reference

from ..harness import Case, Step

TEMPERATURE, THRESHOLD = 0.1, 0.1


def cases(quick: bool) -> list[dict[str, int]]:
    return [{"problems": 256 if quick else 1024, "N": 32, "C": 128}]


def one_call_a_pixel(features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """As the official code does it: a Python loop over the pixels, each with its own masks."""
    total = features.new_zeros(())
    for vectors in features:
        unit = functional.normalize(vectors, dim=-1)
        logits = unit @ unit.T / TEMPERATURE
        near = ((positions[:, None] - positions[None, :]).abs() < THRESHOLD).float()
        others = 1 - torch.eye(len(unit))
        near = near * others
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        log_share = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        total = total - ((near * log_share).sum(1) / near.sum(1)).mean()
    return total / len(features)


def build(shape: dict[str, int]) -> Case:
    problems, count, channels = shape["problems"], shape["N"], shape["C"]
    torch.manual_seed(0)
    features = torch.randn(problems, count, channels, requires_grad=True)
    positions = torch.rand(count // 2).repeat(2)
    options: dict[str, Any] = {"threshold": THRESHOLD, "temperature": TEMPERATURE}
    compiled = torch.compile(positional_info_nce_reference)

    def step(loss: Callable[..., torch.Tensor]) -> Step:
        def work() -> torch.Tensor:
            features.grad = None
            loss(features, positions).backward()
            assert features.grad is not None
            return features.grad

        return work

    steps = {
        "ours": step(lambda x, p: positional_info_nce(x, p, **options)),
        "eager, all pixels": step(lambda x, p: positional_info_nce_reference(x, p, **options)),
        "torch.compile": step(lambda x, p: compiled(x, p, **options)),
        "a call a pixel": step(one_call_a_pixel),
    }
    pairs = problems * count * count
    # A set with itself: half of the products forward, and one of two backward.
    return Case("positional_info_nce", shape, "float32", steps, 4.0 * pairs * channels, 1.0 * pairs)
