"""Flips and quarter turns of images, each sample with its own, and the binary code that names them.

A view is first flipped, then turned by numpy's rot90 in the plane of its last two axes; both are exact.
"""

import torch
from torch import Tensor
from torch.nn import functional

PLANE = (-2, -1)


def apply(image: Tensor, flips: Tensor | None, turns: Tensor | None) -> Tensor:
    """The images flipped, then turned.

    Args:
        image: (B, C, *S).
        flips: (B, D) of 0 and 1; None where nothing is flipped.
        turns: (B,), 0 to 3; None where nothing is turned. 1 and 3 need equal last two sides.
    """
    return _turned(_flipped(image, flips), turns)


def undo(image: Tensor, flips: Tensor | None, turns: Tensor | None) -> Tensor:
    """The images that `apply` makes these of."""
    return _flipped(_turned(image, None if turns is None else -turns % 4), flips)


def code(flips: Tensor, turns: Tensor) -> Tensor:
    """t: the flips and one of four for the turns, (B, D + 4) float32: 6 entries in 2-D, 7 in 3-D."""
    return torch.cat((flips, functional.one_hot(turns, 4)), dim=1).float()


def _flipped(image: Tensor, flips: Tensor | None) -> Tensor:
    if flips is None:
        return image
    for axis in range(flips.shape[1]):
        image = _where(flips[:, axis] > 0, image.flip(axis + 2), image)
    return image


def _turned(image: Tensor, turns: Tensor | None) -> Tensor:
    if turns is None:
        return image
    odd = turns % 2 > 0
    if image.shape[-1] == image.shape[-2]:
        image = _where(odd, image.rot90(1, PLANE), image)
    elif odd.any():
        raise ValueError(f"image: quarter turns need equal last two sides, got {tuple(image.shape[-2:])}")
    return _where(turns > 1, image.rot90(2, PLANE), image)


def _where(chosen: Tensor, changed: Tensor, image: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (image.ndim - 1)), changed, image)
