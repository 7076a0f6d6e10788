"""PCRLv2: a unified visual information preservation framework (Zhou et al., TPAMI 2023), in 2-D and 3-D.

The features of every decoder scale tell the image (two global views and some small local ones agree in them, as in
SimSiam: no negatives, no momentum encoder, no bank) and keep it (the clean image is restored from them). The decoder
has no skip connections, so that everything passes through all scales.

    L = MSE(out(x1), g1)                                        restoration
        + sim_s(x1, x2)                                         similarity
        + beta MSE(mid_s(x1), g1)                               mid_restoration: the same s; beta = its weight
        + 1/(2 n) sum over n local views l, v = 1, 2 of sim_r(l, xv)      local_similarity: an r for each (l, v)
    sim_s(a, b) = -(cos(p_a, sg z_b) + cos(p_b, sg z_a)) / 2
    z = BN(GAP(map of scale s)), p = predictor(z);  s and the 2 n r uniform over the scales, drawn anew in each step

In code: g1 = x1_clean, a `Scale` holds BN, predictor and image head of one decoder map, beta is the weight of
`mid_restoration` (recipes: a stage whose weight falls from 1 to 0 as a cosine).

Departures from the official code, with reasons:
- The encoder starts from the seed's weights; the official 2-D one from ImageNet's, which nobody mentions.
- Images are restored without a sigmoid: a store holds z-scores (MR) or HU / 1000 (CT), not [0, 1]. The 3-D image heads
  have no batch norm either: of one channel it would set the contrast of the whole batch.
- Scales that are not drawn have no image computed. Of the second view and the local ones only the blocks are run
  that the drawn scales need; with a batch norm in the backbone each view has a pass of its own, as in the code.
- Batch norms of the heads see the whole batch, on however many ranks.
- The official code leaves out 3-D steps with a loss above 1000; here those whose loss is not finite.
  A few of them in a row end the run.
- The decoder is exported as well; the official 2-D code saves the encoder alone. Its kernels for skips have no
  gradient, so they are the initial ones but for weight decay: adamw and sgd scale them down, adam drives them to 0.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts.across_ranks import rank_and_size
from .parts.batch_norm import GlobalBatchNorm
from .parts.crops import check_channels
from .parts.heads import Predictor, pooled
from .parts.monitors import CollapseWatch, EmbeddingMonitor
from .stages import Stage
from .views import View, ViewSpec

Maps = Sequence[Tensor]
Embedding = tuple[Tensor, Tensor]  # p and z
Embeddings = Mapping[int, Embedding]  # by scale


@dataclass
class PcrlV2Views:
    """Two global views, the first with its clean version, and `local_count` local ones that are drawn alike."""

    crop: list[int] = field(default_factory=lambda: [32, 64, 64])  # D, H, W voxels (H, W for 2-D)
    x1: View = field(default_factory=lambda: View(clean=True))  # the first global view
    x2: View = field(default_factory=View)  # the second
    local: View = field(default_factory=lambda: View(size=[16, 16, 16]))  # each of the local ones
    local_count: int = 6  # local views a sample


@dataclass
class PcrlV2Config:
    name: str = "pcrlv2"
    restoration_weight: float = 1.0
    similarity_weight: float = 1.0
    mid_restoration_weight: float = 1.0  # beta, where no stage says otherwise
    local_similarity_weight: float = 1.0
    predictor_width: int = 2  # hidden channels of a predictor, in those of its map


class Scale(nn.Module):
    """The heads of one decoder map."""

    def __init__(self, channels: int, backbone: BackboneConfig, width: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(channels)
        self.predictor = Predictor(channels, width * channels)
        # Batch norm as the code has it only where the backbone has it too: groups do not know how the batch is cut.
        norm = nn.BatchNorm2d(channels) if backbone.norm == "batch" else nn.GroupNorm(max(1, channels // 8), channels)
        self.image: nn.Module = (
            nn.Conv3d(channels, 1, 3, padding=1)
            if backbone.dimensions == 3
            else nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm, nn.ReLU(), nn.Conv2d(channels, 1, 1)
            )
        )

    def embed(self, features: Tensor, group: object) -> Embedding:
        z = self.norm(pooled(features), group)
        return self.predictor(z, group), z

    def restored(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """mid_s: the image at full size."""
        mode = "trilinear" if features.ndim == 5 else "bilinear"
        return functional.interpolate(self.image(features), size=tuple(size), mode=mode, align_corners=False)


class PcrlV2(Method):
    name = "pcrlv2"
    reads_parameters = False
    Config = PcrlV2Config
    Views = PcrlV2Views

    def __init__(self, config: PcrlV2Config, backbone: BackboneConfig, views: PcrlV2Views) -> None:
        super().__init__(
            {
                "restoration": config.restoration_weight,
                "similarity": config.similarity_weight,
                "mid_restoration": config.mid_restoration_weight,
                "local_similarity": config.local_similarity_weight,
            }
        )
        _check(config, backbone, views)
        self.config = config
        self.local_names = [f"local{index}" for index in range(1, views.local_count + 1)]
        self.backbone = Backbone(backbone)
        channels = self.backbone.decoder_channels[1:]
        self.scales = nn.ModuleList(Scale(each, backbone, config.predictor_width) for each in channels)
        convolution = nn.Conv3d if backbone.dimensions == 3 else nn.Conv2d
        self.restore = convolution(channels[-1], 1, kernel_size=1)
        self.monitor = EmbeddingMonitor(channels[0])
        self.watch = CollapseWatch("lower optimizer.learning_rate, or raise train.global_batch")
        self.views = ViewSpec(
            crop=tuple(views.crop),
            views={"x1": views.x1, "x2": views.x2, **dict.fromkeys(self.local_names, views.local)},
        )

    def set_stages(self, stages: Sequence[Stage], steps: int) -> None:
        super().set_stages(stages, steps)
        if not self.local_names and self.schedule.ever("local_similarity"):
            raise ValueError(
                "views.local_count: a stage has the term local_similarity, which needs at least 1 local view, got 0; "
                "take 6, or leave the term out"
            )

    def check_training(self, global_batch: int, parts: int) -> None:
        if global_batch < 2:
            raise ValueError(
                f"train.global_batch: the heads' batch norms compare the samples of a batch, got {global_batch}; "
                "take 2 or more"
            )
        if parts > rank_and_size(self.group)[1]:
            raise ValueError(
                "train.accumulation: the statistics of the heads' batch norms are those of the whole batch, which "
                "micro-batches do not know of each other; take train.accumulation=1"
            )

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        s = self._drawn_scales(step, "similarity", 1)[0]
        r = self._drawn_scales(step, "local_similarity", 2 * len(self.local_names))
        compared = ({s} if "similarity" in weights else set()) | (set(r) if "local_similarity" in weights else set())
        x1, x2, local = self._maps(batch, weights, compared, s)
        views = [self._embed(maps, compared) for maps in (x1, x2)]
        g1 = batch["x1_clean"]
        losses = {}
        if "restoration" in weights:
            losses["restoration"] = functional.mse_loss(self.restore(x1[-1]), g1)
        if "similarity" in weights:
            losses["similarity"] = similarity(views[0][s], views[1][s]) + self._unused("embed", {s})
        if "mid_restoration" in weights:
            image = self._heads(s).restored(x1[s], g1.shape[2:])
            losses["mid_restoration"] = functional.mse_loss(image, g1) + self._unused("image", {s})
        if "local_similarity" in weights:
            embedded = self._embed(local, set(r))
            losses["local_similarity"] = local_similarity(embedded, views, r) + self._unused("embed", set(r))
        with torch.no_grad():
            self.monitor.see(self._heads(0).norm.frozen(pooled(x1[0]).float()))
        self.monitors = self.monitor.numbers()
        return {name: weight * losses[name] for name, weight in weights.items()}

    def after_step(self, step: int) -> None:
        self.monitor.update(step, self.group)

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        return self.watch.see(step, numbers)

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The full-resolution features of the first view (b, C, *S), and the image restored from them (b, 1, *S)."""
        _, maps = self.backbone(batch["x1"])
        found = {"features": maps[-1]}
        return found | {"restored": self.restore(maps[-1])} if self.schedule.ever("restoration") else found

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained()

    def _heads(self, scale: int) -> Scale:
        heads = self.scales[scale]
        assert isinstance(heads, Scale)
        return heads

    def _drawn_scales(self, step: int, purpose: str, count: int) -> list[int]:
        """The scales of a term, the same for the whole batch."""
        drawn: list[int] = torch.randint(len(self.scales), (count,), generator=self.generator(step, purpose)).tolist()
        return drawn

    def _maps(self, batch: Batch, weights: Mapping[str, float], compared: Set[int], s: int) -> tuple[Maps, Maps, Maps]:
        """Decoder maps by scale of x1, x2 and all local views, as far as the active terms look at them.

        Args:
            compared: the scales in which views are compared.
            s: that of mid_restoration.
        """
        far = max(compared, default=-1) + 1
        blocks = [max(1, far), far]
        if "restoration" in weights:
            blocks[0] = len(self.scales)
        if "mid_restoration" in weights:
            blocks[0] = max(blocks[0], s + 1)
        images = [batch["x1"], batch["x2"]] if blocks[1] else [batch["x1"]]
        if len(images) == 1 or self.backbone.config.norm == "batch":
            encoded = [self.backbone.encode(image) for image in images]
        else:
            both = [level.chunk(2) for level in self.backbone.encode(torch.cat(images))]
            encoded = [list(maps) for maps in zip(*both, strict=True)]
        x1, *others = (self.backbone.decode(maps, count)[1:] for maps, count in zip(encoded, blocks, strict=False))
        local: Maps = []
        if "local_similarity" in weights:
            local = self.backbone(torch.cat([batch[name] for name in self.local_names]), far)[1][1:]
        return x1, others[0] if others else [], local

    def _embed(self, maps: Maps, scales: Set[int]) -> Embeddings:
        return {scale: self._heads(scale).embed(maps[scale], self.group) for scale in sorted(scales)}

    def _unused(self, part: str, drawn: Set[int]) -> Tensor:
        """0, with gradients of 0 for the heads that this step has not drawn: what an optimizer does to a parameter
        without gradient depends on the number of ranks."""
        heads = {"embed": ("norm", "predictor"), "image": ("image",)}[part]
        unused = [
            parameter.flatten()[:1].sum()
            for index, scale in enumerate(self.scales)
            for head in heads
            if index not in drawn
            for parameter in named_one_by_one(getattr(scale, head))
        ]
        return 0.0 * torch.stack(unused).sum() if unused else torch.zeros((), device=self.restore.weight.device)


