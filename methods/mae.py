"""MAE: masked autoencoding of volumes by a U-Net, the baseline to beat, in 2-D and 3-D.

Blocks of an image are hidden, most of it, and the network restores them from what is left. Nothing is contrasted, and
nothing but the image is needed: of all pretraining the simplest that trains encoder and decoder.

    L = mean over the hidden voxels of (G(x . m) - x)^2        m 0 in the hidden blocks and 1 elsewhere, G the U-Net

He et al., CVPR 2022, hide patches of photographs from a transformer. The form here is that of convolutional networks
for medical volumes (Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", CVPR 2025, and its
code, nnssl): hidden voxels are 0, which is the mean of a standardised image, three quarters of all blocks of 16 voxels
are hidden, the skips stay, and the error is taken where the image was hidden.

Departures from that code, with reasons:
- The blocks of a sample are drawn from (seed, step, place in the global batch): the same on any number of ranks.
- The last layer, which gives the image, is a head of its own: the network's segmentation layer is the task's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbone import Backbone, BackboneConfig
from .method import Batch, Method
from .parts.across_ranks import own_part, rank_and_size
from .parts.crops import check_crop
from .views import View, ViewSpec


@dataclass
class MaeConfig:
    name: str = "mae"
    hidden_share: float = 0.75  # of the blocks
    block_voxels: int = 16  # side of a block
    restorative_weight: float = 1.0


@dataclass
class MaeViews:
    crop: list[int] = field(default_factory=lambda: [96, 96, 96])  # D, H, W voxels (H, W for 2-D)
    view: View = field(default_factory=View)  # what is hidden in part and restored


class Mae(Method):
    name = "mae"
    reads_parameters = False
    Config = MaeConfig
    Views = MaeViews

    def __init__(self, config: MaeConfig, backbone: BackboneConfig, views: MaeViews) -> None:
        super().__init__({"restorative": config.restorative_weight})
        size = views.view.size or views.crop
        check_crop(size, backbone, name="views.view.size" if views.view.size else "views.crop")
        self.config = config
        self.views = ViewSpec(crop=tuple(views.crop), views={"x": replace(views.view)})
        self.grid = _grid(config, size)
        blocks, hidden = math.prod(self.grid), round(config.hidden_share * math.prod(self.grid))
        if not 0 < hidden < blocks:
            raise ValueError(
                f"method.hidden_share: {config.hidden_share} of {blocks} blocks hides {hidden} of them; expected a "
                f"share that hides some and leaves some, for example 0.75 with smaller method.block_voxels"
            )
        self.backbone = Backbone(backbone)
        convolution = nn.Conv3d if backbone.dimensions == 3 else nn.Conv2d
        self.restoration_head = convolution(self.backbone.decoder_channels[-1], 1, 1)

    def exchange(self, batches: list[Batch], step: int) -> None:
        parts = len(batches) * rank_and_size(self.group)[1]
        shown = self.draw(parts * len(batches[0]["x"]), self._when(step))
        for part, batch in enumerate(batches):
            batch["shown"] = own_part(shown, part, len(batches), self.group).to(batch["x"].device)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        image = batch["x"]
        # Without an exchange this batch is the whole one.
        shown = batch["shown"] if "shown" in batch else self.draw(len(image), self._when(step)).to(image.device)
        restored = self._restore(image, shown)
        hidden = ~shown.expand_as(image)
        target = image[hidden].to(restored.dtype)
        losses = {"restorative": functional.mse_loss(restored[hidden], target)}
        spread = (target - target.mean()).square().mean()
        self.monitors = {
            "restoration_error": (restored[hidden] - target).detach().abs().mean(),
            "loss_over_mean": losses["restorative"].detach() / spread.clamp(min=1e-12),  # 1: no better than the mean
        }
        return {name: weight * losses[name] for name, weight in self.weights(step).items()}

    def _when(self, step: int) -> int:
        """Validation hides the same blocks each time."""
        return step if self.training else 0

    def draw(self, samples: int, step: int, size: Sequence[int] | None = None) -> Tensor:
        """Which voxels are shown: (samples, 1, *S) of bool, equally many blocks of each sample.

        Args:
            size: S, that of the view by default; blocks that stand out at its end are cut.
        """
        side = self.config.block_voxels
        grid = self.grid if size is None else [-(-each // side) for each in size]
        blocks = math.prod(grid)
        places = torch.rand(samples, blocks, generator=self.generator(step, "mask")).argsort(dim=1)
        shown = (places >= round(self.config.hidden_share * blocks)).view(samples, 1, *grid)
        for axis, length in enumerate(size or [each * side for each in grid], start=2):
            shown = shown.repeat_interleave(side, dim=axis).narrow(axis, 0, length)
        return shown

    @torch.no_grad()
    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """The features of the whole image (B, C, *S), the image with blocks hidden, and what is restored of it, of the
        image itself where it was shown (B, 1, *S)."""
        image = batch["x"]
        shown = self.draw(len(image), 0, image.shape[2:]).to(image.device)
        restored = self._restore(image, shown)
        restored = torch.where(shown, image.to(restored.dtype), restored)
        features = self.backbone(image)[1][-1]
        return {"features": features, "restored": restored, "input": image * shown, "target": image}

    def transferable(self) -> dict[str, Tensor]:
        return self.backbone.transferable()

    def untrained(self) -> list[str]:
        return self.backbone.untrained()

    def _restore(self, image: Tensor, shown: Tensor) -> Tensor:
        _, decoder_maps = self.backbone(image * shown)
        restored: Tensor = self.restoration_head(decoder_maps[-1])
        return restored.to(torch.promote_types(restored.dtype, torch.float32))


def _grid(config: MaeConfig, size: Sequence[int]) -> list[int]:
    """Blocks along each axis."""
    side = config.block_voxels
    if side < 1 or any(each % side for each in size):
        fitting = [each for each in range(1, min(size) + 1) if all(length % each == 0 for length in size)]
        raise ValueError(
            f"method.block_voxels: {side} does not divide every side of the view {list(size)}; take one of "
            f"{', '.join(map(str, fitting))}"
        )
    return [each // side for each in size]
