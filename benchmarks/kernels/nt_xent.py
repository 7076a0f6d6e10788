"""NT-Xent of SimCLR: the vectors of two views of N images, each against all 2N - 1 others.

It is `positional_info_nce` with the index of the image as position, and what MONAI, lightly and
pytorch-metric-learning have.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import positional_info_nce

from ..harness import CPU, Cannot, Case, Place, gradients_of
from .peers import Loss, lightly_nt_xent, metric_learning_nt_xent, monai_nt_xent

TEMPERATURE = 0.1


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    return [{"images": n, "C": 128} for n in ([128] if quick else [128, 1024, 4096])]


def plain_nt_xent(first: Tensor, second: Tensor) -> Tensor:
    """As SimCLR's users write it."""
    vectors = functional.normalize(torch.cat((first, second)), dim=-1)
    count = len(vectors)
    logits = vectors @ vectors.T / TEMPERATURE
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
        "torch.compile": (pairs, "2N x 2N", lambda: torch.compile(plain_nt_xent)),
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
    # A set with itself: half of the products forward, and one of two backward.
    return Case("nt_xent", shape, place.dtype_name, steps, 4.0 * pairs * channels, 1.0 * pairs, cannot)
