"""Backbones of the nnU-Net family, with their encoder and decoder maps in reach.

The networks are those of `dynamic-network-architectures`, unchanged, so that a state dict fits nnU-Net as it is.
What pretraining needs beyond them is every intermediate map: `Backbone` gives those.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES = {"plain_unet": PlainConvUNet, "residual_unet": ResidualEncoderUNet}


@dataclass
class BackboneConfig:
    """The U-Net to pretrain. The defaults are nnU-Net's plain 3-D configuration, shortened to five levels."""

    architecture: str = "plain_unet"  # plain_unet | residual_unet
    dimensions: int = 3
    input_channels: int = 1
    features: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 320])  # channels per level, fine to coarse
    encoder_blocks: list[int] = field(default_factory=lambda: [2])  # per level; a single number serves all
    decoder_blocks: list[int] = field(default_factory=lambda: [2])
    norm: str = "instance"  # instance | group | batch
    negative_slope: float = 0.01  # of the leaky ReLU
    skips: bool = True  # False: the decoder sees the bottleneck alone while it is pretrained

    @property
    def levels(self) -> int:
        return len(self.features)

    @property
    def stride(self) -> int:
        """Input sizes must be multiples of this."""
        return 2 ** (self.levels - 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BackboneConfig":
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"backbone: unknown fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)


class _GroupNorm(nn.GroupNorm):
    """Groups of eight channels; takes the channel count first, as the network builder passes it."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(max(1, channels // 8), channels, eps=eps, affine=affine)


def build_network(config: BackboneConfig, classes: int) -> nn.Module:
    """The bare segmentation network, with the state-dict keys of `dynamic-network-architectures`.

    Args:
        config: the architecture.
        classes: output channels of the segmentation layers, background included.

    Raises: ValueError naming the field that is wrong.
    """
    if config.architecture not in ARCHITECTURES:
        raise ValueError(f"backbone.architecture: {config.architecture!r} is not one of {sorted(ARCHITECTURES)}")
    if config.dimensions not in (2, 3):
        raise ValueError(f"backbone.dimensions: expected 2 or 3, got {config.dimensions}")
    if config.levels < 2:
        raise ValueError(f"backbone.features: a U-Net needs at least 2 levels, got {list(config.features)}")
    norms: dict[str, Any] = {
        "instance": nn.InstanceNorm3d if config.dimensions == 3 else nn.InstanceNorm2d,
        "group": _GroupNorm,
        "batch": nn.BatchNorm3d if config.dimensions == 3 else nn.BatchNorm2d,
    }
    if min(config.features) < 1:
        raise ValueError(f"backbone.features: expected at least 1 channel a level, got {list(config.features)}")
    if config.norm not in norms:
        raise ValueError(f"backbone.norm: {config.norm!r} is not one of {sorted(norms)}")
    blocks = "n_conv_per_stage" if config.architecture == "plain_unet" else "n_blocks_per_stage"
    options: dict[str, Any] = {
        "input_channels": config.input_channels,
        "n_stages": config.levels,
        "features_per_stage": list(config.features),
        "conv_op": nn.Conv3d if config.dimensions == 3 else nn.Conv2d,
        "kernel_sizes": 3,
        "strides": [1] + [2] * (config.levels - 1),
        blocks: per_level(config.encoder_blocks, config.levels, "backbone.encoder_blocks"),
        "num_classes": classes,
        "n_conv_per_stage_decoder": per_level(config.decoder_blocks, config.levels - 1, "backbone.decoder_blocks"),
        "conv_bias": True,
        "norm_op": norms[config.norm],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"negative_slope": config.negative_slope, "inplace": True},
        "deep_supervision": False,
    }
    network_class = ARCHITECTURES[config.architecture]
    network = network_class(**options)
    network.apply(network_class.initialize)
    return network


def per_level(numbers: list[int], levels: int, name: str) -> list[int]:
    """One number for each level, from one for all or one for each."""
    if len(numbers) == 1:
        return list(numbers) * levels
    if len(numbers) != levels:
        raise ValueError(f"{name}: expected 1 or {levels} numbers, got {list(numbers)}")
    return list(numbers)


def transferable_state(network: nn.Module) -> dict[str, Tensor]:
    """The pretrained tensors under the network's own names.

    Without the segmentation layers, which no pretraining trains, and without `decoder.encoder.*`, which are the
    tensors of `encoder.*` under a second name.
    """
    return {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(("decoder.encoder.", "decoder.seg_layers."))
    }


class Backbone(nn.Module):
    """A segmentation network opened up: `forward` returns its maps in place of its logits.

    Args:
        config: the network.
        decoder_blocks: how many blocks of the decoder are trained, from the bottleneck up; all by default. The others
            keep their initial values and get no gradient.
    """

    def __init__(self, config: BackboneConfig, decoder_blocks: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(config, classes=2)
        self.decoder_blocks = config.levels - 1 if decoder_blocks is None else decoder_blocks
        if not 0 <= self.decoder_blocks < config.levels:
            raise ValueError(
                f"backbone.features: {config.levels} levels have {config.levels - 1} decoder blocks, and the method "
                f"trains {self.decoder_blocks}; add levels"
            )
        decoder: Any = self.network.decoder
        # The class count is the downstream task's; these layers get no gradient and are never exported.
        decoder.seg_layers.requires_grad_(False)
        decoder.transpconvs[self.decoder_blocks :].requires_grad_(False)
        decoder.stages[self.decoder_blocks :].requires_grad_(False)
        if config.norm in ("instance", "batch"):
            # A bias before such a norm changes nothing. Its gradient is rounding noise, which Adam would scale up
            # to full steps, other ones for every number of ranks. It stays 0, where nnU-Net looks for it.
            for module in self.network.modules():
                norm, convolution = getattr(module, "norm", None), getattr(module, "conv", None)
                bias = getattr(convolution, "bias", None)
                if isinstance(norm, _CENTRING) and bias is not None:
                    bias.requires_grad_(False)

    @property
    def encoder_channels(self) -> list[int]:
        """Of the encoder maps, fine to coarse."""
        return list(self.config.features)

    @property
    def decoder_channels(self) -> list[int]:
        """Of the decoder maps, coarse to fine, the bottleneck first."""
        return list(self.config.features)[::-1]

    def forward(self, image: Tensor, blocks: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of `encode` and `decode`."""
        encoder_maps = self.encode(image)
        return encoder_maps, self.decode(encoder_maps, blocks)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Encoder maps of every level, fine to coarse; the last is the bottleneck.

        Args:
            image: (B, input_channels, *S), S multiples of `config.stride`.
        """
        stride = self.config.stride
        if any(size % stride for size in image.shape[2:]):
            raise ValueError(
                f"image: sizes must be multiples of {stride} ({self.config.levels} levels), "
                f"got {tuple(image.shape[2:])}"
            )
        maps: list[Tensor] = self.network.encoder(image)  # type: ignore[operator]
        return maps

    def decode(self, encoder_maps: Sequence[Tensor], blocks: int | None = None) -> list[Tensor]:
        """Decoder maps, coarse to fine, starting with the bottleneck; with all blocks they end at full resolution.

        Args:
            encoder_maps: as `encode` gives them, or changed; without skips only the last is looked at.
            blocks: how many blocks to run; those that are trained by default.
        """
        decoder: Any = self.network.decoder
        maps = [encoder_maps[-1]]
        for stage in range(self.decoder_blocks if blocks is None else blocks):
            upsampled = decoder.transpconvs[stage](maps[-1])
            if self.config.skips:
                maps.append(decoder.stages[stage](torch.cat((upsampled, encoder_maps[-(stage + 2)]), dim=1)))
            else:
                maps.append(_without_skip(decoder.stages[stage], upsampled))
        return maps

    def transferable(self) -> dict[str, Tensor]:
        return transferable_state(self.network)

    def untrained(self) -> list[str]:
        """Names in `transferable` that no loss reaches: the blocks of the decoder that are not trained."""
        first = self.decoder_blocks
        parts = tuple(f"decoder.{part}.{i}." for part in ("transpconvs", "stages")
                      for i in range(first, self.config.levels - 1))  # fmt: skip
        return [name for name in self.transferable() if parts and name.startswith(parts)]


_CENTRING = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm2d, nn.BatchNorm3d)


def _without_skip(stage: Any, upsampled: Tensor) -> Tensor:
    """A block of the decoder as if the skip were zeros; its half of the first kernel keeps its initial values."""
    first, *others = stage.convs
    kernel = first.conv.weight[:, : upsampled.shape[1]]
    convolve = functional.conv3d if upsampled.ndim == 5 else functional.conv2d
    found = convolve(upsampled, kernel, first.conv.bias, first.conv.stride, first.conv.padding)
    for layer in (*first.all_modules[1:], *others):
        found = layer(found)
    return found
