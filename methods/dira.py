"""DiRA: discriminative, restorative and adversarial learning (Haghighi et al., CVPR 2022), in 2-D and 3-D.

Two views of an image are distorted. An encoder tells images apart by its embeddings of both views; a decoder restores
the undistorted first view from the encoder's maps; a critic that tells restored from real images sharpens what is
restored. The three are switched on one after the other: ((D) + R) + A.

    L = w_dis L_dis + w_res L_res + w_adv L_adv            weights 1 : 10 : 0.001 (2-D), 1 : 100 : 1 (3-D)
    L_dis   MoCo v2, SimSiam or Barlow Twins on the views x1~ and x2~      `parts/instance_discrimination.py`
    L_res   mean (G(x1~) - x1)^2, or mean |G(x1~) - x1|                    G the U-Net, x1 the clean view
    L_adv   of the generator, and the critic's own loss                    `parts/adversary.py`

Intensities: the published images lie in [0, 1] and G ends in a sigmoid. A store holds CT in [-1, 1] and standardised
MR, which has no bounds. `intensity_range` says which stored values are 0 and 1 to the losses and to the critic, so that
the published weights keep their meaning; with `output: linear` values beyond are restored as well, with `sigmoid` a
range that clips the images is refused before the first step.

Departures from the official code, with reasons:
- The target shares the geometry of the input (`target: aligned`). In the official code the input may be flipped and the
  target is not; `target: unflipped` does the same.
- Evaluation changes nothing: there, validation moves the momentum twin and pushes its keys into the bank.
- The bank takes batches of any size up to its own; there its size must be a multiple of the batch.
- One process suffices. Keys are not shuffled over the GPUs: that hides batch statistics from the query, and the recipes
  have instance norm, which has none.
- The twin encodes keys only; there its decoder runs as well and its output is dropped.
- With `standardise` MoCo's head is preceded by running averages: behind instance norm the pooled features of all images
  are one vector but for two per cent, and the embeddings stay one.
- D comes first, alone, as the paper says; the official second stage starts D and R together.
- In 3-D MoCo v2 takes the place of TransVW's visual words, which need a dictionary of anatomical patterns made
  beforehand. Its critic sees images (there: pairs of image and distorted image) and takes its step after the generator,
  as in the 2-D code (there: before it). The gradient penalty lies between x and G(x~), where the 3-D code interpolates
  x~ with itself, and is that of the mean over the patches, so that it does not grow with the crop.
- `adversary: log` has the generator raise log s(D(x')) where the paper lowers log(1 - s(D(x'))): the same goal with a
  gradient that lasts when the critic wins.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts import rigid
from .parts.across_ranks import own_part, rank_and_size
from .parts.adversary import FORMS, Adversary, PatchCritic
from .parts.crops import check_channels
from .parts.instance_discrimination import BarlowTwins, MomentumContrast, SimSiam
from .parts.monitors import CollapseWatch, EmbeddingMonitor
from .stages import Stage
from .views import View, ViewSpec

CHOICES = {
    "discriminative": ("moco", "simsiam", "barlow_twins"),
    "adversary": FORMS,
    "restoration": ("mse", "mae"),
    "target": ("aligned", "unflipped"),
    "output": ("sigmoid", "linear"),
}
RESTORATIONS = {"mse": functional.mse_loss, "mae": functional.l1_loss}
MAX_CLIPPED = 0.01  # share of voxels outside the intensity range that a sigmoid may be asked for


@dataclass
class DiraConfig:
    """The paper's symbols: temperature = T, bank = K, momentum = m, barlow_lambda = lambda."""

    name: str = "dira"
    discriminative: str = "moco"  # moco | simsiam | barlow_twins
    restoration: str = "mse"  # mse (2-D code) | mae (3-D code)
    adversary: str = "least_squares"  # least_squares (2-D code) | log (paper) | wgan_gp (3-D code)
    target: str = "aligned"  # aligned: with the input's flips | unflipped: without them (official code)
    output: str = "linear"  # sigmoid (official code) | linear
    intensity_range: list[float] = field(default_factory=lambda: [-1.0, 1.0])  # stored values that are 0 and 1
    temperature: float = 0.2  # of moco
    bank: int = 65536  # keys that moco keeps
    momentum: float = 0.999  # of the momentum encoder
    barlow_lambda: float = 0.005  # weight of the entries off the diagonal
    hidden: int = 2048  # of the head
    outputs: int = 128  # of the head; published: 128 for moco, 2048 for simsiam, 8192 for barlow_twins
    predictor_hidden: int = 512  # of simsiam
    standardise: bool = True  # of moco: pooled features before the head; see parts/running_standard.py
    critic_width: int = 64  # channels of its first layer
    gradient_penalty: float = 100.0  # of wgan_gp
    discriminative_weight: float = 1.0
    restorative_weight: float = 10.0
    adversarial_weight: float = 0.001


@dataclass
class DiraViews:
    """The two views of DiRA; x1 is the query, and always made clean, too."""

    crop: list[int] = field(default_factory=lambda: [32, 64, 64])  # D, H, W voxels (H, W for 2-D)
    x1: View = field(default_factory=View)  # the query
    x2: View = field(default_factory=View)  # the key


