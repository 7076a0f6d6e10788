"""PCRL: preservational contrastive representation learning (Zhou et al., ICCV 2021), in 2-D and 3-D.

Two views of an image are told from those of other images by their pooled bottlenecks; what that alone would throw
away is preserved by restoring images from the same features. A decoder conditioned on a transform t restores the view
as t left it, and decoders of mixed features, of two images or of the network and its momentum twin, restore the
mixture of the images.

    L = L_con + L_res
    L_con = (NCE(q, k) + NCE(q~, k~) + NCE(q~, k_mix)) / 3          NCE from `bank_nce`, against the bank
    L_res = (MSE(Dec(F1|t1), y1) + MSE(Dec(Mix_a1(F1|t1, F2|t2)), a1 y1 + (1 - a1) y2)
             + MSE(Dec(F~1), g~1) + MSE(Dec(Mix_a2(F~1, F~2)), a2 g~1 + (1 - a2) g~2)) / 4

In code: x1, x2 the views without t, y1, y2 with it (what the data plane hands out), g1, g2 the clean ones, each in the
geometry of its x; ~ is `mixed`: share * image + (1 - share) * partner, share = lambda; F1 = `first` of the network,
F2 = `second` of the twin; F|t is F with its bottleneck `gated` by t; a1, a2 = `alphas`.

Departures from the official code, with reasons:
- The mixed branches restore the clean image as it was mixed, in the geometry of their input. The official target is the
  crop before flips and rotation, which its input does not show.
- What the conditioned branch restores is the augmented view, as published; `target: clean` takes its clean version, so
  that the branch also removes the noise instead of keeping it.
- All three NCE terms meet the bank as it was before the step; the official code pushes keys between them. So the loss
  is the same however the batch is cut.
- The normaliser is measured over the whole first batch, is part of the checkpoint, and has no gradient.
- Images are restored without a sigmoid, also in 3-D: a store holds z-scores (MR) or HU / 1000 (CT), not [0, 1].
- `standardise` (off as published) takes from the pooled bottleneck what all images have in common. Without it the
  embeddings of a fresh network are almost one (cosine 0.9997 with instance norm, 0.997 with group norm), the bank fills
  with copies of one key, and a fixed normaliser, unlike a softmax, pushes against what is common first of all.
- The gate multiplies the channels of the bottleneck, as the code; the paper's text has an outer product.
- No shuffling of the keys' batch: it is there for the batch norm of several GPUs. With instance or group norm no sample
  knows of another; batch norm sees the whole batch, which order does not change.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kernels import bank_nce
from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts import rigid
from .parts.across_ranks import gather_parts, mean_over_ranks, own_part, rank_and_size
from .parts.crops import check_channels
from .parts.feature_bank import FeatureBank
from .parts.heads import pooled, projector
from .parts.momentum_twin import MomentumTwin
from .parts.monitors import CollapseWatch, EmbeddingMonitor
from .parts.running_standard import RunningStandard, Statistics, forget_standards, standardised
from .views import View, ViewSpec

TARGETS = ("augmented", "clean")
Maps = Sequence[Tensor]


@dataclass
class PcrlViews:
    """The two views, alike but for their boxes; flips and quarter turns are the transform t."""

    crop: list[int] = field(default_factory=lambda: [32, 64, 64])  # D, H, W voxels (H, W for 2-D)
    x1: View = field(default_factory=lambda: View(clean=True))  # the query
    x2: View = field(default_factory=lambda: View(clean=True))  # the key


@dataclass
class PcrlConfig:
    """The paper's symbols: temperature = T, bank_size = K, momentum = m."""

    name: str = "pcrl"
    contrast_weight: float = 1.0
    restoration_weight: float = 1.0
    temperature: float = 0.2  # of the contrast
    bank_size: int = 16384  # keys that are kept
    embedding: int = 128  # channels of a key, and of the projector's hidden layer
    gate_hidden: int = 256  # hidden channels of the gates
    momentum: float = 0.999  # of the momentum encoder
    target: str = "augmented"  # of the conditioned branch: augmented | clean
    standardise: bool = False  # pooled bottlenecks relative to those of the steps before; see above


