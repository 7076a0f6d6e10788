"""Small networks on top of the backbone's maps."""

from torch import Tensor, nn


def pooled(features: Tensor) -> Tensor:
    """Global average pooling: (B, C, *S) -> (B, C), float32 at least."""
    mean: Tensor = features.float().flatten(2).mean(-1) if features.dtype.itemsize < 4 else features.flatten(2).mean(-1)
    return mean


def projector(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, Linear: the projection head of SimCLR and MoCo v2."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def predictor(channels: int, hidden: int) -> nn.Sequential:
    """Linear, batch norm, ReLU, Linear: the prediction head of SimSiam."""
    return nn.Sequential(
        nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
    )
