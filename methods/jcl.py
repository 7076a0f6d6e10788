"""JCL, later MACL: multi-level asymmetric contrastive learning (Zeng et al., 2023 and JBHI 2026), in 2-D and 3-D.

An encoder learns at two scales at once. The auxiliary branch sees an image as it is, the dominant branch the same image
several times smaller, through the same encoder and the first blocks of the decoder, whose map then has the grid of the
auxiliary branch's last encoder map. Three levels are compared: whole images, each place of those maps, and the
encoder's own answers to the two scales. So encoder and decoder are pretrained together.

    auxiliary  i1, v1  Y_a = encoder(i1)  pixels a = pixel_projector(Y_a)  image a = auxiliary_projector(encoder(v1))
    dominant   i2, v2  Y_d = encoder(i2)  pixels b = decoder(i2)           image b = dominant_projector(decoder(v2))

    L = w_g L_g + w_d L_d + w_e L_ER
    L_g  = PC(images a, images b)                                            PC: see `parts/positional_contrast.py`
    L_d  = 1/S sum_s PC(pixels a at s, pixels b at s)                        at the S places of the map
    L_ER = mean |down(Y_a) - Y_d|                                            down: to the dominant branch's size

i1 and i2 show the same place (`views.invariant`, no geometry), v1 and v2 each a transform of its own
(`views.varying`); i2 and v2 are `views.dominant_scale` as large: 1/4 with two blocks of the decoder, 1/2 with one.

A place is contrasted with the same place of other images alone: 2B - 2 negatives. In 3-D, where few volumes fit into a
batch, that is little, and what is told apart at a place is hardly more than whose volume it is; the more ranks share
a batch the better.

The official backbone has batch norm, over all GPUs; CPU ranks cannot share it, nor do nnU-Net's plans know it. Instance
and group norm take its own mean from every image: embeddings of images begin all but equal, and at the image level stay
so (measured; the monitors say it). With `standardise` both projectors are preceded by running averages, which take away
what the pooled maps have in common: the embeddings stay apart, and the image level learns, slower than with batch norm.

Departures from the official code, with reasons:
- Negatives come from all ranks, so that a result does not depend on how many there are (`negatives: local` for theirs).
- The places are S problems of one call, where the code loops over them.
- The decoder runs the blocks that are trained; the code runs four and discards two, and saves those, at their initial
  values, as pretrained. Ours are named (`untrained`) and left out downstream.
- Views of one size share one forward, with batch norm their statistics: two forwards in all, where the code runs four.
- `standardise` and instance norm in the recipes `-tiny` and `-3d`, for the reasons above.
- Images and maps shrink with voxel cells aligned and the images without aliasing (the code: corners aligned), so that
  a voxel of the small one is the region of the large one that the strided convolutions make it answer for.
- Of code and paper, which differ: the image vector of the dominant branch comes from the decoder, and the denominator
  runs over both branches, as in the code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts.crops import check_crop
from .parts.heads import pooled, projector
from .parts.monitors import REMEDY, CollapseWatch, EmbeddingMonitor
from .parts.positional_contrast import ContrastConfig, PositionalContrast
from .parts.running_standard import update_standards
from .pcl import check_place, enlarged
from .views import Boxes, View, ViewSpec


@dataclass
class JCLViews:
    crop: list[int] = field(default_factory=lambda: [64, 96, 96])  # D, H, W voxels (H, W of slices), of the large views
    invariant: View = field(default_factory=View)  # i1, i2: appearance alone
    varying: View = field(default_factory=View)  # v1, v2
    dominant_scale: float = 0.25  # size of i2 and v2; lengths of the two views above shrink with it


@dataclass
class JCLConfig(ContrastConfig):
    name: str = "jcl"
    decoder_blocks: int = 2  # that are trained, from the bottleneck up
    channels: int = 128  # of the image vectors
    global_weight: float = 1.0
    dense_weight: float = 0.5
    consistency_weight: float = 1.0
    standardise: bool = False  # pooled maps before the projectors; see parts/running_standard.py


class PixelProjector(nn.Sequential):
    """Twice convolution, norm (the backbone's kind), leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, backbone: BackboneConfig) -> None:
        flat = backbone.dimensions == 2
        convolution: type[nn.Module] = nn.Conv2d if flat else nn.Conv3d
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers.append(convolution(width, outputs, 3, padding=1, bias=False))
            if backbone.norm == "group":
                layers.append(nn.GroupNorm(max(1, outputs // 8), outputs))
            elif backbone.norm == "batch":
                layers.append(nn.BatchNorm2d(outputs) if flat else nn.BatchNorm3d(outputs))
            else:
                layers.append((nn.InstanceNorm2d if flat else nn.InstanceNorm3d)(outputs, affine=True))
            layers.append(nn.LeakyReLU(backbone.negative_slope))
        super().__init__(*layers)


class JCL(Method):
    name = "jcl"
    reads_parameters = False
    Config = JCLConfig
    Views = JCLViews

    def __init__(self, config: JCLConfig, backbone: BackboneConfig, views: JCLViews) -> None:
        super().__init__(
            {"global": config.global_weight, "dense": config.dense_weight, "consistency": config.consistency_weight}
        )
        check_scale(config, views)
        check_crop(views.crop, backbone, shrunk=2**config.decoder_blocks)
        check_place("views.varying", views.varying, views.crop, config)
        self.config = config
        self.contrast = PositionalContrast(config, views.crop)
        self.backbone = Backbone(backbone, config.decoder_blocks)
        last, decoded = self.backbone.encoder_channels[-1], self.backbone.decoder_channels[config.decoder_blocks]
        self.pixel_projector = PixelProjector(last, decoded, backbone)
        self.auxiliary_projector = projector(last, decoded, config.channels, config.standardise)
        self.dominant_projector = projector(decoded, decoded, config.channels, config.standardise)
        self.embeddings = EmbeddingMonitor(config.channels)
        self.dense_embeddings = EmbeddingMonitor(decoded)
        of_images = REMEDY + ("" if config.standardise else ", or set method.standardise=true")
        self.watches = CollapseWatch(of_images), CollapseWatch(REMEDY, "dense_")
        small = [round(size * views.dominant_scale) for size in views.crop]
        self.views = ViewSpec(
            crop=tuple(views.crop),
            views={
                "i1": replace(views.invariant),
                "i2": shrunk(views.invariant, small, views.dominant_scale),
                "v1": replace(views.varying),
                "v2": shrunk(views.varying, small, views.dominant_scale),
            },
        )

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        # The branches take invariant and varying views together; a stage without a term goes without its views.
        kinds = [kind for kind, terms in (("i", {"dense", "consistency"}), ("v", {"global"})) if terms & set(weights)]
        auxiliary = self.backbone.encode(torch.cat([batch[kind + "1"] for kind in kinds]))[-1]
        maps = self.backbone.encode(torch.cat([batch[kind + "2"] for kind in kinds]))
        aux = dict(zip(kinds, auxiliary.chunk(len(kinds)), strict=True))
        dominant = dict(zip(kinds, maps[-1].chunk(len(kinds)), strict=True))
        decoded: dict[str, Tensor] = {}
        if "global" in weights or "dense" in weights:
            decoded = dict(zip(kinds, self.backbone.decode(maps)[-1].chunk(len(kinds)), strict=True))

        positions = self.contrast.positions(batch["position"], self.group)
        self.monitors = {"positives": self.contrast.positives(positions, self.group)}
        losses: dict[str, Tensor] = {}
        if "global" in weights:
            images = torch.cat(
                (self.auxiliary_projector(pooled(aux["v"])), self.dominant_projector(pooled(decoded["v"])))
            )
            losses["global"] = self.contrast.loss(images, positions, self.group)
            self._monitor(self.embeddings, images[len(positions) :], losses["global"])
        if "dense" in weights:
            pixels = per_place(torch.cat((self.pixel_projector(aux["i"]), decoded["i"])))
            losses["dense"] = self.contrast.loss(pixels, positions, self.group)
            self._monitor(self.dense_embeddings, middle(decoded["i"]), losses["dense"], "dense_")
        if "consistency" in weights:
            losses["consistency"] = consistency(aux["i"], dominant["i"])
        return {name: weight * losses[name] for name, weight in weights.items()}

    def after_step(self, step: int) -> None:
        update_standards(self, self.group)
        self.embeddings.update(step, self.group)
        self.dense_embeddings.update(step, self.group)

    def check_training(self, global_batch: int, parts: int) -> None:
        self.contrast.check_training(global_batch, parts, self.group)

    def check_volumes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.contrast.check_volumes(shapes)

    def advice(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        return self.contrast.advice(shapes)

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        found = [watch.see(step, numbers) for watch in self.watches]
        return "; ".join(line for line in found if line) or None

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The decoder's map of the full-size image, enlarged to it (B, C, *S)."""
        decoded = self.backbone.decode(self.backbone.encode(batch["i1"]))[-1]
        return {"features": enlarged(decoded, batch["i1"])}

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        decodes = self.schedule.ever("global") or self.schedule.ever("dense")
        return self.backbone.untrained(None if decodes else 0)

    @torch.no_grad()
    def _monitor(self, window: EmbeddingMonitor, vectors: Tensor, loss: Tensor, prefix: str = "") -> None:
        window.see(vectors)
        self.monitors |= {prefix + name: value for name, value in window.numbers().items()}
        collapsed = self.contrast.collapsed(len(vectors), self.group)
        if collapsed:
            self.monitors[prefix + "loss_over_collapse"] = loss.detach() / collapsed


def per_place(maps: Tensor) -> Tensor:
    """(N, C, *S) -> (places, N, C)."""
    return maps.flatten(2).permute(2, 0, 1)


def middle(maps: Tensor) -> Tensor:
    """The vectors (N, C) at one place: at each the contrast is that of a whole batch of images."""
    place: list[Any] = [size // 2 for size in maps.shape[2:]]
    return maps[(..., *place)]


def consistency(auxiliary: Tensor, dominant: Tensor) -> Tensor:
    """mean |down(Y_a) - Y_d|, float32 at least."""
    mode = "trilinear" if auxiliary.ndim == 5 else "bilinear"
    down = functional.interpolate(auxiliary, size=dominant.shape[2:], mode=mode, align_corners=False)
    precise = torch.promote_types(down.dtype, torch.float32)
    return (down.to(precise) - dominant.to(precise)).abs().mean()


def check_scale(config: JCLConfig, views: JCLViews) -> None:
    """Refuses scales that bring the branches to different grids, and invariant views that vary."""
    blocks, scale = config.decoder_blocks, views.dominant_scale
    if blocks < 1:
        raise ValueError(f"method.decoder_blocks: expected at least 1, got {blocks}; the paper's are 2")
    if scale != 0.5**blocks:
        fitting = round(-math.log2(scale)) if 0 < scale < 1 else 0
        other = f", or method.decoder_blocks={fitting}" if fitting > 0 and scale == 0.5**fitting else ""
        raise ValueError(
            f"views.dominant_scale: expected {0.5**blocks} with method.decoder_blocks={blocks}, got {scale}; the "
            f"decoder's map must have the grid of the full-size image's last encoder map; take {0.5**blocks}{other}"
        )
    changed = [name for name in ("size", "box", "affine", "elastic", "flips", "quarter_turns")
               if getattr(views.invariant, name)]  # fmt: skip
    if changed:
        raise ValueError(
            f"views.invariant.{changed[0]}: these views are compared place by place and must show the same; leave it "
            "out, or give it to views.varying"
        )
    if views.varying.size:
        raise ValueError(f"views.varying.size: follows from views.crop, got {views.varying.size}; leave it out")


def shrunk(view: View, size: list[int], scale: float) -> View:
    """The view at a smaller size: its lengths in voxels of the view shrink with it."""
    affine, elastic, appearance = view.affine, view.elastic, view.appearance
    if affine is not None:
        affine = replace(affine, translation_voxels=affine.translation_voxels * scale)
    if elastic is not None:
        elastic = replace(
            elastic,
            spacing_voxels=elastic.spacing_voxels * scale,
            magnitude_voxels=[length * scale for length in elastic.magnitude_voxels],
        )
    if appearance is not None:
        steps = {name: step for name, step in vars(appearance).items() if isinstance(step, Boxes)}
        smaller = {
            name: replace(
                step, side_voxels=[[max(1, round(side * scale)) for side in pair] for pair in step.side_voxels]
            )
            for name, step in steps.items()
        }
        blur = replace(appearance.blur, sigma_voxels=[sigma * scale for sigma in appearance.blur.sigma_voxels])
        appearance = replace(appearance, blur=blur, **smaller)  # type: ignore[arg-type]
    return replace(view, size=size, affine=affine, elastic=elastic, appearance=appearance)
