"""The moving average of a module's parameters: theta' <- d theta' + (1 - d) theta after each step, float32 by name.

Under ZeRO 3 all of this needs the parameters whole (`Learner.whole`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Average = dict[str, Tensor]  # empty where it is off


def begin_average(module: nn.Module) -> Average:
    return {name: parameter.detach().float().clone() for name, parameter in module.named_parameters()}


@torch.no_grad()
def update_average(average: Average, module: nn.Module, decay: float) -> None:
    for name, parameter in module.named_parameters():
        average[name].lerp_(parameter.detach().float(), 1 - decay)


def read_average(saved: Average, module: nn.Module, device: torch.device) -> Average:
    """Of a checkpoint; earlier versions averaged the momentum encoder as well, whose tensors are buffers now."""
    names = dict(module.named_parameters())
    return {name: tensor.to(device) for name, tensor in saved.items() if name in names}


@contextmanager
def averaged(module: nn.Module, average: Average) -> Iterator[None]:
    """Within, the parameters are their averages, where there are any."""
    parameters = {name: each for name, each in module.named_parameters() if name in average}
    values = {name: each.data for name, each in parameters.items()}
    for name, each in parameters.items():
        each.data = average[name].to(each.dtype)
    try:
        yield
    finally:
        for name, each in parameters.items():
            each.data = values[name]
