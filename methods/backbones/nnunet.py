"""The U-Nets of nnU-Net (`dynamic-network-architectures`): plain, with a residual encoder, and presets of that."""

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .architecture import Architecture, RunPart, require

if TYPE_CHECKING:
    from ..backbone import BackboneConfig

MODULE = "dynamic_network_architectures.architectures.unet"

# Widths and blocks by dimensions. nnU-Net's ResEnc M, L and XL are budgets of 8, 24 and 40 GB, not networks: all
# have 32 channels, doubled a level up to 320 (512 in 2-D), (1, 3, 4, 6, 6, 6, ...) blocks down and 1 up, and as many
# levels as the patch that fits can be halved (nnunetv2 2.8.1, residual_encoder_unet_planners.py). Run on volumes of
# 320^3 at 1 mm, the planners give these six levels for all three, with patches of 128^3, 192^3 and 256x224x224; on
# slices of 256x256 these seven. So M and L are one network here; the recipe's crop and batch tell them apart.
_RESENC = {
    3: ([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6]),
    2: ([32, 64, 128, 256, 512, 512, 512], [1, 3, 4, 6, 6, 6, 6]),
}
PRESETS = {
    # Ours, nnU-Net has no S: half the widths and five levels, for crops of 64 to 96 voxels and small machines.
    "residual_unet_s": {dimensions: ([16, 32, 64, 128, 256], [1, 3, 4, 6, 6]) for dimensions in (2, 3)},
    "residual_unet_m": _RESENC,
    "residual_unet_l": _RESENC,
}


class _GroupNorm(nn.GroupNorm):
    """Groups of eight channels; takes the channel count first, as the network builder passes it."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(max(1, channels // 8), channels, eps=eps, affine=affine)


class NnUNet(Architecture):
    """Any U-Net of the library; `features`, `encoder_blocks` and `decoder_blocks` say which."""

    last_layers = ("decoder.seg_layers.",)
    second_names = ("decoder.encoder.",)  # the tensors of `encoder.*`
    norms = ("batch", "group", "instance")

    def __init__(self, name: str) -> None:
        self.class_name = f"{MODULE}.{name}"
        self.blocks_option = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"

    def own_values(self, config: "BackboneConfig") -> dict[str, Any]:
        """nnU-Net's plain 3-D configuration, shortened to five levels."""
        return {"features": [32, 64, 128, 256, 320], "encoder_blocks": [2], "decoder_blocks": [2], "norm": "instance"}

    def check(self, config: "BackboneConfig") -> None:
        if len(config.features) < 2:
            raise ValueError(f"backbone.features: a U-Net needs at least 2 levels, got {list(config.features)}")
        if min(config.features) < 1:
            raise ValueError(f"backbone.features: expected at least 1 channel a level, got {list(config.features)}")
        if config.norm not in self.norms:
            raise ValueError(f"backbone.norm: {config.norm!r} is not one of {', '.join(self.norms)}")

    def build(self, config: "BackboneConfig", classes: int) -> nn.Module:
        levels = len(config.features)
        norms: dict[str, Any] = {
            "instance": nn.InstanceNorm3d if config.dimensions == 3 else nn.InstanceNorm2d,
            "group": _GroupNorm,
            "batch": nn.BatchNorm3d if config.dimensions == 3 else nn.BatchNorm2d,
        }
        options: dict[str, Any] = {
            "input_channels": config.input_channels,
            "n_stages": levels,
            "features_per_stage": list(config.features),
            "conv_op": nn.Conv3d if config.dimensions == 3 else nn.Conv2d,
            "kernel_sizes": 3,
            "strides": [1] + [2] * (levels - 1),
            self.blocks_option: per_level(config.encoder_blocks, levels, "backbone.encoder_blocks"),
            "num_classes": classes,
            "n_conv_per_stage_decoder": per_level(config.decoder_blocks, levels - 1, "backbone.decoder_blocks"),
            "conv_bias": True,
            "norm_op": norms[config.norm],
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "nonlin": nn.LeakyReLU,
            "nonlin_kwargs": {"negative_slope": config.negative_slope, "inplace": True},
            "deep_supervision": False,
        }
        # Imported late: losses, recipes and benchmarks of the operators do without the library.
        network_class: Any = getattr(importlib.import_module(MODULE), self.class_name.rpartition(".")[2])
        network: nn.Module = network_class(**options)
        network.apply(network_class.initialize)
        return network

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        maps: list[Tensor] = network.encoder(image)
        return maps

    def encode_by_parts(self, network: Any, image: Tensor, run: RunPart) -> list[Tensor]:
        stem = getattr(network.encoder, "stem", None)
        first, *others = network.encoder.stages
        maps = [run(0, first if stem is None else nn.Sequential(stem, first), image)]
        for level, stage in enumerate(others, 1):
            maps.append(run(level, stage, maps[-1]))
        return maps

    def decode(self, network: Any, block: int, below: Tensor, skip: Tensor | None) -> Tensor:
        upsampled = network.decoder.transpconvs[block](below)
        stage = network.decoder.stages[block]
        if skip is None:
            return _without_skip(stage, upsampled)
        found: Tensor = stage(torch.cat((upsampled, skip), dim=1))
        return found

    def encoder_parts(self, network: Any) -> list[tuple[str, ...]]:
        stages = [(f"encoder.stages.{level}",) for level in range(len(network.encoder.stages))]
        return [*([("encoder.stem",)] if getattr(network.encoder, "stem", None) is not None else []), *stages]

    def decoder_parts(self, block: int) -> tuple[str, ...]:
        return f"decoder.transpconvs.{block}", f"decoder.stages.{block}"

    def skip_kernels(self, config: "BackboneConfig") -> list[str]:
        return [f"decoder.stages.{block}.convs.0.conv.weight" for block in range(config.levels - 1)]


class ResidualPreset(NnUNet):
    """A residual encoder U-Net of fixed widths and blocks."""

    def __init__(self, name: str) -> None:
        super().__init__("ResidualEncoderUNet")
        self.sizes = PRESETS[name]

    def own_values(self, config: "BackboneConfig") -> dict[str, Any]:
        features, blocks = self.sizes.get(config.dimensions, self.sizes[3])  # other dimensions are refused later
        return {"features": features, "encoder_blocks": blocks, "decoder_blocks": [1], "norm": "instance"}

    def check(self, config: "BackboneConfig") -> None:
        super().check(config)
        reason = "is a preset (residual_unet is free)"
        for field in ("features", "encoder_blocks", "decoder_blocks"):
            require(config, field, self.own_values(config)[field], reason)


def _without_skip(stage: Any, upsampled: Tensor) -> Tensor:
    """A block of the decoder as if the skip were zeros; its half of the first kernel keeps its initial values."""
    first, *others = stage.convs
    kernel = first.conv.weight[:, : upsampled.shape[1]]
    convolve = functional.conv3d if upsampled.ndim == 5 else functional.conv2d
    found = convolve(upsampled, kernel, first.conv.bias, first.conv.stride, first.conv.padding)
    for layer in (*first.all_modules[1:], *others):
        found = layer(found)
    return found


def per_level(numbers: list[int], levels: int, name: str) -> list[int]:
    """One number for each level, from one for all or one for each."""
    if len(numbers) == 1:
        return list(numbers) * levels
    if len(numbers) != levels:
        raise ValueError(f"{name}: expected 1 or {levels} numbers, got {list(numbers)}")
    return list(numbers)
