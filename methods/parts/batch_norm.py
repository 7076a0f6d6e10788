"""Batch norm of vectors over the whole batch, on however many ranks it is."""

from typing import Any

import torch
from torch import Tensor, nn

from .across_ranks import rank_and_size, sum_over_ranks

EPSILON = 1e-5
MOMENTUM = 0.1


class GlobalBatchNorm(nn.Module):
    """What `nn.BatchNorm1d` computes of the batch of all ranks; works with gloo and NCCL. float32 at least.

    No subclass of torch's batch norms: those are exchanged or refused where there are several ranks. The ranks hold
    equally many samples. Micro-batches know nothing of each other: a method refuses them.

    Args:
        affine: whether a scale and a shift are learned.
    """

    running_mean: Tensor  # (C,)
    running_var: Tensor  # (C,)

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, vectors: Tensor, group: Any = None) -> Tensor:
        """(b, C) of this rank -> (b, C); collective over `group` in training."""
        vectors = vectors.to(torch.promote_types(vectors.dtype, self.running_mean.dtype))
        if not self.training:
            return self.frozen(vectors)
        count = len(vectors) * rank_and_size(group)[1]
        if count < 2:
            raise ValueError(
                "train.global_batch: batch norm needs at least 2 samples to compare, got 1; take 2 or more"
            )
        mean = sum_over_ranks(vectors.sum(0), group) / count
        variance = sum_over_ranks((vectors - mean).square().sum(0), group) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(variance * (count / (count - 1)), MOMENTUM)
        return self._scaled(vectors, mean, variance)

    def frozen(self, vectors: Tensor) -> Tensor:
        """With the running statistics, as outside training."""
        return self._scaled(vectors, self.running_mean, self.running_var)

    def _scaled(self, vectors: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        scaled = (vectors - mean) * (variance + EPSILON).rsqrt()
        return scaled if self.weight is None or self.bias is None else scaled * self.weight + self.bias