class Dira(Method):
    name = "dira"
    Config = DiraConfig
    Views = DiraViews

    def __init__(self, config: DiraConfig, backbone: BackboneConfig, views: DiraViews) -> None:
        super().__init__(
            {
                "discriminative": config.discriminative_weight,
                "restorative": config.restorative_weight,
                "adversarial": config.adversarial_weight,
            }
        )
        _check_config(config)
        _check_views(config, backbone, views)
        self.config = config
        self.views = ViewSpec(
            crop=tuple(views.crop), views={"x1": dataclasses.replace(views.x1, clean=True), "x2": views.x2}
        )
        self.backbone = Backbone(backbone)
        self.discrimination = _discrimination(config, self.backbone)
        convolution = nn.Conv3d if backbone.dimensions == 3 else nn.Conv2d
        self.restoration_head = convolution(self.backbone.decoder_channels[-1], 1, 1)
        self.embedding_monitor = EmbeddingMonitor(config.outputs)
        self.watch = CollapseWatch("lower optimizer.learning_rate, or make the views of method dira differ more")
        # In a tuple: a module that were an attribute would be trained and saved with the method.
        critic = PatchCritic(backbone.dimensions, config.critic_width)
        self._unregistered = (Adversary(critic, config.adversary, config.gradient_penalty),)
        self._call_up_adversary()

    def set_stages(self, stages: Sequence[Stage], steps: int) -> None:
        super().set_stages(stages, steps)
        self._call_up_adversary()

    def _call_up_adversary(self) -> None:
        needed = self.schedule.ever("adversarial")
        object.__setattr__(self, "adversary", self._unregistered[0] if needed else None)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        losses: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        if "discriminative" in weights:
            maps, embeddings, losses["discriminative"] = self.discrimination(
                self.backbone, batch["x1"], batch["x2"], self.group
            )
            self.embedding_monitor.see(embeddings)
            monitors |= self.embedding_monitor.numbers()
            if isinstance(self.discrimination, MomentumContrast):
                monitors["bank_filled"] = self.discrimination.bank.filled()
                monitors["loss_over_collapse"] = losses["discriminative"].detach() / math.log(self.config.bank + 1)
        else:
            maps = self.backbone.encode(batch["x1"])
        if weights.keys() & {"restorative", "adversarial"}:
            restored, target = self._restore(maps), self._target(batch)
            losses["restorative"] = RESTORATIONS[self.config.restoration](restored, target)
            low, high = self.config.intensity_range
            monitors["restoration_error"] = (high - low) * (restored - target).detach().abs().mean()
        if "adversarial" in weights:
            assert isinstance(self.adversary, Adversary)
            losses["adversarial"] = self.adversary.generator_loss(restored)
            batch["adversary"] = (target, restored.detach(), *self._mixing_of(batch, step))
        self.monitors = monitors
        return {name: weight * losses[name] for name, weight in weights.items()}

    def adversary_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """The clean view, its restoration without gradients and, for wgan_gp, where to take the gradient penalty."""
        inputs: tuple[Tensor, ...] = batch["adversary"]
        return inputs

    def exchange(self, batches: list[Batch], step: int) -> None:
        if self.config.adversary != "wgan_gp" or "adversarial" not in self.weights(step):
            return
        samples = sum(len(batch["x1"]) for batch in batches) * rank_and_size(self.group)[1]
        drawn = self._draw_mixing(samples, step)
        for part, batch in enumerate(batches):
            batch["mixing"] = own_part(drawn, part, len(batches), self.group).to(batch["x1"].device)

    def after_step(self, step: int) -> None:
        self.discrimination.after_step(self.backbone, self.group)
        self.embedding_monitor.update(step, self.group)

    def check_training(self, global_batch: int, parts: int) -> None:
        if self.config.discriminative == "moco":
            if global_batch > self.config.bank:
                raise ValueError(
                    f"method.bank: {self.config.bank} keys are fewer than a batch brings ({global_batch}); "
                    f"give method.bank={16 * global_batch}"
                )
            return
        norms = f"method.discriminative: {self.config.discriminative} has batch norm in its head, "
        if global_batch < 2:
            raise ValueError(f"{norms}which needs at least 2 samples; give train.global_batch=2, or moco")
        ranks = rank_and_size(self.group)[1]
        if parts > ranks:
            raise ValueError(
                f"{norms}whose statistics would be those of each of {parts // ranks} micro-batches; give "
                f"train.accumulation=1, or method.discriminative=moco"
            )

    def preflight(
        self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        if self.config.output == "linear" or not self._restores():
            return {}
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            scaled = self._scaled(batch["x1_clean"])
            outside = (scaled < 0) | (scaled > 1)
            sums += torch.tensor([outside.sum().item(), outside.numel()], dtype=torch.float64)
        clipped, voxels = total(sums).tolist()
        share = clipped / max(1.0, voxels)
        if share > MAX_CLIPPED:
            raise ValueError(
                f"method.intensity_range: {share:.1%} of the voxels lie outside {list(self.config.intensity_range)}, "
                f"which method.output=sigmoid cannot restore; give method.output=linear, or a wider range"
            )
        return {"clipped_fraction": share}

    def weights_loaded(self, step: int) -> None:
        self.discrimination.begin_anew(self.backbone, self.generator(step, "bank"))

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        return self.watch.see(step, numbers)

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The query view's full-resolution features (B, C, *S); what is restored of it and what should be."""
        _, decoder_maps = self.backbone(batch["x1"])
        found = {"features": decoder_maps[-1]}
        if self._restores():
            low, high = self.config.intensity_range
            restored = {"restored": self._output(decoder_maps[-1]), "target": self._target(batch)}
            found |= {name: low + (high - low) * image for name, image in restored.items()}
        return found

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained(None if self._restores() else 0)

    def _restores(self) -> bool:
        return self.schedule.ever("restorative") or self.schedule.ever("adversarial")

    def _restore(self, encoder_maps: Sequence[Tensor]) -> Tensor:
        return self._output(self.backbone.decode(encoder_maps)[-1])

    def _output(self, features: Tensor) -> Tensor:
        values: Tensor = self.restoration_head(features)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return values.sigmoid() if self.config.output == "sigmoid" else values

    def _target(self, batch: Batch) -> Tensor:
        clean = self._scaled(batch["x1_clean"])
        return clean if self.config.target == "aligned" else rigid.undo(clean, batch["x1_flips"], None)

    def _scaled(self, image: Tensor) -> Tensor:
        low, high = self.config.intensity_range
        return (image - low) / (high - low)

    def _mixing_of(self, batch: Batch, step: int) -> tuple[Tensor, ...]:
        if self.config.adversary != "wgan_gp":
            return ()
        # Without an exchange this batch is the whole one.
        mixing = batch["mixing"] if "mixing" in batch else self._draw_mixing(len(batch["x1"]), step)
        return (mixing.to(batch["x1"].device),)

    def _draw_mixing(self, samples: int, step: int) -> Tensor:
        return torch.rand(samples, generator=self.generator(step, "gradient penalty"))


def _discrimination(config: DiraConfig, backbone: Backbone) -> MomentumContrast | SimSiam | BarlowTwins:
    widths = (config.hidden, config.outputs)
    if config.discriminative == "moco":
        return MomentumContrast(
            backbone,
            *widths,
            bank=config.bank,
            temperature=config.temperature,
            momentum=config.momentum,
            standardise=config.standardise,
        )
    if config.discriminative == "simsiam":
        return SimSiam(backbone, *widths, predictor_hidden=config.predictor_hidden)
    return BarlowTwins(backbone, *widths, off_diagonal=config.barlow_lambda)


def _check_config(config: DiraConfig) -> None:
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ValueError(f"method.{key}: {getattr(config, key)!r} is not one of {', '.join(choices)}")
    for key in ("bank", "hidden", "outputs", "predictor_hidden", "critic_width"):
        if getattr(config, key) < 1:
            raise ValueError(f"method.{key}: expected at least 1, got {getattr(config, key)}")
    if not config.temperature > 0:
        raise ValueError(f"method.temperature: expected more than 0, for example 0.2, got {config.temperature}")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"method.momentum: expected 0 up to less than 1, for example 0.999, got {config.momentum}")
    if min(config.gradient_penalty, config.barlow_lambda) < 0:
        raise ValueError(
            f"method.gradient_penalty, method.barlow_lambda: expected 0 or more, got {config.gradient_penalty} "
            f"and {config.barlow_lambda}"
        )
    bounds = list(config.intensity_range)
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"method.intensity_range: expected two rising numbers, for example [-1, 1], got {bounds}")


