"""Backbones with their encoder and decoder maps in reach.

The networks are those of `dynamic-network-architectures` (nnU-Net's) and of MONAI, so that a state dict fits there as
it is; `backbones/` knows them one by one. What pretraining needs beyond them is every intermediate map: `Backbone`
gives those.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from .backbones import ARCHITECTURES, LEFT_OUT, architecture_of, find_architecture
from .backbones.nnunet import per_level
from .backbones.running import FIELDS as RUNNING
from .backbones.running import Running

__all__ = [
    "ARCHITECTURES",
    "LEFT_OUT",
    "Backbone",
    "BackboneConfig",
    "architecture_of",
    "build_network",
    "find_architecture",
    "left_out",
    "per_level",
    "transferable_state",
]


@dataclass
class BackboneConfig:
    """The network to pretrain. What is left empty becomes the architecture's own value."""

    # plain_unet | residual_unet | residual_unet_s | residual_unet_m | residual_unet_l | resnet18_unet | resnet50_unet
    # | swin_unetr
    architecture: str = "plain_unet"
    dimensions: int = 3  # 3, or 2 for slices
    input_channels: int = 1  # of an image
    features: list[int] = field(default_factory=list)  # channels of the encoder maps, fine to coarse
    encoder_blocks: list[int] = field(default_factory=list)  # per level; a single number serves all
    decoder_blocks: list[int] = field(default_factory=list)  # likewise, one number less
    norm: str = ""  # instance | group | batch
    negative_slope: float = 0.01  # of the leaky ReLU
    skips: bool = True  # False: the decoder sees the bottleneck alone while it is pretrained
    # How it runs; no part of what it computes, nor of the description of its weights.
    checkpoint_levels: int = 0  # the finest levels that are computed again in backward, to need less memory
    channels_last: bool = False  # order of the maps in memory
    compile: bool = False  # by torch.compile

    def __post_init__(self) -> None:
        if self.architecture in ARCHITECTURES:  # an unknown one is refused where it matters, naming the field
            ARCHITECTURES[self.architecture].fill(self)

    @property
    def levels(self) -> int:
        """Sizes of maps that the decoder goes through, from the bottleneck to full resolution."""
        return len(self.decoder_channels)

    @property
    def stride(self) -> int:
        """Input sizes must be multiples of this."""
        return self.strides[-1]

    @property
    def strides(self) -> list[int]:
        """Of the encoder maps, fine to coarse."""
        return find_architecture(self.architecture).encoder_strides(self)

    @property
    def decoder_strides(self) -> list[int]:
        """Of the decoder maps, coarse to fine, the bottleneck first; the last is 1."""
        return [2**level for level in reversed(range(self.levels))]

    @property
    def encoder_channels(self) -> list[int]:
        """Of the encoder maps, fine to coarse."""
        return list(self.features)

    @property
    def decoder_channels(self) -> list[int]:
        """Of the decoder maps, coarse to fine, the bottleneck first."""
        return find_architecture(self.architecture).decoder_channels(self)

    def check_size(self, size: Sequence[int], name: str, samples: int | None = None) -> None:
        """Refuses sizes that the network cannot take.

        Args:
            size: one number for each dimension.
            name: what has this size, for the message: "views.crop", say.
            samples: how many images batch norm sees at once, where that is known.

        Raises: ValueError naming a size that would do.
        """
        stride, found = self.stride, tuple(size)
        fitting = [max(stride, -(-each // stride) * stride) for each in found]
        if len(found) != self.dimensions or any(each < 1 or each % stride for each in found):
            raise ValueError(
                f"{name}: expected {self.dimensions} multiples of {stride} ({self.architecture} of {self.levels} "
                f"levels), got {list(found)}; take {fitting if len(found) == self.dimensions else 'as many numbers'}"
            )
        lone = all(each == stride for each in found)
        if lone and (self.norm == "instance" or (self.norm == "batch" and samples == 1)):
            fitting[-1] *= 2
            raise ValueError(
                f"{name}: {list(found)} leaves the bottleneck a single voxel, over which {self.norm} norm has nothing "
                f"to normalise; take {fitting} or fewer levels"
            )

    @property
    def running(self) -> Running:
        return Running(*(getattr(self, name) for name in RUNNING))

    def to_dict(self) -> dict[str, Any]:
        """What the network is, without how it runs."""
        return {name: value for name, value in asdict(self).items() if name not in RUNNING}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BackboneConfig":
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"backbone: unknown fields {unknown}; this version knows {sorted(known)}")
        return cls(**values)


def build_network(config: BackboneConfig, classes: int) -> nn.Module:
    """The bare segmentation network, with the state-dict keys of its library.

    Args:
        config: the architecture.
        classes: output channels of the segmentation layers, background included.

    Raises: ValueError naming the field that is wrong.
    """
    architecture = find_architecture(config.architecture)
    if config.dimensions not in (2, 3):
        raise ValueError(f"backbone.dimensions: expected 2 or 3, got {config.dimensions}")
    if config.input_channels < 1:
        raise ValueError(f"backbone.input_channels: expected at least 1, got {config.input_channels}")
    architecture.check(config)
    return architecture.build(config, classes)


def left_out(network: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names that no pretraining fills: the last layers, and second names of other tensors."""
    architecture = architecture_of(network)
    return (*architecture.second_names, *architecture.last_layers)


def transferable_state(network: nn.Module) -> dict[str, Tensor]:
    """The pretrained tensors under the network's own names.

    Without the segmentation layers, which no pretraining trains, and without `decoder.encoder.*` of nnU-Net's
    networks, which are the tensors of `encoder.*` under a second name.
    """
    prefixes = left_out(network)
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(prefixes)}


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
        self.architecture = find_architecture(config.architecture)
        self.strides, self.decoder_strides = config.strides, config.decoder_strides
        self.encoder_channels, self.decoder_channels = config.encoder_channels, config.decoder_channels
        self.decoder_blocks = config.levels - 1 if decoder_blocks is None else decoder_blocks
        if not 0 <= self.decoder_blocks < config.levels:
            raise ValueError(
                f"backbone.features: {config.levels} levels have {config.levels - 1} decoder blocks, and the method "
                f"trains {self.decoder_blocks}; add levels, or train fewer"
            )
        self.running = config.running
        if not 0 <= self.running.checkpoint_levels <= config.levels:
            raise ValueError(
                f"backbone.checkpoint_levels: the network has {config.levels} levels, got "
                f"{self.running.checkpoint_levels}; take 1 or 2, which hold the largest maps"
            )
        self.running.prepare(self.network)
        # Functions of the backbone and no methods: a copy of it must run itself.
        self._encoded, self._decoded = self.running.compiled(_encoded), self.running.compiled(_decoded)
        # The class count is the downstream task's; these layers get no gradient and are never exported.
        untrained = (*self.architecture.last_layers, *self._untrained_parts(self.decoder_blocks))
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if name.startswith(untrained):
                parameter.requires_grad_(False)
        # A bias before such a norm changes nothing. Its gradient is rounding noise, which Adam would scale up
        # to full steps, other ones for every number of ranks. It stays 0, where nnU-Net looks for it.
        for module in self.network.modules():
            norm, convolution = getattr(module, "norm", None), getattr(module, "conv", None)
            bias = getattr(convolution, "bias", None)
            if isinstance(norm, _CENTRING) and bias is not None:
                bias.requires_grad_(False)

    def forward(self, image: Tensor, blocks: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of `encode` and `decode`."""
        encoder_maps = self.encode(image)
        return encoder_maps, self.decode(encoder_maps, blocks)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Encoder maps, fine to coarse, of the channels and strides that `encoder_channels` and `strides` say.

        Args:
            image: (B, input_channels, *S), S multiples of `config.stride`.
        """
        self.config.check_size(tuple(image.shape[2:]), "image", image.shape[0] if self.training else None)
        return self._encoded(self, image)

    def decode(self, encoder_maps: Sequence[Tensor], blocks: int | None = None) -> list[Tensor]:
        """Decoder maps, coarse to fine, starting with the bottleneck; with all blocks they end at full resolution.

        Args:
            encoder_maps: as `encode` gives them, or changed; without skips only the last is looked at.
            blocks: how many blocks to run; those that are trained by default.
        """
        return self._decoded(self, encoder_maps, self.decoder_blocks if blocks is None else blocks)

    def transferable(self) -> dict[str, Tensor]:
        return transferable_state(self.network)

    def untrained(self, blocks: int | None = None) -> list[str]:
        """Names in `transferable` that no loss reaches where the first `blocks` of the decoder run; by default those
        that are trained."""
        parts = self._untrained_parts(self.decoder_blocks if blocks is None else blocks)
        return [name for name in self.transferable() if name.startswith(parts)]

    def _untrained_parts(self, first: int) -> tuple[str, ...]:
        """Prefixes of the names of the decoder's blocks from one on."""
        blocks = range(first, self.config.levels - 1)
        return tuple(f"{part}." for block in blocks for part in self.architecture.decoder_parts(block))


def _encoded(backbone: Backbone, image: Tensor) -> list[Tensor]:
    if not backbone.running.checkpoint_levels:
        return backbone.architecture.encode(backbone.network, image)
    run = functools.partial(backbone.running.part, backbone.network)
    return backbone.architecture.encode_by_parts(backbone.network, image, run)


def _decoded(backbone: Backbone, encoder_maps: Sequence[Tensor], blocks: int) -> list[Tensor]:
    network, decode = backbone.network, backbone.architecture.decode
    skips = dict(zip(backbone.strides, encoder_maps, strict=True)) if backbone.config.skips else {}
    maps = [encoder_maps[-1]]
    for block in range(blocks):
        skip = skips.get(backbone.decoder_strides[block + 1])
        work, level = functools.partial(decode, network, block), backbone.config.levels - 2 - block
        maps.append(backbone.running.part(network, level, work, maps[-1], skip))
    return maps


_CENTRING = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm2d, nn.BatchNorm3d)
