"""Symmetric InfoNCE of N pairs, the shape of dense contrast; and of many small problems."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from voxtrast.kernels import info_nce, info_nce_reference

from ..harness import Case, Step
from .tile_loop import tile_loop_info_nce

TEMPERATURE = 0.1
LARGEST_MATRIX = 20_000  # N of the providers that hold the matrix several times


def cases(quick: bool) -> list[dict[str, int]]:
    sizes = [(2048, 64), (8192, 128)] if quick else [(2048, 64), (4096, 64), (8192, 128), (16384, 64), (65536, 64)]
    return [{"problems": 1, "N": n, "C": c} for n, c in sizes] + [{"problems": 1024, "N": 32, "C": 128}]


def build(shape: dict[str, int]) -> Case:
    problems, count, channels = shape["problems"], shape["N"], shape["C"]
    torch.manual_seed(0)
    sizes = (count, channels) if problems == 1 else (problems, count, channels)
    query, key = (torch.randn(sizes, requires_grad=True) for _ in range(2))
    compiled = torch.compile(info_nce_reference)

    def by_linear_cross_entropy(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query, key = (functional.normalize(vectors, dim=-1) for vectors in (query, key))
        targets, options = torch.arange(count), torch.nn.LinearCrossEntropyOptions()
        one, other = (
            functional.linear_cross_entropy(a / TEMPERATURE, b, targets, options=options)
            for a, b in ((query, key), (key, query))
        )
        return (one + other) / 2

    def step(loss: Callable[..., torch.Tensor]) -> Step:
        def work() -> torch.Tensor:
            query.grad = key.grad = None
            loss(query, key).backward()
            assert query.grad is not None
            return query.grad

        return work

    options: dict[str, Any] = {"temperature": TEMPERATURE, "symmetric": True}
    steps = {"ours": step(lambda q, k: info_nce(q, k, **options))}
    cannot = {}
    if problems == 1:
        steps["tile loop, plain torch"] = step(lambda q, k: tile_loop_info_nce(q, k, TEMPERATURE))
        if count > LARGEST_MATRIX:
            cannot["linear_cross_entropy"] = "left out: takes minutes at this size"
        elif hasattr(functional, "linear_cross_entropy"):
            steps["linear_cross_entropy"] = step(by_linear_cross_entropy)
        else:
            cannot["linear_cross_entropy"] = f"torch {torch.__version__} does not have it"
    else:
        cannot["tile loop, plain torch"] = cannot["linear_cross_entropy"] = "one problem at a time"
    if problems * count * count <= LARGEST_MATRIX**2:
        steps["eager"] = step(lambda q, k: info_nce_reference(q, k, **options))
        steps["torch.compile"] = step(lambda q, k: compiled(q, k, **options))
    else:
        cannot["eager"] = cannot["torch.compile"] = f"holds the matrix, {4 * count**2 / 1e9:.0f} GB, several times"
    pairs = problems * count * count
    return Case("info_nce, symmetric", shape, "float32", steps, 8.0 * pairs * channels, 2.0 * pairs, cannot)
