"""COVER: vector contrastive learning (He et al., ICCV 2025), in 3-D and 2-D.

One image gives two views: `fixed` is the image under a random affine field psi, `moving` the image under a change of
appearance. From the features of both a pyramid of local correlations regresses psi itself, voxel by voxel; a cosine
term pulls corresponding features together. Nothing is pushed apart by hand: to tell neighbours apart is what the
regression needs.

    fixed(p) = image(p + psi(p))            L = w_v L_vec + w_c L_con
    L_vec = sum_p eps(p) |psi'(p) - psi(p)|_1 / sum_p eps(p)                       psi' from `vector_pyramid`
    L_con = 1 - sum_p eps(p) cos(f_fixed(p), W(f_moving, psi)(p)) / sum_p eps(p)   f = the full-resolution map

eps is 1 where p + psi(p) lies inside the crop and the volume.

Departures from the official code, with reasons:
- One convention throughout: voxel units, voxel centres, a zero field is exactly the identity. The official sampler
  mixes two grid conventions, so that a zero field shifts by up to half a voxel.
- Fields are upsampled with voxel cells aligned (factor exactly 2), as strided and transposed convolutions align the
  maps themselves; with aligned corners the factor would be (2n-1)/(n-1), not the 2 that the vectors are scaled by.
- The radius is the recipe's (the official code ignores it), and a transform that the pyramid cannot reach is refused
  (`max_unreachable`): with the official ranges 85 % of the valid pixels move further than the pyramid can say.
- The heads' 1x1 convolution comes before the warp instead of behind it: both are linear in the features, so the
  result is the same, and 8 to 32 channels are warped instead of 32 to 512. Its bias stays behind, where the warp
  has put zeros.
- Channel c of a head belongs to unit c // unit_channels; the official code interleaves, which is a renaming.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import pyramid_reach, vector_pyramid, vector_regression_loss, warped_cosine_loss
from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts.crops import check_channels
from .parts.monitors import REMEDY, CollapseWatch, EmbeddingMonitor
from .views import AffineRanges, AppearanceRanges, View, ViewSpec

Maps = Sequence[Tensor]


def cover_appearance() -> AppearanceRanges:
    """The official steps in the official order; their ranges are the steps' own defaults."""
    return AppearanceRanges(order=["noise", "blur", "contrast", "brightness", "in_paint"])


@dataclass
class CoverViews:
    """The two views of COVER."""

    crop: list[int] = field(default_factory=lambda: [96, 96, 96])  # D, H, W voxels (H, W for 2-D)
    affine: AffineRanges = field(default_factory=AffineRanges)  # of the fixed view
    appearance: AppearanceRanges = field(default_factory=cover_appearance)  # of the moving view


@dataclass
class CoverConfig:
    """The paper's symbols: radius = a, units = J per level from coarse to fine, unit_channels = d."""

    name: str = "cover"
    radius: int = 2  # voxels that each level looks around
    units: list[int] = field(default_factory=lambda: [4, 4, 4, 1, 1])  # one number for each decoder map
    unit_channels: int = 8  # of the features that a unit compares
    vector_weight: float = 1.0
    consistency_weight: float = 1.0
    max_unreachable: float = 0.05  # refused above: share of valid voxels that move further than the pyramid reaches


class Projection(nn.Module):
    """A 1x1 convolution without bias, of maps of any number of axes: the linear half of a vector head.

    As a matrix product: of so few channels several times faster on a CPU than the convolution.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(outputs, channels), a=math.sqrt(5)))

    def forward(self, features: Tensor) -> Tensor:
        weight = self.weight.expand(features.shape[0], -1, -1)
        return torch.bmm(weight, features.flatten(2)).unflatten(2, features.shape[2:])


class UnitNorm(nn.Module):
    """The other half: the convolution's bias and a norm over the whole sample."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        limit = 1 / math.sqrt(channels)  # as of a convolution
        self.bias = nn.Parameter(nn.init.uniform_(torch.empty(outputs), -limit, limit))
        self.norm = nn.GroupNorm(1, outputs)

    def forward(self, projected: Tensor) -> Tensor:
        return self.norm(projected + self.bias.view(-1, *[1] * (projected.ndim - 2)))


