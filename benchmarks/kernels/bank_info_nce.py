"""A batch of queries against a large bank, which asks for no gradient: MoCo's and PCRL's shape."""

from functools import partial
from typing import Any

import torch

from voxtrast.kernels import bank_info_nce, bank_info_nce_reference, bank_nce, bank_nce_reference

from ..harness import Case, gradients_of
from ..place import CPU, Place


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    return [{"N": 256, "K": 16384 if quick else 65536, "C": 128, "fixed_normalizer": fixed} for fixed in (0, 1)]


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    count, size, channels = shape["N"], shape["K"], shape["C"]
    torch.manual_seed(0)
    query = place.randn(count, channels)
    key, bank = (place.randn(n, channels, requires_grad=False) for n in (count, size))
    pair: Any = (
        (bank_nce, bank_nce_reference) if shape["fixed_normalizer"] else (bank_info_nce, bank_info_nce_reference)
    )
    options: dict[str, Any] = {"normalizer": 1.0} if shape["fixed_normalizer"] else {}
    plain_type = "" if place.dtype == torch.float32 else ", float32"  # the plain forms compute in it whatever they get
    losses = {
        "ours": pair[0],
        f"eager{plain_type}": pair[1],
        f"torch.compile{plain_type}": torch.compile(pair[1], dynamic=False),
    }
    steps = {name: gradients_of(partial(loss, **options), query, key, bank) for name, loss in losses.items()}
    pairs = count * size
    op = "bank_nce" if shape["fixed_normalizer"] else "bank_info_nce"
    return Case(op, shape, place, steps, 6.0 * pairs * channels, 2.0 * pairs)
