"""Cosine of two maps of features along a displacement field, masked mean; both maps want gradients.

The limit counts every byte once: both passes read the maps, the field and the mask; backward writes the gradients of
the maps. The warped map is written by nobody.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import warped_cosine_loss, warped_cosine_loss_reference

from ..harness import Case, gradients_of
from ..place import CPU, Cannot, Place
from .warp import by_grid_sample, check_is_short, smooth_displacement


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    shapes = [(2, 32, 48, 3), (2, 32, 256, 2)]
    if not quick:
        shapes += [(1, 32, 96, 3)]
    if place.on_gpu and not quick:
        shapes += [(2, 64, 128, 3)]
    return [dict(zip(("B", "C", "size", "axes"), shape, strict=True)) for shape in shapes]


def eager_loss(fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor) -> Tensor:
    warped = by_grid_sample(moving, displacement)
    cosine = functional.cosine_similarity(fixed.float(), warped.float(), dim=1)[:, None]
    return 1 - (mask * cosine).sum() / mask.sum()


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    batch, channels, axes = shape["B"], shape["C"], shape["axes"]
    torch.manual_seed(0)
    sizes = (shape["size"],) * axes
    fixed, moving = (place.randn(batch, channels, *sizes) for _ in range(2))
    displacement = smooth_displacement(batch, sizes, place)
    mask = (torch.rand(batch, 1, *sizes, device=place.device) > 0.1).float()
    inputs = fixed, moving, displacement, mask

    def plain() -> Callable[..., Tensor]:
        check_is_short(fixed)
        return warped_cosine_loss_reference

    rivals: dict[str, Callable[[], Callable[..., Tensor]]] = {
        "eager, grid_sample": lambda: eager_loss,
        "torch.compile, grid_sample": lambda: torch.compile(eager_loss, dynamic=False),
        "torch reference": plain,
    }
    steps, cannot = {"ours": gradients_of(warped_cosine_loss, *inputs)}, {}
    for name, make in rivals.items():
        try:
            steps[name] = gradients_of(make(), *inputs)
        except Cannot as why:
            cannot[name] = str(why)
    # Interpolation in both passes and its transpose; three products in both passes, and two gradients of two terms.
    flops = (3 * 2.0 * 2**axes + 2 * 6 + 2 * 3) * fixed.numel()
    moved = 6.0 * fixed.numel() * fixed.element_size() + 2 * 4.0 * (displacement.numel() + mask.numel())
    return Case("warped_cosine_loss", shape, place, steps, flops, 0.0, cannot, moved)
