"""A batch of queries against a large bank, which asks for no gradient: MoCo's and PCRL's shape."""

from collections.abc import Callable
from typing import Any

import torch

from voxtrast.kernels import bank_info_nce, bank_info_nce_reference, bank_nce, bank_nce_reference

from ..harness import Case, Step


def cases(quick: bool) -> list[dict[str, int]]:
    return [{"N": 256, "K": 16384 if quick else 65536, "C": 128, "fixed_normalizer": fixed} for fixed in (0, 1)]


def build(shape: dict[str, int]) -> Case:
    count, size, channels = shape["N"], shape["K"], shape["C"]
    torch.manual_seed(0)
    query, key, bank = (torch.randn(n, channels) for n in (count, count, size))
    query.requires_grad_()
    pair: Any = (
        (bank_nce, bank_nce_reference) if shape["fixed_normalizer"] else (bank_info_nce, bank_info_nce_reference)
    )
    options: dict[str, Any] = {"normalizer": 1.0} if shape["fixed_normalizer"] else {}
    compiled = torch.compile(pair[1])

    def step(loss: Callable[..., torch.Tensor]) -> Step:
        def work() -> torch.Tensor:
            query.grad = None
            loss(query, key, bank, **options).backward()
            assert query.grad is not None
            return query.grad

        return work

    steps = {"ours": step(pair[0]), "eager": step(pair[1]), "torch.compile": step(compiled)}
    pairs = count * size
    op = "bank_nce" if shape["fixed_normalizer"] else "bank_info_nce"
    return Case(op, shape, "float32", steps, 6.0 * pairs * channels, 2.0 * pairs)