class Pcrl(Method):
    name = "pcrl"
    Config = PcrlConfig
    Views = PcrlViews
    normalizer: Tensor  # (1,), m0; 0 until it is measured

    def __init__(self, config: PcrlConfig, backbone: BackboneConfig, views: PcrlViews) -> None:
        super().__init__({"contrast": config.contrast_weight, "restoration": config.restoration_weight})
        _check(config, backbone, views)
        self.config = config
        self.backbone = Backbone(backbone)
        channels = self.backbone.encoder_channels[-1]
        self.projector = projector(channels, config.embedding, config.embedding)
        self.gate = nn.Sequential(
            nn.Linear(backbone.dimensions + 4, config.gate_hidden), nn.ReLU(),
            nn.Linear(config.gate_hidden, channels), nn.Sigmoid(),
        )  # fmt: skip
        convolution = nn.Conv3d if backbone.dimensions == 3 else nn.Conv2d
        self.restore = convolution(self.backbone.decoder_channels[-1], 1, kernel_size=1)
        self.backbone_twin = MomentumTwin(self.backbone, config.momentum)  # its decoder is never run
        self.projector_twin = MomentumTwin(self.projector, config.momentum)
        self.bank = FeatureBank(config.bank_size, config.embedding, "uniform")
        self.register_buffer("normalizer", torch.zeros(1))
        self._fixed = False
        self.register_load_state_dict_post_hook(_ask_again)
        self.standard = RunningStandard(channels, momentum=0.95)
        self.monitor = EmbeddingMonitor(config.embedding)
        self.watch = CollapseWatch(
            "lower optimizer.learning_rate" + ("" if config.standardise else ", or set method.standardise=true")
        )
        self.views = ViewSpec(crop=tuple(views.crop), views={"x1": views.x1, "x2": views.x2})

    def check_training(self, global_batch: int, parts: int) -> None:
        keys = 3 * global_batch
        if keys > self.config.bank_size:
            raise ValueError(
                f"method.bank_size: each step pushes 3 keys a sample, {keys} of them, over the "
                f"{self.config.bank_size} of the bank; take at least {keys}, or lower train.global_batch"
            )
        if self._apart and parts > rank_and_size(self.group)[1]:
            raise ValueError(
                "train.accumulation: the statistics of a batch norm are not those of the whole batch in micro-batches; "
                "take train.accumulation=1, or backbone.norm=group"
            )

    def exchange(self, batches: list[Batch], step: int) -> None:
        """Gives each part the images and keys that it is mixed with, which other parts may hold."""
        parts = len(batches) * rank_and_size(self.group)[1]
        if parts == 1:
            return
        images = [self._images(batch) for batch in batches]
        everything = gather_parts(images, self.group)
        order = self._order(step, len(everything)).to(everything.device)
        for part, batch in enumerate(batches):
            batch["partners"] = own_part(everything[order], part, len(batches), self.group)
        if "contrast" in self.weights(step):
            self._exchange_keys(batches, images, order)

    @torch.no_grad()
    def _exchange_keys(self, batches: list[Batch], images: list[Tensor], order: Tensor) -> None:
        known, measured = self._measured(), Batch()
        first: list[Tensor] = []
        if not known:
            first = [pooled(self.backbone.encode(each[:, 0])[-1]) for each in images]
            measured["statistics"] = self._statistics({}, gather_parts(first, self.group), known)
        statistics = self._statistics(measured, self.standard.mean, known)
        if len(batches) == 1:  # of several, the maps are more than the memory may have room for: encoded again
            batches[0]["second"] = self._encode_second(images[0][:, 1])
        maps = (batch["second"] if "second" in batch else self._encode_second(each[:, 1])
                for batch, each in zip(batches, images, strict=True))  # fmt: skip
        keys = [self._key(each, statistics) for each in maps]
        every_key = gather_parts(keys, self.group)
        if not known:
            queries = [self._query(features, statistics) for features in first]
            means = [self._mean_exponential(q, unit(k)) for q, k in zip(queries, keys, strict=True)]
            measured["normalizer"] = self._measure(mean_over_ranks(torch.stack(means).mean(0), self.group))
        for part, batch in enumerate(batches):
            batch["partner_keys"] = own_part(every_key[order], part, len(batches), self.group)
            batch.update(measured)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        share = self._share(step, "mixing")
        images = self._images(batch)
        order = self._order(step, len(images)).to(images.device)
        mixed = mix(share, images, batch["partners"] if "partners" in batch else images[order])

        first, mixed_first = self._encode(self.backbone.encode, images[:, 0], mixed[:, 0])
        with torch.no_grad():
            if "second" in batch:
                second, mixed_second = batch["second"], self._encode_second(mixed[:, 1])
            else:
                second, mixed_second = self._encode(self._encode_second, images[:, 1], mixed[:, 1])

        losses: dict[str, Tensor] = {}
        self.monitors = {}
        if "contrast" in weights:
            known, features = self._measured(), pooled(first[-1])
            statistics = self._statistics(batch, features, known)
            q, q_mixed = self._query(features, statistics), self._query(pooled(mixed_first[-1]), statistics)
            with torch.no_grad():
                k_raw = self._key(second, statistics)
                k, k_mixed = unit(k_raw), unit(self._key(mixed_second, statistics))
                k_mix = unit(mix(share, k_raw, batch["partner_keys"] if "partner_keys" in batch else k_raw[order]))
                normalizer = self._normalizer(batch, q, k, known)
            losses["contrast"] = self.contrast(q, k, q_mixed, k_mixed, k_mix, normalizer)
            self.bank.collect(k, k_mixed, k_mix)
            self.standard.collect(features)
            self.monitor.see(q)
            ratio = losses["contrast"].detach() / collapsed_contrast(self.config.bank_size)
            self.monitors = self.monitor.numbers() | {"loss_over_collapse": ratio, "bank_filled": self.bank.filled()}
        if "restoration" in weights:
            alphas = self._share(step, "first alpha"), self._share(step, "second alpha")
            restored = self._restored(batch, (first, second), (mixed_first, mixed_second), alphas)
            losses["restoration"] = self.restoration(
                restored, self._conditioned_targets(batch), (mixed[:, 2], mixed[:, 3]), alphas
            )
        return {name: weight * losses[name] for name, weight in weights.items()}

    def contrast(
        self, q: Tensor, k: Tensor, q_mixed: Tensor, k_mixed: Tensor, k_mix: Tensor, normalizer: Tensor
    ) -> Tensor:
        """(NCE(q, k) + NCE(q~, k~) + NCE(q~, k_mix)) / 3 of unit vectors (b, C): the mean over all 3 b pairs."""
        return bank_nce(
            torch.cat((q, q_mixed, q_mixed)),
            torch.cat((k, k_mixed, k_mix)),
            self.bank.vectors,
            temperature=self.config.temperature,
            normalizer=normalizer,
            normalize=False,
        )

    def restoration(
        self, restored: Maps, y: tuple[Tensor, Tensor], mixed: tuple[Tensor, Tensor], alphas: tuple[float, float]
    ) -> Tensor:
        """The mean of the four errors: of the conditioned decoder, alone and mixed, and of the mixed one likewise."""
        targets = (y[0], mix(alphas[0], *y), mixed[0], mix(alphas[1], *mixed))
        errors = [functional.mse_loss(image, target) for image, target in zip(restored, targets, strict=True)]
        return torch.stack(errors).mean()

    def after_step(self, step: int) -> None:
        self.backbone_twin.update(self.backbone)
        self.projector_twin.update(self.projector)
        self.bank.push(self.group)
        self.standard.update(self.group)
        self.monitor.update(step, self.group)

    def step_dropped(self) -> None:
        super().step_dropped()
        self._fixed = False  # the first batch may have been the one

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        return self.watch.see(step, numbers)

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The full-resolution features (b, C, *S) of the first view, as it is without its transform; what the mixed
        branch restores of it, Dec(F1)."""
        images = self._images(batch)
        _, maps = self.backbone(images[:, 0])
        found = {"features": maps[-1]}
        if self.schedule.ever("restoration"):
            found |= {"input": images[:, 0], "restored": self.restore(maps[-1]), "target": images[:, 2]}
        return found

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained(None if self.schedule.ever("restoration") else 0)

    def weights_loaded(self, step: int) -> None:
        self.backbone_twin.copy(self.backbone)
        self.bank.forget(self.generator(step, "bank"))
        self.normalizer.zero_()
        self._fixed = False
        forget_standards(self)

    @property
    def _apart(self) -> bool:
        """Whether each set of images has a pass of its own: where a batch norm would mix them."""
        return self.backbone.config.norm == "batch"

    def _images(self, batch: Batch) -> Tensor:
        """x1, x2, g1 and g2 without the transforms: (b, 4, 1, *S)."""
        names = ("x1", "x2", "x1_clean", "x2_clean")
        return torch.stack([rigid.undo(batch[name], *self._transform(batch, name[:2])) for name in names], dim=1)

    def _transform(self, batch: Batch, view: str) -> tuple[Tensor | None, Tensor | None]:
        return batch.get(f"{view}_flips"), batch.get(f"{view}_quarter_turns")

    def _codes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t1 and t2, (b, D + 4)."""
        none = batch["x1"].new_zeros(len(batch["x1"]), self.backbone.config.dimensions, dtype=torch.int64)
        transforms = [self._transform(batch, view) for view in ("x1", "x2")]
        first, second = (
            rigid.code(none if flips is None else flips, none[:, 0] if turns is None else turns)
            for flips, turns in transforms
        )
        return first.to(batch["x1"].dtype), second.to(batch["x1"].dtype)

    def _conditioned_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """y1, y2, with the transforms."""
        suffix = "" if self.config.target == "augmented" else "_clean"
        return batch[f"x1{suffix}"], batch[f"x2{suffix}"]

    def _share(self, step: int, purpose: str) -> float:
        """max(l, 1 - l) of l ~ Beta(1, 1), which is uniform; one for the whole batch."""
        drawn = torch.rand((), generator=self.generator(step, purpose)).item()
        return max(drawn, 1 - drawn)

    def _order(self, step: int, count: int) -> Tensor:
        """The permutation pi of the whole batch: image i is mixed with image pi(i)."""
        return torch.randperm(count, generator=self.generator(step, "partners"))

    def _encode_second(self, images: Tensor) -> Maps:
        """By the twin, whose decoder is not run."""
        maps: Maps = self.backbone_twin(images, 0)[0]
        return maps

    def _encode(self, encode: Callable[[Tensor], Maps], plain: Tensor, mixed: Tensor) -> tuple[Maps, Maps]:
        if self._apart:
            return encode(plain), encode(mixed)
        both = [level.chunk(2) for level in encode(torch.cat((plain, mixed)))]
        return [level[0] for level in both], [level[1] for level in both]

    def _restored(
        self, batch: Batch, plain: tuple[Maps, Maps], mixed: tuple[Maps, Maps], alphas: tuple[float, float]
    ) -> Maps:
        """Dec(F1|t1), Dec(Mix_a1(F1|t1, F2|t2)), Dec(F~1), Dec(Mix_a2(F~1, F~2))."""
        first, second = (
            [*maps[:-1], maps[-1] * self.gate(t).view(*maps[-1].shape[:2], *[1] * (maps[-1].ndim - 2))]
            for maps, t in zip(plain, self._codes(batch), strict=True)
        )
        inputs = [first, mix_maps(alphas[0], first, second), mixed[0], mix_maps(alphas[1], *mixed)]
        if self._apart:
            return [self.restore(self.backbone.decode(maps)[-1]) for maps in inputs]
        together = [torch.cat(level) for level in zip(*inputs, strict=True)]
        return self.restore(self.backbone.decode(together)[-1]).chunk(4)

    def _query(self, features: Tensor, statistics: Statistics | None) -> Tensor:
        return unit(self.projector(features if statistics is None else standardised(features, statistics)))

    def _key(self, maps: Maps, statistics: Statistics | None) -> Tensor:
        """k before it is made unit length."""
        features = pooled(maps[-1])
        key: Tensor = self.projector_twin(features if statistics is None else standardised(features, statistics))
        return key

    def _measured(self) -> bool:
        """Whether a first batch has fixed the normaliser and the first statistics; the device is asked once."""
        if not self._fixed:
            self._fixed = self.normalizer.item() > 0
        return self._fixed

    def _statistics(self, batch: Batch, features: Tensor, known: bool) -> Statistics | None:
        if not self.config.standardise:
            return None
        if known:
            return self.standard.statistics
        return batch["statistics"] if "statistics" in batch else self.standard.measure(features)

    def _normalizer(self, batch: Batch, q: Tensor, k: Tensor, known: bool) -> Tensor:
        """m0; that of this batch where none has been measured."""
        if known:
            return self.normalizer
        return batch["normalizer"] if "normalizer" in batch else self._measure(self._mean_exponential(q, k))

    def _mean_exponential(self, q: Tensor, k: Tensor) -> Tensor:
        """The mean of exp(<q, v> / T) over the positive and the bank, (1,)."""
        q = q.double()
        positives = (q * k.double()).sum(1, keepdim=True)
        similarities = torch.cat((positives, q @ self.bank.vectors.double().T), dim=1)
        return (similarities / self.config.temperature).exp().mean().reshape(1)

    def _measure(self, mean: Tensor) -> Tensor:
        """Fixes m0 in training; elsewhere it serves one batch alone."""
        mean = mean.to(self.normalizer.dtype)
        if self.training:
            self.normalizer.copy_(mean)
        return mean


