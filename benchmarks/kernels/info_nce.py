"""Symmetric InfoNCE of N pairs, the shape of dense contrast; and of many small problems."""

from collections.abc import Callable
from typing import Any

import torch

from voxtrast.kernels import info_nce, info_nce_reference

from ..harness import CPU, Cannot, Case, Place, gradients_of
from .peers import (
    Loss,
    flex_attention_info_nce,
    inf_cl_info_nce,
    keops_info_nce,
    linear_cross_entropy_info_nce,
)
from .tile_loop import tile_loop_info_nce

TEMPERATURE = 0.1
OPTIONS: dict[str, Any] = {"temperature": TEMPERATURE, "symmetric": True}
LARGEST = {"linear_cross_entropy": 20_000, "KeOps": 2048}  # on a CPU: beyond, a step of it takes ten seconds or more


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    sizes = [(2048, 64), (8192, 128)]
    if not quick:
        sizes = [(2048 * 2**power, 64) for power in range(6)] + [(8192, 128)]
    return [{"problems": 1, "N": n, "C": c} for n, c in sizes] + [{"problems": 1024, "N": 32, "C": 128}]


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    problems, count, channels = shape["problems"], shape["N"], shape["C"]
    torch.manual_seed(0)
    sizes = (count, channels) if problems == 1 else (problems, count, channels)
    query, key = (place.randn(*sizes) for _ in range(2))
    pairs = problems * count * count

    def eager() -> Loss:
        place.check_holds(pairs, "the matrix")
        return lambda q, k: info_nce_reference(q, k, **OPTIONS)

    def compiled() -> Loss:
        place.check_holds(pairs, "the matrix")
        loss = torch.compile(info_nce_reference)
        return lambda q, k: loss(q, k, **OPTIONS)

    def for_one_problem(name: str, loss: Callable[[], Loss]) -> Callable[[], Loss]:
        def make() -> Loss:
            if problems > 1:
                raise Cannot("one problem at a time")
            if place.device.type == "cpu" and count > LARGEST.get(name, count):
                raise Cannot("left out: takes too long at this size")
            return loss()

        return make

    one_at_a_time: dict[str, Callable[[], Loss]] = {
        "tile loop, plain torch": lambda: lambda q, k: tile_loop_info_nce(q, k, TEMPERATURE),
        "linear_cross_entropy": lambda: linear_cross_entropy_info_nce(TEMPERATURE),
        "KeOps": lambda: keops_info_nce(TEMPERATURE),
        "flex_attention": lambda: flex_attention_info_nce(TEMPERATURE, place.device),
        "inf-cl": lambda: inf_cl_info_nce(TEMPERATURE, place.device),
    }
    rivals = {name: for_one_problem(name, loss) for name, loss in one_at_a_time.items()}
    rivals |= {"eager": eager, "torch.compile": compiled}
    steps, cannot = {"ours": gradients_of(lambda q, k: info_nce(q, k, **OPTIONS), query, key)}, {}
    for name, make in rivals.items():
        try:
            steps[name] = gradients_of(make(), query, key)
        except Cannot as why:
            cannot[name] = str(why)
    return Case("info_nce, symmetric", shape, place.dtype_name, steps, 8.0 * pairs * channels, 2.0 * pairs, cannot)
