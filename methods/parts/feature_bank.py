"""A bank of keys: the negatives of queries that were encoded steps ago (MoCo; PCRL)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .across_ranks import gather_parts

INITIAL = ("uniform", "sphere")


class FeatureBank(nn.Module):
    """The last K vectors that were pushed, float32, part of the checkpoint.

    Keys are collected in the forwards of a step and pushed after it, those of the whole global batch in its order, so
    that every query of a step meets the same bank. Outside training nothing is collected. K need not be a multiple of
    the batch: the newest keys go over the oldest, wherever the end of the bank lies.

    Args:
        size: K.
        channels: of a vector.
        initial: "uniform": U(-a, a) with a = sqrt(3 / channels) (PCRL), or "sphere": random directions (MoCo).
    """

    vectors: Tensor  # (K, C)
    pushed: Tensor  # (1,) int64, keys so far; the next one goes to row pushed % K

    def __init__(self, size: int, channels: int, initial: str = "sphere") -> None:
        super().__init__()
        if initial not in INITIAL:
            raise ValueError(f"initial: {initial!r} is not one of {', '.join(INITIAL)}")
        self.initial = initial
        self.register_buffer("vectors", self._drawn((size, channels), None))
        self.register_buffer("pushed", torch.zeros(1, dtype=torch.int64))
        self._collected: list[Tensor] = []

    def _drawn(self, shape: torch.Size | tuple[int, int], generator: torch.Generator | None) -> Tensor:
        if self.initial == "uniform":
            return (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(3 / shape[1])
        return nn.functional.normalize(torch.randn(shape, generator=generator), dim=1)

    def forget(self, generator: torch.Generator) -> None:
        """Random vectors again, in place of keys that another network made."""
        self.vectors.copy_(self._drawn(self.vectors.shape, generator))
        self.pushed.zero_()
        self._collected.clear()

    def forget_collected(self) -> None:
        """In place of `push`, where the step was not taken."""
        self._collected.clear()

    def collect(self, *keys: Tensor) -> None:
        """Keys (b, C) of one forward, to be pushed after the step; of several kinds the first goes first."""
        if self.training:
            self._collected.append(torch.stack([each.detach().to(self.vectors.dtype) for each in keys], dim=1))

    @torch.no_grad()
    def push(self, group: Any = None) -> None:
        """Puts the collected keys into the bank; collective over `group`."""
        if not self._collected:
            return
        samples = gather_parts(self._collected, group)  # (n, kinds, C)
        self._collected.clear()
        keys = samples.transpose(0, 1).flatten(0, 1)
        size = len(self.vectors)
        rows = (self.pushed + torch.arange(len(keys), device=keys.device)) % size
        # Of more keys than rows the last stay: which of two writes to a row wins is not defined.
        self.vectors[rows[-size:]] = keys[-size:]
        self.pushed += len(keys)

    def filled(self) -> Tensor:
        """Share of the rows that hold keys, (): a contrast grows while the random vectors give way to them."""
        return (self.pushed[0] / len(self.vectors)).clamp(max=1)
