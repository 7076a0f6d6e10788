"""Every operator forward and backward at small, odd sizes: what compute-sanitizer watches.

python -m voxtrast.benchmarks.kernels.small_sizes [--device cuda]
"""

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from voxtrast.kernels import (
    bank_info_nce,
    bank_nce,
    compose_displacement,
    info_nce,
    local_correlation,
    pairwise_logsumexp,
    positional_info_nce,
    vector_regression_loss,
    warp,
    warped_cosine_loss,
)

from ..harness import Step, gradients_of
from ..place import Place, choose_place

# Problems, N, C: below and above any tile. Few, and two types: a GPU compiles kernels for each.
SIZES = ((2, 33, 20), (1, 257, 20))
TYPES = ("float32", "bfloat16")
MAPS = ((33, 19), (5, 7, 18))  # sizes of maps, below and above a tile


def pair_steps(place: Place, problems: int, count: int, channels: int) -> dict[str, Step]:
    query, key = (place.randn(problems, count, channels) for _ in range(2))
    bank = place.randn(2 * count + 1, channels, requires_grad=False)
    one, other = (place.randn(count, channels) for _ in range(2))
    positions = torch.arange(count + 1, device=place.device).div(3).floor()
    several = place.randn(problems, count + 1, channels)

    def both_ways(query: Tensor, key: Tensor) -> Tensor:
        rows, columns = pairwise_logsumexp(query, key, scale=2.0, columns=True)
        return rows.sum() + columns.sum()

    return {
        "info_nce": gradients_of(info_nce, query, key),
        "info_nce, symmetric": gradients_of(lambda q, k: info_nce(q, k, symmetric=True), query, key),
        "info_nce, negatives": gradients_of(lambda q, k: info_nce(q, k, negatives=key.detach()), query, key),
        "pairwise_logsumexp": gradients_of(both_ways, query, key),
        "pairwise_logsumexp, one set": gradients_of(lambda q: both_ways(q, q), query),
        "positional_info_nce": gradients_of(lambda x: positional_info_nce(x, positions, threshold=0.5), several),
        "bank_info_nce": gradients_of(lambda q, k: bank_info_nce(q, k, bank), one, other),
        "bank_nce": gradients_of(lambda q, k: bank_nce(q, k, bank, normalizer=1.0), one, other),
    }


def map_steps(place: Place, *sizes: int) -> dict[str, Step]:
    axes = len(sizes)
    maps = [place.randn(2, 16, *sizes) for _ in range(2)]
    fields = [(2 * place.randn(2, axes, *sizes, requires_grad=False)).float().requires_grad_() for _ in range(2)]
    mask = (torch.rand(2, 1, *sizes, device=place.device) > 0.3).float()
    fixed, moving = maps
    found = {
        "compose_displacement": gradients_of(lambda a, b: compose_displacement(a, b).sum(), *fields),
        "vector_regression_loss": gradients_of(lambda a, b: vector_regression_loss(a, b, mask), *fields),
    }
    for exact in (True, False):
        word = "" if exact else ", atomics"
        found[f"warp{word}"] = gradients_of(
            lambda image, field, exact=exact: warp(image, field, deterministic=exact).sum(), moving, fields[0]
        )
        found[f"warped_cosine_loss{word}"] = gradients_of(
            lambda a, b, field, exact=exact: warped_cosine_loss(a, b, field, mask, deterministic=exact),
            fixed,
            moving,
            fields[0],
        )
    for radius, units in ((1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (2, 1)):  # the last: 16 channels a unit
        found[f"local_correlation, radius {radius}, {units} units"] = gradients_of(
            lambda a, b, radius=radius, units=units: local_correlation(a, b, radius=radius, units=units).sum(), *maps
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m voxtrast.benchmarks.kernels.small_sizes", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    chosen = parser.parse_args(arguments)
    wrong = 0
    for dtype in TYPES:
        place = choose_place(chosen.device, dtype)
        of_pairs: list[tuple[Callable[..., dict[str, Step]], tuple[int, ...]]] = [(pair_steps, size) for size in SIZES]
        for steps, size in [*of_pairs, *((map_steps, size) for size in MAPS)]:
            torch.manual_seed(0)
            for name, step in steps(place, *size).items():
                if not all(gradient.isfinite().all() for gradient in step()):
                    wrong += 1
                    print(f"{name} {size} {dtype}: a gradient is not finite")
        print(place.device, dtype, "done", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
