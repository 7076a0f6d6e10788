"""NT-Xent of SimCLR: the vectors of two views of N images, each against all 2N - 1 others.

It is `positional_info_nce` with the index of the image as position, and what MONAI, lightly and
pytorch-metric-learning have.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import positional_info_nce

from ..harness import Case, gradients_of
from ..place import CPU, Cannot, Place
from .peers import Loss, lightly_nt_xent, metric_learning_nt_xent, monai_nt_xent, unit
from .positional_info_nce import work_of_a_set_with_itself

TEMPERATURE = 0.1


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    sizes = [1024, 4096, 32768] if place.on_gpu else [128, 512, 4096]
    return [{"images": n, "C": 128} for n in (sizes[:1] if quick else sizes)]


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """As SimCLR's users write it."""
    vectors = unit(torch.cat((first, second)))
    count = len(vectors)
    logits = (vectors / TEMPERATURE) @ vectors.T
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=logits.device), -torch.inf)
    return functional.cross_entropy(logits.float(), torch.arange(count, device=logits.device).roll(count // 2))


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    torch.manual_seed(0)
    images, channels = shape["images"], shape["C"]
    first, second = (place.randn(images, channels) for _ in range(2))
    positions = torch.arange(images, device=place.device).repeat(2).float()

    def ours(first: Tensor, second: Tensor) -> Tensor:
        vectors = torch.cat((first, second))
        return positional_info_nce(vectors, positions, threshold=0.5, temperature=TEMPERATURE)

    steps, cannot = {"ours": gradients_of(ours, first, second)}, {}
    pairs = (2 * images) ** 2
    # What a provider holds several times, in numbers, and who provides it.
    rivals: dict[str, tuple[int, str, Callable[[], Loss]]] = {
        "eager": (pairs, "2N x 2N", lambda: plain_nt_xent),
        "torch.compile": (pairs, "2N x 2N", lambda: torch.compile(plain_nt_xent, dynamic=False)),
        "MONAI": (pairs * channels, "2N x 2N x C", lambda: monai_nt_xent(TEMPERATURE)),
        "lightly": (pairs, "2N x 2N", lambda: lightly_nt_xent(TEMPERATURE)),
        "metric learning, SupCon": (pairs, "2N x 2N", lambda: metric_learning_nt_xent(TEMPERATURE, "SupConLoss")),
        "metric learning, NTXent": (
            pairs * 2 * images,
            "2N x 2N x 2N",
            lambda: metric_learning_nt_xent(TEMPERATURE, "NTXentLoss"),
        ),
    }
    for name, (numbers, what, make) in rivals.items():
        try:
            place.check_holds(numbers, what)
            steps[name] = gradients_of(make(), first, second)
        except Cannot as why:
            cannot[name] = str(why)
    flops, exponentials = work_of_a_set_with_itself(pairs, channels, place)
    return Case("nt_xent", shape, place, steps, flops, exponentials, cannot)
