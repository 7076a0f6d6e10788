"""Symmetric InfoNCE of N pairs, the shape of dense contrast; and of many small problems."""

from collections.abc import Callable
from typing import Any

import torch

from voxtrast.kernels import info_nce

from ..harness import Case, gradients_of
from ..place import CPU, Cannot, Place
from .peers import (
    Loss,
    flex_attention_info_nce,
    inf_cl_info_nce,
    keops_info_nce,
    linear_cross_entropy_info_nce,
    unit,
)
from .tile_loop import best_tile, compiled_tile_loop_info_nce, tile_loop_info_nce

TEMPERATURE = 0.1
TILE_LOOP = "tile loop, plain torch"
OPTIONS: dict[str, Any] = {"temperature": TEMPERATURE, "symmetric": True}
# Vectors in a set, by kind of device: beyond, a step takes ten seconds or more.
LARGEST = {
    "cpu": {"linear_cross_entropy": 20_000, "KeOps": 2048},
    "cuda": {"linear_cross_entropy": 300_000, "KeOps": 100_000, "flex_attention": 300_000, "inf-cl": 300_000},
}
MANY_AT_ONCE = ("eager", "torch.compile", "KeOps")
MANY_SMALL = {"problems": 1024, "N": 32, "C": 128}


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    sizes = [(2048, 64), (8192, 128)]
    if place.on_gpu:
        # The last: every voxel of a crop of 96 x 96 x 96.
        sizes = [(8192, 128)] + ([] if quick else [(16384, 128), (65536, 128), (262144, 128), (96**3, 64)])
    elif not quick:
        sizes = [(2048 * 2**power, 64) for power in range(6)] + [(8192, 128)]
    return [*({"problems": 1, "N": n, "C": c} for n, c in sizes), MANY_SMALL]


def eager_info_nce(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """As it is written everywhere: products in the type of the vectors, the rest in float32."""
    logits = ((unit(query) / TEMPERATURE) @ unit(key).mT).float()
    positive = logits.diagonal(dim1=-2, dim2=-1)
    return ((logits.logsumexp(-1) + logits.logsumexp(-2)) / 2 - positive).mean()


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    problems, count, channels = shape["problems"], shape["N"], shape["C"]
    torch.manual_seed(0)
    sizes = (count, channels) if problems == 1 else (problems, count, channels)
    query, key = (place.randn(*sizes) for _ in range(2))
    pairs = problems * count * count

    def whole(loss: Loss) -> Loss:
        place.check_holds(pairs, "the matrix")
        return loss

    rivals: dict[str, Callable[[], Loss]] = {
        "eager": lambda: whole(eager_info_nce),
        "torch.compile": lambda: whole(torch.compile(eager_info_nce, dynamic=False)),
        "linear_cross_entropy": lambda: linear_cross_entropy_info_nce(TEMPERATURE),
        "KeOps": lambda: keops_info_nce(TEMPERATURE),
        "flex_attention": lambda: flex_attention_info_nce(TEMPERATURE, place.device),
        "inf-cl": lambda: inf_cl_info_nce(TEMPERATURE, place.device),
    }
    if place.on_gpu and problems == 1:
        tile = best_tile(query, key, TEMPERATURE, place)
        name = f"{TILE_LOOP}, tiles of {tile}"
        rivals[name] = lambda: lambda q, k: compiled_tile_loop_info_nce(q, k, TEMPERATURE, tile)
    else:
        rivals[TILE_LOOP] = lambda: lambda q, k: tile_loop_info_nce(q, k, TEMPERATURE)
    steps, cannot = {"ours": gradients_of(lambda q, k: info_nce(q, k, **OPTIONS), query, key)}, {}
    for name, make in rivals.items():
        try:
            if problems > 1 and name not in MANY_AT_ONCE:
                raise Cannot("one problem at a time")
            if problems * count > LARGEST[place.device.type].get(name, problems * count):
                raise Cannot("left out: takes too long at this size")
            steps[name] = gradients_of(make(), query, key)
        except Cannot as why:
            cannot[name] = str(why)
    # Products and exponentials of a pair. Where gradients are summed in one order by independent blocks, the queries'
    # and the keys' each need the similarities anew: 1 + 2 x 2 products; panels that meet in rounds share them.
    products, exponentials = (5, 3) if place.on_gpu else (4, 2)
    flops = 2.0 * products * pairs * channels
    return Case("info_nce, symmetric", shape, place, steps, flops, float(exponentials * pairs), cannot)