def _ask_again(method: Pcrl, _: object) -> None:
    method._fixed = False


def unit(vectors: Tensor) -> Tensor:
    """float32 at least."""
    return functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)


def mix(share: float, one: Tensor, other: Tensor) -> Tensor:
    return share * one + (1 - share) * other


def mix_maps(share: float, ones: Maps, others: Maps) -> Maps:
    """Mix_a: the bottleneck and every skip."""
    return [mix(share, one, other) for one, other in zip(ones, others, strict=True)]


def collapsed_contrast(size: int) -> float:
    """The least contrast of keys that are all equal: ln(K + 1) + K ln(1 + 1 / K), where every r is 1."""
    return math.log(size + 1) + size * math.log1p(1 / size)


def _check(config: PcrlConfig, backbone: BackboneConfig, views: PcrlViews) -> None:
    backbone.check_size(views.crop, "views.crop")
    check_channels(backbone)
    for name, view in (("x1", views.x1), ("x2", views.x2)):
        if not view.clean:
            raise ValueError(f"views.{name}.clean: the clean view is what is restored; set it to true")
        if view.size is not None and list(view.size) != list(views.crop):
            raise ValueError(
                f"views.{name}.size: both views are mixed and so have the size of views.crop, {list(views.crop)}, "
                f"got {list(view.size)}; leave it out"
            )
        if view.quarter_turns and views.crop[-1] != views.crop[-2]:
            side = min(views.crop[-2:])
            raise ValueError(
                f"views.crop: quarter turns need equal last two sides, got {list(views.crop[-2:])}; "
                f"take {[*views.crop[:-2], side, side]}, or views.{name}.quarter_turns=false"
            )
    for name in ("bank_size", "embedding", "gate_hidden"):
        if getattr(config, name) < 1:
            raise ValueError(f"method.{name}: expected at least 1, got {getattr(config, name)}")
    if not 0 < config.temperature < math.inf:
        raise ValueError(
            f"method.temperature: expected a finite number, more than 0, got {config.temperature}; take 0.2"
        )
    if not 0 <= config.momentum < 1:
        raise ValueError(f"method.momentum: expected 0 up to less than 1, got {config.momentum}; take 0.999")
    if config.target not in TARGETS:
        raise ValueError(f"method.target: {config.target!r} is not one of {', '.join(TARGETS)}")