class Cover(Method):
    name = "cover"
    reads_parameters = False
    Config = CoverConfig
    Views = CoverViews

    def __init__(self, config: CoverConfig, backbone: BackboneConfig, views: CoverViews) -> None:
        super().__init__({"vector": config.vector_weight, "consistency": config.consistency_weight})
        if len(config.units) != backbone.levels:
            raise ValueError(
                f"method.units: expected one number per backbone level ({backbone.levels}), got {list(config.units)}"
            )
        backbone.check_size(views.crop, "views.crop")
        check_channels(backbone)
        if config.unit_channels < 1 or min(config.units) < 1:
            raise ValueError(
                f"method.units, method.unit_channels: expected at least 1 each, got {list(config.units)} "
                f"and {config.unit_channels}"
            )
        if config.radius < 1:
            raise ValueError(f"method.radius: expected at least 1 voxel, got {config.radius}")
        self.config = config
        self.backbone = Backbone(backbone)
        channels = self.backbone.decoder_channels
        widths = [(width, units * config.unit_channels) for width, units in zip(channels, config.units, strict=True)]
        self.projections = nn.ModuleList(Projection(*each) for each in widths)
        self.heads = nn.ModuleList(UnitNorm(*each) for each in widths)
        self.reach = pyramid_reach(config.radius, backbone.levels)
        self.embeddings = EmbeddingMonitor(channels[-1])
        self.watch = CollapseWatch(REMEDY)
        self.views = ViewSpec(
            crop=tuple(views.crop),
            views={"moving": View(appearance=views.appearance), "fixed": View(affine=views.affine, displacement=True)},
        )

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        fixed, moving = self._maps(batch["fixed"], batch["moving"])
        displacement, mask = batch["displacement"], batch["mask"]
        share = batch.get("share", {}).get("valid_voxels", 1.0)
        self.monitors = {"valid_fraction": mask.mean()}
        self._watch_over(fixed[-1])
        losses = {}
        if "vector" in weights:
            predicted = self._match(fixed, moving)
            self._monitor(predicted, displacement, mask, share)
            losses["vector"] = vector_regression_loss(predicted, displacement, mask)
        if "consistency" in weights:
            losses["consistency"] = warped_cosine_loss(fixed[-1], moving[-1], displacement, mask)
        return {name: weight * share * losses[name] for name, weight in weights.items()}

    def after_step(self, step: int) -> None:
        self.embeddings.update(step, self.group)

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        return self.watch.see(step, numbers)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"valid_voxels": batch["mask"].sum(dtype=torch.float64)}

    def preflight(
        self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            mask = batch["mask"]
            far = self._far(batch["displacement"])
            sums += torch.stack([(far * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)]).cpu()
        unreachable, valid = total(sums).tolist()
        if valid == 0:
            raise ValueError(
                "views.affine: no voxel of the views looked at stays inside its crop; "
                "lower views.affine.translation_voxels or rotation_degrees"
            )
        fraction = unreachable / valid
        if fraction > self.config.max_unreachable:
            raise ValueError(
                f"views.affine: {fraction:.1%} of the valid voxels move further than the pyramid reaches "
                f"({self.reach} voxels: radius {self.config.radius}, {len(self.heads)} levels), more than "
                f"method.max_unreachable={self.config.max_unreachable:.1%}; lower views.affine, or raise "
                f"method.radius or the number of backbone levels"
            )
        return {"unreachable_fraction": fraction, "reach_voxels": float(self.reach)}

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The recovered displacement (B, D, *S) and the full-resolution features of the fixed view (B, C, *S)."""
        fixed, moving = self._maps(batch["fixed"], batch["moving"])
        return {"displacement": self._match(fixed, moving), "features": fixed[-1]}

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def _maps(self, fixed: Tensor, moving: Tensor) -> tuple[Maps, Maps]:
        """The decoder's maps of both views, coarse to fine; they share one pass through the network."""
        _, maps = self.backbone(torch.cat((fixed, moving)))
        count = fixed.shape[0]
        return [each[:count] for each in maps], [each[count:] for each in maps]

    def _match(self, fixed: Maps, moving: Maps) -> Tensor:
        """psi' of the maps of both views."""
        projected = [
            [project(each) for project, each in zip(self.projections, maps, strict=True)] for maps in (fixed, moving)
        ]
        return vector_pyramid(*projected, radius=self.config.radius, units=self.config.units, heads=list(self.heads))

    def _far(self, displacement: Tensor) -> Tensor:
        """1 where a component is beyond the pyramid's reach: (B, 1, *S)."""
        return (displacement.abs().amax(dim=1, keepdim=True) > self.reach).float()

    @torch.no_grad()
    def _monitor(self, predicted: Tensor, displacement: Tensor, mask: Tensor, share: Tensor | float) -> None:
        def mean(values: Tensor) -> Tensor:
            return share * (values * mask).sum() / mask.sum().clamp(min=1)

        self.monitors |= {
            "displacement_error": mean((predicted.float() - displacement).norm(dim=1, keepdim=True)),
            "zero_error": mean(displacement.norm(dim=1, keepdim=True)),
            "unreachable_fraction": mean(self._far(displacement)),
        }

    @torch.no_grad()
    def _watch_over(self, features: Tensor) -> None:
        """The features of the voxels a quarter of the view from its sides, 2^D of them."""
        corners: Any = itertools.product(*((size // 4, size - 1 - size // 4) for size in features.shape[2:]))
        self.embeddings.see(torch.stack([features[(..., *corner)] for corner in corners], dim=1).flatten(0, 1))
        self.monitors |= self.embeddings.numbers()
