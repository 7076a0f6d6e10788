"""Small networks on top of the backbone's maps."""

from typing import Any

import torch
from torch import Tensor, nn

from .batch_norm import GlobalBatchNorm
from .running_standard import RunningStandard


def pooled(features: Tensor) -> Tensor:
    """Global average pooling: (B, C, *S) -> (B, C), float32 at least."""
    return features.to(torch.promote_types(features.dtype, torch.float32)).flatten(2).mean(-1)


def projector(inputs: int, hidden: int, outputs: int, standardise: bool = False) -> nn.Sequential:
    """Linear, ReLU, Linear: the projection head of SimCLR and MoCo v2.

    Args:
        standardise: its inputs, see `RunningStandard`; whose owner calls `update_standards` after each step.
    """
    layers: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*([RunningStandard(inputs)] if standardise else []), *layers)


class Predictor(nn.Module):
    """Linear, batch norm over the whole batch, ReLU, Linear: the prediction head of SimSiam."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden, bias=False)  # a bias before a batch norm changes nothing
        self.norm = GlobalBatchNorm(hidden)
        self.second = nn.Linear(hidden, channels)

    def forward(self, vectors: Tensor, group: Any = None) -> Tensor:
        predicted: Tensor = self.second(torch.relu(self.norm(self.first(vectors), group)))
        return predicted
