"""Every contrastive operator forward and backward at small, odd sizes: what compute-sanitizer watches.

python -m voxtrast.benchmarks.kernels.small_sizes [--device cuda]
"""

import argparse
import sys

import torch
from torch import Tensor

from voxtrast.kernels import bank_info_nce, bank_nce, info_nce, pairwise_logsumexp, positional_info_nce

from ..harness import Step, gradients_of
from ..place import Place, choose_place

# Problems, N, C: below and above any tile. Few, and two types: a GPU compiles kernels for each.
SIZES = ((2, 33, 20), (1, 257, 20))
TYPES = ("float32", "bfloat16")


def steps(place: Place, problems: int, count: int, channels: int) -> dict[str, Step]:
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m voxtrast.benchmarks.kernels.small_sizes", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    chosen = parser.parse_args(arguments)
    wrong = 0
    for dtype in TYPES:
        place = choose_place(chosen.device, dtype)
        for size in SIZES:
            torch.manual_seed(0)
            for name, step in steps(place, *size).items():
                if not all(gradient.isfinite().all() for gradient in step()):
                    wrong += 1
                    print(f"{name} {size} {dtype}: a gradient is not finite")
        print(place.device, dtype, "done", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
