"""Features made comparable by what they have been on average: no part of a batch needs to know the others."""

from typing import Any

import torch
from torch import Tensor, nn

from .across_ranks import gather_parts


class RunningStandard(nn.Module):
    """(x - mean) / deviation of each channel, both running averages over the global batches of earlier steps.

    Behind an instance norm the mean over a map hardly depends on the image: pooled features are one vector for all
    images, and a few per cent besides, so that all embeddings begin as one. Batch norm would tell them apart, and tie
    them to the batch. No gradient passes through the averages, and they are still outside training.

    Args:
        channels: C.
        momentum: of the averages, once they are over as many steps.
    """

    mean: Tensor  # (C,)
    square: Tensor  # (C,) of the distance to the mean
    steps: Tensor  # (1,) int64

    def __init__(self, channels: int, momentum: float = 0.99, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("square", torch.ones(channels))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self._collected: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        """(b, C), to be averaged after the step where this is training."""
        if self.training:
            self._collected.append(features.detach().to(self.mean.dtype))
        return (features - self.mean) * (self.square + self.epsilon).rsqrt()

    @torch.no_grad()
    def update(self, group: Any = None) -> None:
        """Takes in what was collected since the last update; collective over `group`."""
        if not self._collected:
            return
        features = gather_parts(self._collected, group)
        self._collected.clear()
        share = torch.clamp(1 / (self.steps + 1.0), min=1 - self.momentum)
        self.mean.lerp_(features.mean(0), share.to(self.mean))
        self.square.lerp_((features - self.mean).square().mean(0), share.to(self.square))
        self.steps += 1
