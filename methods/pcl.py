"""PCL: positional contrastive learning (Zeng et al., MICCAI 2021), in 2-D and 3-D.

Slices from nearly the same place along a volume show nearly the same anatomy, whoever's volume it is. Two views of
each slice are encoded, and those whose slices lie less than a threshold t apart, as shares of their volumes' extent,
are positives of each other; all others of the batch are negatives. Only the encoder is pretrained.

    z = projector(mean over the pixels of the encoder's last map)
    L = scale/2B sum_i [log sum_{a != i} exp(s_ia) - 1/|P(i)| sum_{j in P(i)} s_ij]      s_ij = cos(z_i, z_j) / tau
    P(i) = {j != i : |pos_j - pos_i| < t}

tau = temperature, t = threshold, scale = loss_scale. In 3-D a sample is a slab, and its position that of its centre.

Departures from the official code, with reasons:
- Negatives come from all ranks, as in their code, whose loss sees the gathered batch of all GPUs; `negatives: local`
  keeps to each rank's own.
- Both views pass through the encoder in one forward; with batch norm they share their statistics, where the code runs
  one forward a view.
- The position of slice i of n is i/(n-1) where theirs is (i+1)/n: both ends are the same for thick and thin volumes.
- The last level has the norm of the others; theirs has none.
- A run at the paper's learning rate collapses: the monitors say so, and the recipes have another (see there).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts.crops import check_crop
from .parts.heads import pooled, projector
from .parts.monitors import REMEDY, CollapseWatch, EmbeddingMonitor
from .parts.positional_contrast import ContrastConfig, PositionalContrast
from .views import View, ViewSpec


@dataclass
class PCLViews:
    crop: list[int] = field(default_factory=lambda: [16, 96, 96])  # D, H, W voxels of the slab; H, W of slices
    view: View = field(default_factory=View)  # each of the two


@dataclass
class PCLConfig(ContrastConfig):
    name: str = "pcl"
    hidden: int | None = None  # of the projector; as many as the last map has channels if not given
    channels: int = 512  # of z
    contrast_weight: float = 1.0


class PCL(Method):
    name = "pcl"
    reads_parameters = False
    Config = PCLConfig
    Views = PCLViews

    def __init__(self, config: PCLConfig, backbone: BackboneConfig, views: PCLViews) -> None:
        super().__init__({"contrast": config.contrast_weight})
        if views.view.size is None:
            check_crop(views.crop, backbone)
        else:
            check_crop(views.view.size, backbone, name="views.view.size")
        check_place("views.view", views.view, views.crop, config)
        self.config = config
        self.contrast = PositionalContrast(config, views.crop)
        self.backbone = Backbone(backbone, decoder_blocks=0)
        width = self.backbone.encoder_channels[-1]
        self.projector = projector(width, config.hidden or width, config.channels)
        self.embeddings = EmbeddingMonitor(config.channels)
        self.watch = CollapseWatch(REMEDY)
        self.views = ViewSpec(crop=tuple(views.crop), views={"x1": replace(views.view), "x2": replace(views.view)})

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        embeddings = self.embed(torch.cat((batch["x1"], batch["x2"])))
        positions = self.contrast.positions(batch["position"], self.group)
        losses = {"contrast": self.contrast.loss(embeddings, positions, self.group)}
        self._monitor(embeddings, positions, losses["contrast"])
        return {name: weight * losses[name] for name, weight in self.weights(step).items()}

    def embed(self, images: Tensor) -> Tensor:
        """z of images (N, 1, *S): (N, channels)."""
        embeddings: Tensor = self.projector(pooled(self.backbone.encode(images)[-1]))
        return embeddings

    def after_step(self, step: int) -> None:
        self.embeddings.update(step, self.group)

    def check_training(self, global_batch: int, parts: int) -> None:
        self.contrast.check_training(global_batch, parts, self.group)

    def check_volumes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.contrast.check_volumes(shapes)

    def advice(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        return None if self.views.views["x1"].box else self.contrast.advice(shapes)

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        return self.watch.see(step, numbers)

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The encoder's last map of the first view, enlarged to the view (B, C, *S)."""
        last = self.backbone.encode(batch["x1"])[-1]
        return {"features": enlarged(last, batch["x1"])}

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained()

    @torch.no_grad()
    def _monitor(self, embeddings: Tensor, positions: Tensor, contrast: Tensor) -> None:
        self.embeddings.see(embeddings[: len(positions)])
        self.monitors = {"positives": self.contrast.positives(positions, self.group), **self.embeddings.numbers()}
        collapsed = self.contrast.collapsed(len(positions), self.group)
        if collapsed:
            self.monitors["loss_over_collapse"] = contrast.detach() / collapsed


def check_place(key: str, view: View, crop: Sequence[int], config: ContrastConfig) -> None:
    """Refuses a view that would show another place than the position says."""
    if view.box is not None and len(crop) == 3 and config.positives != "own":
        raise ValueError(
            f"{key}.box: in 3-D a box lies anywhere along the first axis, and the position would not be its own; leave "
            f"it out and let {key}.affine move and scale the view, or take method.positives=own"
        )


def enlarged(features: Tensor, image: Tensor) -> Tensor:
    """A map at the resolution of the image that it was made from."""
    mode = "trilinear" if image.ndim == 5 else "bilinear"
    return functional.interpolate(features.float(), size=image.shape[2:], mode=mode, align_corners=False)
