"""Features relative to those of the steps before: what all images have in common is taken away."""

from typing import Any

import torch
from torch import Tensor, nn

from .across_ranks import gather_parts

EPSILON = 1e-8
MOMENTUM = 0.05

Statistics = tuple[Tensor, Tensor]  # mean and variance, (C,) each


class RunningStandard(nn.Module):
    """Mean and variance of features over the steps, float32, part of the checkpoint.

    They stand still within a step, so that no sample knows of another and every cut of a batch is the same. Before the
    first step the method has them measured on the first batch.
    """

    mean: Tensor  # (C,)
    variance: Tensor  # (C,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self._collected: list[Tensor] = []

    def measure(self, features: Tensor) -> Statistics:
        """Those of (n, C), the first whole batch; kept in training."""
        mean, variance = _moments(features.to(self.mean.dtype))
        if self.training:
            self.mean.copy_(mean)
            self.variance.copy_(variance)
        return mean, variance

    def collect(self, features: Tensor) -> None:
        """(b, C) of one forward."""
        if self.training:
            self._collected.append(features.detach().to(self.mean.dtype))

    @torch.no_grad()
    def update(self, group: Any = None) -> None:
        """After the step; collective over `group`."""
        if not self._collected:
            return
        mean, variance = _moments(gather_parts(self._collected, group))
        self._collected.clear()
        # About the running mean, so that a lone sample has a variance as well.
        self.variance.lerp_(variance + (mean - self.mean).square(), MOMENTUM)
        self.mean.lerp_(mean, MOMENTUM)


def standardised(features: Tensor, statistics: Statistics) -> Tensor:
    mean, variance = statistics
    return (features - mean) * (variance + EPSILON).rsqrt()


def _moments(features: Tensor) -> Statistics:
    variance, mean = torch.var_mean(features.detach(), dim=0, correction=0)
    return mean, variance
