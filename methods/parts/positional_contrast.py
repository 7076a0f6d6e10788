"""Contrast of the two views of each image of a batch, with positives by position (PCL and JCL).

    P(i) = {j != i : |pos_j - pos_i| < t}                over all 2B views, the own other one always among them
    L = scale/2B sum_i [log sum_{a != i} exp(s_ia) - 1/|P(i)| sum_{j in P(i)} s_ij]      s_ij = cos(z_i, z_j) / tau

Where all z are equal, L = scale * ln(2B - 1).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import positional_info_nce
from .across_ranks import gather_parts, rank_and_size

POSITIVES = ("position", "own", "partition")
NEGATIVES = ("global", "local")
BASE_TEMPERATURE = 0.07  # of the loss that both official codes took theirs from
PARTITIONS = 4  # GCL's
LEAST_PLANE = 0.25  # share of a plane that a crop shows, ours


@dataclass
class ContrastConfig:
    threshold: float = 0.1  # t, a share of the volume's extent along its first axis
    temperature: float = 0.1  # tau
    loss_scale: float | None = None  # temperature / 0.07 if not given: a factor of both official codes
    # position: |pos_j - pos_i| < t | own: the other view alone (SimCLR) | partition: the same quarter of a volume (GCL)
    positives: str = "position"
    negatives: str = "global"  # global: all of the batch | local: those on the same rank, as JCL's code


class PositionalContrast:
    """Raises: ValueError naming the setting that is wrong.

    Args:
        config: of the method.
        crop: (D, H, W), or (H, W) of slices.
    """

    def __init__(self, config: ContrastConfig, crop: Sequence[int]) -> None:
        for key, value, choices in (
            ("positives", config.positives, POSITIVES),
            ("negatives", config.negatives, NEGATIVES),
        ):
            if value not in choices:
                raise ValueError(f"method.{key}: {value!r} is not one of {', '.join(choices)}")
        if config.positives == "position" and not 0 < config.threshold < 1:
            raise ValueError(
                f"method.threshold: expected more than 0 and less than 1, got {config.threshold}; positions run from "
                "0 to 1, and of 1 on everything is a positive; take 0.1"
            )
        for key, number in (("temperature", config.temperature), ("loss_scale", config.loss_scale)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"method.{key}: expected a finite number, more than 0, got {number}; take 0.1")
        self.config = config
        self.crop = tuple(crop)
        self.threshold = config.threshold if config.positives == "position" else 0.5
        self.scale = config.temperature / BASE_TEMPERATURE if config.loss_scale is None else config.loss_scale

    def loss(self, features: Tensor, positions: Tensor, group: Any = None) -> Tensor:
        """L, in the mean over the problems.

        Args:
            features: (..., 2B, C), both views of the batch one after the other; leading dimensions are problems.
            positions: (B,), see `positions`.
            group: the ranks that share the batch.
        """
        return self.scale * positional_info_nce(
            features,
            positions.repeat(2),
            threshold=self.threshold,
            temperature=self.config.temperature,
            group=self._ranks(group),
        )

    def positions(self, position: Tensor, group: Any = None) -> Tensor:
        """What the threshold is compared with, (B,), from the positions 0 to 1 of a batch."""
        if self.config.positives == "own":
            rank, _ = rank_and_size(self._ranks(group))
            return torch.arange(len(position), device=position.device, dtype=torch.float32) + rank * len(position)
        if self.config.positives == "partition":
            return (position.float() * PARTITIONS).floor().clamp(max=PARTITIONS - 1)
        return position.float()

    def collapsed(self, samples: int, group: Any = None) -> float:
        """L of identical embeddings, of `samples` on each rank."""
        _, size = rank_and_size(self._ranks(group))
        return self.scale * math.log(2 * samples * size - 1)

    @torch.no_grad()
    def positives(self, positions: Tensor, group: Any = None) -> Tensor:
        """How many an item has, in the mean."""
        everywhere = gather_parts([positions], self._ranks(group))
        near = (positions[:, None] - everywhere).abs() < torch.tensor(self.threshold, dtype=torch.float32)
        return 2 * near.float().sum(1).mean() - 1

    def check_training(self, global_batch: int, parts: int, group: Any) -> None:
        """As a method's own."""
        _, ranks = rank_and_size(group)
        if parts > ranks:
            raise ValueError(
                f"train.accumulation: {parts // ranks} micro-batches would not be contrasted with each other; take "
                "train.accumulation=1, with a smaller train.global_batch or more ranks"
            )
        apart = parts if self.config.negatives == "local" else 1
        if global_batch < 2 * apart:
            raise ValueError(
                f"train.global_batch: of {global_batch} over {parts} rank(s) with method.negatives="
                f"{self.config.negatives} a sample has no negatives; take train.global_batch={2 * apart} or more"
            )

    def check_volumes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """As a method's own."""
        if self.config.positives == "own":
            return
        deepest, deep = max(shape[0] for shape in shapes), self.crop[0]
        if len(self.crop) == 2:
            extent, what = float(deepest > 1), "every volume is a single slice"
        else:
            extent, what = max(0.0, 1 - deep / deepest), f"the crop is {deep} deep, as deep as every volume"
        if extent == 0:
            raise ValueError(
                f"method.positives: {self.config.positives} needs images from different places along the first axis, "
                f"and {what}; take method.positives=own"
                + (f", or views.crop with at most {deepest // 2} in front" if len(self.crop) == 3 else "")
            )
        if self.config.positives == "position" and extent < self.threshold:
            raise ValueError(
                f"method.threshold: of {self.threshold} everything is a positive: crops {deep} deep lie at most "
                f"{extent:.3g} apart in volumes of at most {deepest}; take method.threshold={extent / 4:.2g}, or a "
                "shallower views.crop"
            )

    def advice(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """As a method's own: lumbar spines were not learned from a tenth of their planes, and at once from 82 %."""
        plane = [statistics.median(shape[axis] for shape in shapes) for axis in (1, 2)]
        share = math.prod(min(1.0, side / whole) for side, whole in zip(self.crop[-2:], plane, strict=True))
        if self.config.positives == "own" or share >= LEAST_PLANE:
            return None
        return (
            f"views.crop: {' x '.join(map(str, self.crop[-2:]))} is {share:.0%} of a plane of these volumes (median "
            f"{plane[0]:g} x {plane[1]:g}), and a part of a plane hardly tells its position; if nothing is learned, "
            "take a larger views.crop, or volumes prepared at a coarser spacing"
        )

    def _ranks(self, group: Any) -> Any:
        return group if self.config.negatives == "global" else None
