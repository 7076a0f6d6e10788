"""A small method that has what methods have: a twin, a bank, an exchange, a decoder for some stages, an adversary.

As a script it is `voxtrast pretrain` with that method: for ranks of their own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxtrast.engine import pretrain
from voxtrast.kernels import bank_info_nce
from voxtrast.methods import METHODS, AppearanceRanges, Backbone, BackboneConfig, Batch, Method, View, ViewSpec
from voxtrast.methods.parts.across_ranks import gather_parts
from voxtrast.methods.parts.feature_bank import FeatureBank
from voxtrast.methods.parts.heads import pooled, projector
from voxtrast.methods.parts.momentum_twin import MomentumTwin
from voxtrast.methods.parts.monitors import EmbeddingMonitor


@dataclass
class StandInConfig:
    name: str = "stand_in"
    discriminative_weight: float = 1.0
    restorative_weight: float = 1.0
    adversarial_weight: float = 0.0
    bank: int = 10
    momentum: float = 0.9
    adversary: str = "least_squares"
    batch_norm: bool = False
    least_batch: int = 1
    decoder: str = "trained"  # frozen: no block of it is ever trained
    warn: bool = False


@dataclass
class StandInViews:
    crop: list[int] = field(default_factory=lambda: [16, 16, 16])
    one: View = field(default_factory=lambda: View(appearance=AppearanceRanges(order=["noise"]), clean=True))
    two: View = field(default_factory=lambda: View(appearance=AppearanceRanges(order=["noise", "contrast"])))


class Critic(nn.Module):
    """Least squares on patches."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        convolution: Any = nn.Conv3d if dimensions == 3 else nn.Conv2d
        self.layers = nn.Sequential(convolution(1, 4, 3, stride=2), nn.LeakyReLU(0.2), convolution(4, 1, 3, stride=2))
        self.monitors: dict[str, Tensor] = {}

    def forward(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        one, other = self.layers(real), self.layers(fake)
        self.monitors = {"accuracy": torch.cat(((one > 0.5).float(), (other < 0.5).float())).mean()}
        return {"real": (one - 1).square().mean(), "fake": other.square().mean()}


class Encoder(nn.Module):
    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(self.head(pooled(self.backbone.encode(image)[-1])), dim=1)


class StandIn(Method):
    name = "stand_in"
    Config, Views = StandInConfig, StandInViews

    def __init__(self, config: StandInConfig, backbone: BackboneConfig, views: StandInViews) -> None:
        terms = ("discriminative", "restorative", "adversarial")
        super().__init__({term: getattr(config, f"{term}_weight") for term in terms})
        self.config = config
        self.backbone = Backbone(backbone, decoder_blocks=0 if config.decoder == "frozen" else None)
        wide = backbone.features[-1]
        self.head = projector(wide, 8, wide)
        if config.batch_norm:
            self.head.insert(1, nn.BatchNorm1d(8))
        self.twin = MomentumTwin(Encoder(self.backbone, self.head), config.momentum)
        self.bank = FeatureBank(config.bank, wide)
        self.spread = EmbeddingMonitor(wide, window=6)
        self.restore = nn.Linear(backbone.features[0], 1)
        self.__dict__["adversary"] = Critic(backbone.dimensions)
        self.views = ViewSpec(tuple(views.crop), {"one": views.one, "two": views.two})

    def check_training(self, global_batch: int, parts: int) -> None:
        if global_batch < self.config.least_batch:
            raise ValueError(
                f"method.least_batch: {self.config.least_batch} is more than the {global_batch} of the batch ({parts} "
                f"parts); use train.global_batch={self.config.least_batch}"
            )

    def check_volumes(self, shapes: Any) -> None:
        if min(shape[0] for shape in shapes) < self.views.crop[0]:
            raise ValueError(f"views.crop: {self.views.crop[0]} is more than the smallest volume; lower it")

    @torch.no_grad()
    def exchange(self, batches: list[Batch], step: int) -> None:
        everywhere = gather_parts([batch["one"].flatten(1).mean(1) for batch in batches], self.group)
        for batch in batches:
            batch["mean"] = everywhere.mean()

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        maps = self.backbone.encode(batch["one"] - batch["mean"])
        losses = {}
        query = nn.functional.normalize(self.head(pooled(maps[-1])), dim=1)
        key = self.twin(batch["two"] - batch["mean"])
        self.bank.collect(key)
        self.spread.see(query)
        self.monitors = self.spread.numbers()
        if "discriminative" in weights:
            losses["discriminative"] = bank_info_nce(query, key, self.bank.vectors, temperature=0.2)
        if "restorative" in weights or "adversarial" in weights:
            fine = self.backbone.decode(maps)[-1]
            fake = self.restore(fine.movedim(1, -1)).movedim(-1, 1)
            batch["restored"] = fake.detach()
            losses["restorative"] = (fake - batch["one_clean"]).square().mean()
            losses["adversarial"] = self._convincing(fake)
        return {name: weight * losses[name] for name, weight in weights.items()}

    def _convincing(self, fake: Tensor) -> Tensor:
        assert isinstance(self.adversary, Critic)
        self.adversary.requires_grad_(False)
        loss = (self.adversary.layers(fake) - 1).square().mean()
        self.adversary.requires_grad_(True)
        return loss

    def adversary_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return batch["one_clean"], batch["restored"]

    def after_step(self, step: int) -> None:
        self.twin.update(Encoder(self.backbone, self.head))
        self.bank.push(self.group)
        self.spread.update(step * 10, self.group)  # each step

    def warning(self, step: int, numbers: Any) -> str | None:
        return f"a loss of {numbers['loss']:.3g}; lower it" if self.config.warn and step == 1 else None

    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"features": self.backbone(batch["one"])[1][-1]}

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained()


RECIPE = """
method: {name: stand_in}
backbone: {features: [4, 8], encoder_blocks: [1], decoder_blocks: [1]}
train: {steps: 6, global_batch: 4, threads: 1}
optimizer: {learning_rate: 0.01, weight_decay: 0.1}
validation: {every: 3, batches: 1, fraction: 0.34}
checkpoint: {every: 2, keep: 9}
loader: {threads: 1}
device: cpu
"""
STAGES = """
stages:
  - {name: D, share: 1, terms: {discriminative: 1}, global_batch: 8}
  - {name: R, share: 1, terms: {discriminative: 1, restorative: {start: 2, end: 1}}, learning_rate: 0.003}
  - {name: A, share: 1, terms: {restorative: 1, adversarial: 0.1}, fresh_optimizer: false}
"""


Run = Callable[..., Path]  # of the fixture `run`


def recipe(folder: Path, stages: str = "") -> Path:
    path = folder / "stand_in.yaml"
    path.write_text(RECIPE + stages)
    return path


if __name__ == "__main__":
    METHODS["stand_in"] = StandIn
    sys.exit(pretrain.main())
