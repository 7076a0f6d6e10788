"""The momentum encoder: a copy of a network that follows it as an exponential moving average (MoCo)."""

import copy
from typing import Any

import torch
from torch import nn


class MomentumTwin(nn.Module):
    """theta' <- m theta' + (1 - m) theta after each step, in float32; no gradients.

    Parameters alone follow: the running statistics of its norms are its own, as in MoCo.

    Args:
        source: the network to copy; what is never called costs memory alone.
        momentum: m.
    """

    def __init__(self, source: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected 0 up to less than 1, got {momentum}")
        self.momentum = momentum
        self.network = copy.deepcopy(source).requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        # The library's networks name a parameter twice; parameters() gives each once, in the same order in both.
        for own, theirs in zip(self.network.parameters(), source.parameters(), strict=True):
            own.lerp_(theirs.detach().to(own.dtype), 1 - self.momentum)

    @torch.no_grad()
    def copy(self, source: nn.Module) -> None:
        """Begins anew from the source."""
        for own, theirs in zip(self.network.parameters(), source.parameters(), strict=True):
            own.copy_(theirs)

    @torch.no_grad()
    def forward(self, *arguments: Any) -> Any:
        return self.network(*arguments)
