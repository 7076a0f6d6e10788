"""Features made comparable by what they have been on average: no part of a batch needs to know the others."""

from typing import Any

import torch
from torch import Tensor, nn

from .across_ranks import gather_parts

EPSILON = 1e-8  # of a variance: behind an instance norm, that of pooled features is about 1e-4

Statistics = tuple[Tensor, Tensor]  # mean and variance, (C,) each


class RunningStandard(nn.Module):
    """(x - mean) / deviation of each channel, both averages over the global batches of earlier steps.

    Behind an instance norm the mean over a map hardly depends on the image: pooled features are one vector for all
    images, and a few per cent besides, so that all embeddings begin as one. Batch norm would tell them apart, and tie
    them to the batch. The averages stand still within a step, so that no sample knows of another and every cut of a
    batch is the same, and outside training. They are float32, part of the checkpoint, and no gradient passes through
    them.

    As a layer it takes features as they are in the first step. Whose first step fixes something for good has them
    measured on the first batch instead (`measure`), and handles collecting and standardising for itself.

    Args:
        channels: C.
        momentum: of the averages, once they are over as many steps; until then all steps count alike.
    """

    mean: Tensor  # (C,)
    variance: Tensor  # (C,)
    steps: Tensor  # (1,) int64

    def __init__(self, channels: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._collected: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        """(b, C), to be averaged after the step where this is training."""
        self.collect(features)
        return standardised(features, self.statistics)

    @property
    def statistics(self) -> Statistics:
        return self.mean, self.variance

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

    def forget_collected(self) -> None:
        """In place of `update`, where the step was not taken."""
        self._collected.clear()

    @torch.no_grad()
    def update(self, group: Any = None) -> None:
        """Takes in what was collected since the last update; collective over `group`."""
        if not self._collected:
            return
        mean, variance = _moments(gather_parts(self._collected, group))
        self._collected.clear()
        share = (1 / (self.steps + 1).to(self.mean.dtype)).clamp(min=1 - self.momentum)
        # The variance of all steps so far: within them, and of their means.
        self.variance.lerp_(variance + (1 - share) * (mean - self.mean).square(), share)
        self.mean.lerp_(mean, share)
        self.steps += 1


def standardised(features: Tensor, statistics: Statistics) -> Tensor:
    mean, variance = statistics
    return (features - mean) * (variance + EPSILON).rsqrt()


def update_standards(module: nn.Module, group: Any = None) -> None:
    """Updates all that a module has; after each step, collective over `group`."""
    for each in module.modules():
        if isinstance(each, RunningStandard):
            each.update(group)


def forget_standards(module: nn.Module) -> None:
    """All that a module has begin anew."""
    for each in module.modules():
        if isinstance(each, RunningStandard):
            each.mean.zero_()
            each.variance.fill_(1)
            each.steps.zero_()


def _moments(features: Tensor) -> Statistics:
    variance, mean = torch.var_mean(features.detach(), dim=0, correction=0)
    return mean, variance