def named_one_by_one(module: nn.Module) -> Iterator[nn.Parameter]:
    """A module's parameters, each asked for by its name: under ZeRO 3 that gathers one for who is not its layer."""
    for each in module.modules():
        for name, _ in each.named_parameters(recurse=False):
            yield getattr(each, name)


def similarity(a: Embedding, b: Embedding) -> Tensor:
    """-(cos(p_a, sg z_b) + cos(p_b, sg z_a)) / 2, the mean over the samples; each (p, z) of shape (b, C)."""
    (p_a, z_a), (p_b, z_b) = a, b
    return -(cosine(p_a, z_b.detach()) + cosine(p_b, z_a.detach())).mean() / 2


def local_similarity(local: Embeddings, views: Sequence[Embeddings], scales: Sequence[int]) -> Tensor:
    """The mean of `similarity` over all pairs of a local and a global view, each at a scale of its own.

    Args:
        local: p and z of shape (n b, C), view after view.
        views: of each global view, (b, C).
        scales: of the pairs, n len(views) of them: the first local view with each global one, then the second.
    """
    count = len(scales) // len(views)
    pairs = []
    for pair, scale in enumerate(scales):
        p, z = (each.chunk(count)[pair // len(views)] for each in local[scale])
        pairs.append(similarity((p, z), views[pair % len(views)][scale]))
    return torch.stack(pairs).mean()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """float32 at least."""
    dtype = torch.promote_types(one.dtype, torch.float32)
    return functional.cosine_similarity(one.to(dtype), other.to(dtype), dim=1)


def _check(config: PcrlV2Config, backbone: BackboneConfig, views: PcrlV2Views) -> None:
    if backbone.skips:
        raise ValueError("backbone.skips: PCRLv2 restores from the bottleneck alone; set it to false")
    check_channels(backbone)
    backbone.check_size(views.crop, "views.crop")
    if not views.x1.clean:
        raise ValueError("views.x1.clean: the clean view is what is restored; set it to true")
    for name, view in (("x1", views.x1), ("x2", views.x2)):
        if view.size is not None and list(view.size) != list(views.crop):
            raise ValueError(
                f"views.{name}.size: both global views have the size of views.crop, {list(views.crop)}, "
                f"got {list(view.size)}; leave it out"
            )
    if config.local_similarity_weight and views.local_count < 1:
        raise ValueError(
            f"views.local_count: expected at least 1, got {views.local_count}; "
            "take 6, or method.local_similarity_weight=0"
        )
    if views.local_count:
        backbone.check_size(views.crop if views.local.size is None else views.local.size, "views.local.size")
    if config.predictor_width < 1:
        raise ValueError(f"method.predictor_width: expected at least 1, got {config.predictor_width}; take 2")