def _check_views(config: DiraConfig, backbone: BackboneConfig, views: DiraViews) -> None:
    check_channels(backbone)
    sizes = {"views.crop": list(views.crop)}
    sizes |= {f"views.{name}.size": list(v.size) for name, v in (("x1", views.x1), ("x2", views.x2)) if v.size}
    for key, size in sizes.items():
        if len(size) != backbone.dimensions or any(side < 1 or side % backbone.stride for side in size):
            raise ValueError(
                f"{key}: expected {backbone.dimensions} multiples of {backbone.stride} ({backbone.levels} levels), "
                f"got {size}"
            )
        least = [max(side, 2 * backbone.stride, 16) for side in size]
        if backbone.norm == "instance" and math.prod(size) == backbone.stride**backbone.dimensions:
            raise ValueError(f"{key}: {size} leaves one voxel at the coarsest level, and instance norm; give {least}")
        if PatchCritic.patches(tuple(size)) < 2:
            raise ValueError(f"{key}: {size} is a single patch to the critic, which needs two; give {least}")
    if config.discriminative != "moco" and (views.x1.size or views.crop) != (views.x2.size or views.crop):
        raise ValueError("views.x2.size: both views pass the encoder together; give it the size of views.x1")
    if config.target == "unflipped" and (not any(views.x1.flips) or views.x1.quarter_turns):
        raise ValueError(
            "method.target: unflipped turns back the flips of views.x1, which has none, or quarter turns besides; "
            "give views.x1.flips and no quarter turns, or method.target=aligned"
        )
