"""The precision of forwards and backwards; parameters, moments and whatever is averaged over steps stay float32."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

AUTOCAST = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(name: str, device: torch.device) -> Any:
    """What `train.autocast` stands for, as a context."""
    return torch.autocast(device.type, AUTOCAST[name] if name != "none" else torch.bfloat16, enabled=name != "none")


def spare_small_maps(module: nn.Module) -> None:
    """Has 3-D convolutions of maps that are shorter than their kernel run in float32, in place, for autocast on CPUs.

    oneDNN (in torch 2.13, with AVX-512) leaves elements of their weights' gradients unwritten in bfloat16: they are
    what the memory held before.
    """
    for each in module.modules():
        if isinstance(each, nn.Conv3d):
            each.forward = functools.partial(_forward, each)  # type: ignore[method-assign]


def _forward(convolution: nn.Conv3d, image: Tensor) -> Tensor:
    if all(size >= kernel for size, kernel in zip(image.shape[-3:], convolution.kernel_size, strict=True)):
        return nn.Conv3d.forward(convolution, image)
    with torch.autocast(image.device.type, enabled=False):
        return nn.Conv3d.forward(convolution, image.float())
