"""Whether a training collapses: the spread of its embeddings, and its loss against that of identical embeddings."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .feature_bank import FeatureBank

REMEDY = "lower optimizer.learning_rate to a tenth (of sgd: 0.01 or less), or raise schedule.warmup_steps (200 or more)"
WINDOW = 128  # embeddings looked at: a batch of volumes is too small to say anything
EVERY = 10  # steps between two looks


def embedding_std(vectors: Tensor) -> Tensor:
    """Standard deviation of the channels of unit vectors (N, C), in the mean and times sqrt(C).

    0 where all vectors are equal, 1 where they are spread evenly over the sphere.
    """
    unit = nn.functional.normalize(vectors.double(), dim=1)
    return unit.std(0, correction=0).mean() * vectors.shape[1] ** 0.5


def effective_rank(vectors: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of unit vectors (N, C), from 1 to min(N, C) (RankMe)."""
    unit = nn.functional.normalize(vectors.double(), dim=1)
    share = torch.linalg.svdvals(unit)
    share = share / share.sum().clamp(min=1e-12)
    return torch.special.entr(share).sum().exp()


class EmbeddingMonitor(nn.Module):
    """Spread of the last embeddings of the global batch, over the steps.

    Call `see` in the forward, `update` after the step, and put `numbers` among the method's monitors: those of the
    step before, once `WINDOW` embeddings have been seen.
    """

    latest: Tensor  # (2,) float64, std and rank; rank 0 until there are any: in the checkpoint, as the window is

    def __init__(self, channels: int, window: int = WINDOW) -> None:
        super().__init__()
        self.window = FeatureBank(window, channels)
        self.register_buffer("latest", torch.zeros(2, dtype=torch.float64))
        # Known here, so that no forward waits for a GPU's answer; after a load it is asked once.
        self._measured: bool | None = False
        self.register_load_state_dict_post_hook(_ask_again)

    def see(self, embeddings: Tensor) -> None:
        """(b, C) of one forward."""
        self.window.collect(embeddings)

    @torch.no_grad()
    def update(self, step: int, group: Any = None) -> None:
        self.window.push(group)
        if step % EVERY == 0 and int(self.window.pushed) >= len(self.window.vectors):
            # On the CPU: small, and a GPU takes longer for the singular values.
            vectors = self.window.vectors.cpu()
            self.latest.copy_(torch.stack([embedding_std(vectors), effective_rank(vectors)]))
            self._measured = True

    def numbers(self) -> dict[str, Tensor]:
        """Nothing outside training: what is seen there is no part of the window."""
        if self._measured is None:
            self._measured = bool(self.latest[1] > 0)
        if not self.training or not self._measured:
            return {}
        return {"embedding_std": self.latest[0].clone(), "effective_rank": self.latest[1].clone()}


def _ask_again(monitor: EmbeddingMonitor, _: Any) -> None:
    monitor._measured = None


class CollapseWatch:
    """Notices that all embeddings become one.

    A step looks collapsed where the embeddings hardly spread, or where the loss is what identical embeddings have.
    Every network begins near there, so that only a run of such steps counts that ends behind the first ones, and none
    while the learning rate rises.

    Args:
        remedy: what to lower.
        prefix: of the numbers' names, for a method with embeddings of several kinds.
    """

    PATIENCE = 20  # steps in a row
    GRACE = 60  # first steps
    AGAIN = 1000  # steps until the next warning
    SPREAD = 0.05  # embedding_std below this
    NEAR = 0.005  # of the loss to that of identical embeddings, relative

    def __init__(self, remedy: str, prefix: str = "") -> None:
        self.remedy = remedy
        self.prefix = prefix
        self._recent: deque[bool] = deque(maxlen=self.PATIENCE)
        self._warned = -self.AGAIN
        self._rate = math.inf

    def see(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A warning, or nothing.

        `numbers` may hold monitor/embedding_std, monitor/loss_over_collapse and learning_rate.
        """
        spread, ratio = (
            numbers.get(f"monitor/{self.prefix}{name}") for name in ("embedding_std", "loss_over_collapse")
        )
        flat = spread is not None and spread < self.SPREAD
        equal = ratio is not None and abs(ratio - 1) < self.NEAR
        rate = numbers.get("learning_rate", self._rate)
        rising, self._rate = rate > self._rate, rate
        self._recent.append((flat or equal) and not rising)
        if step < self.GRACE or step - self._warned < self.AGAIN or sum(self._recent) < self.PATIENCE:
            return None
        self._warned = step
        found = [f"embedding std {spread:.3g} of 1"] if flat else []
        found += [f"loss {ratio:.4f} times that of identical embeddings"] if equal else []
        kind = self.prefix.replace("_", " ")
        return f"the {kind}embeddings have collapsed ({', '.join(found)}); {self.remedy}"
