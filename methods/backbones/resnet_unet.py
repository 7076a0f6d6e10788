"""U-Nets with a ResNet as encoder: what PCRL (ResNet-18) and DiRA (ResNet-50) pretrain in 2-D. MONAI's FlexibleUNet.

The encoder begins with a stride of 2, so it has no map at full resolution, and the last of the five decoder blocks
has no skip. Differences from the papers' networks, which are those of `segmentation_models_pytorch`: a 1x1
convolution before the upsampling halves the channels, and ResNet-18's shortcuts over a stride have no parameters.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .architecture import DEFAULT_SLOPE, Architecture, RunPart, require

if TYPE_CHECKING:
    from ..backbone import BackboneConfig

ENCODERS = {  # channels at strides 2 to 32, blocks of the four layers
    "resnet18": ([64, 64, 128, 256, 512], [2, 2, 2, 2]),
    "resnet50": ([64, 256, 512, 1024, 2048], [3, 4, 6, 3]),
}
DECODER_CHANNELS = [256, 128, 64, 32, 16]


class ResNetUNet(Architecture):
    class_name = "monai.networks.nets.flexible_unet.FlexibleUNet"
    last_layers = ("segmentation_head.",)
    norms = ("batch",)

    def __init__(self, encoder: str) -> None:
        self.encoder = encoder

    def own_values(self, config: "BackboneConfig") -> dict[str, Any]:
        features, blocks = ENCODERS[self.encoder]
        return {"features": features, "encoder_blocks": blocks, "decoder_blocks": [2], "norm": "batch"}

    def check(self, config: "BackboneConfig") -> None:
        for field in ("features", "encoder_blocks", "decoder_blocks"):
            require(config, field, self.own_values(config)[field], "has widths and blocks of its own")
        require(config, "norm", "batch", "has an encoder that MONAI builds with batch norm alone")
        require(config, "negative_slope", DEFAULT_SLOPE, "has plain ReLUs, which no slope concerns")

    def build(self, config: "BackboneConfig", classes: int) -> nn.Module:
        # MONAI takes seconds to import, and most recipes do without it.
        from monai.networks.nets.flexible_unet import FlexibleUNet

        network = FlexibleUNet(
            config.input_channels,
            classes,
            self.encoder,
            pretrained=False,
            decoder_channels=tuple(DECODER_CHANNELS),
            spatial_dims=config.dimensions,
        )
        blocks: Any = list(network.encoder.modules())
        for block in blocks:
            if isinstance(getattr(block, "downsample", None), partial):
                block.downsample = _PaddedShortcut(block.bn2.num_features, block.stride)
        return network

    def encoder_strides(self, config: "BackboneConfig") -> list[int]:
        return [2, 4, 8, 16, 32]

    def decoder_channels(self, config: "BackboneConfig") -> list[int]:
        return [config.features[-1], *DECODER_CHANNELS]

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = network.encoder(image)
        return maps

    def encode_by_parts(self, network: Any, image: Tensor, run: RunPart) -> list[Tensor]:
        encoder = network.encoder
        parts = [
            nn.Sequential(encoder.conv1, encoder.bn1, encoder.act),
            nn.Sequential(encoder.maxpool, encoder.layer1),
            encoder.layer2,
            encoder.layer3,
            encoder.layer4,
        ]
        maps: list[Tensor] = []
        for level, part in enumerate(parts):
            maps.append(run(level, part, maps[-1] if maps else image))
        return maps

    def decode(self, network: Any, block: int, below: Tensor, skip: Tensor | None) -> Tensor:
        stage = network.decoder.blocks[block]
        if skip is not None:
            found: Tensor = stage(below, skip)
            return found
        upsampled = stage.upsample(below)
        # As if the skip, which comes first, were zeros; the last block has none.
        first = stage.convs.conv_0.conv
        kernel = first.weight[:, first.in_channels - upsampled.shape[1] :]
        convolve = functional.conv3d if upsampled.ndim == 5 else functional.conv2d
        convolved = convolve(upsampled, kernel, first.bias, first.stride, first.padding)
        found = stage.convs.conv_1(stage.convs.conv_0.adn(convolved))
        return found

    def encoder_parts(self, network: Any) -> list[tuple[str, ...]]:
        return [("encoder.conv1", "encoder.bn1"), *((f"encoder.layer{number}",) for number in range(1, 5))]

    def decoder_parts(self, block: int) -> tuple[str, ...]:
        return (f"decoder.blocks.{block}",)

    def skip_kernels(self, config: "BackboneConfig") -> list[str]:
        # The last block has no skip.
        return [f"decoder.blocks.{block}.convs.conv_0.conv.weight" for block in range(config.levels - 2)]


class _PaddedShortcut(nn.Module):
    """Every second voxel, new channels zero: what MONAI's own shortcut computes, but with a gradient.

    MONAI 1.6.1 takes `.data` of it, so that no gradient passes the shortcut.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, image: Tensor) -> Tensor:
        step = slice(None, None, self.stride)
        kept = image[(slice(None), slice(None), *[step] * (image.ndim - 2))]
        zeros = kept.new_zeros(kept.shape[0], self.channels - kept.shape[1], *kept.shape[2:])
        return torch.cat((kept, zeros), dim=1)
