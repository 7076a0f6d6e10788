"""The networks written down, so that their libraries build them without voxtrast."""

from typing import Any

from ...methods.backbone import BackboneConfig, find_architecture, per_level
from ...methods.backbones.nnunet import NnUNet
from ...methods.backbones.resnet_unet import DECODER_CHANNELS, ResNetUNet

# As `voxtrast.methods.backbones` builds them: groups of eight channels.
_GROUP_NORM = "$lambda channels, **options: torch.nn.GroupNorm(max(1, channels // 8), channels, **options)"


def network_definition(config: BackboneConfig, classes: int) -> dict[str, Any]:
    """`network_def` of a MONAI bundle: `_target_` is the class, the rest its arguments, "$..." is Python."""
    architecture = find_architecture(config.architecture)
    target = {"_target_": architecture.class_name}
    if isinstance(architecture, NnUNet):
        norm = {
            "instance": f"$torch.nn.InstanceNorm{config.dimensions}d",
            "batch": f"$torch.nn.BatchNorm{config.dimensions}d",
            "group": _GROUP_NORM,
        }[config.norm]
        operators = {"conv_op": f"$torch.nn.Conv{config.dimensions}d", "norm_op": norm, "nonlin": "$torch.nn.LeakyReLU"}
        channels = {"input_channels": config.input_channels, "num_classes": classes, "deep_supervision": False}
        return target | channels | unet_arguments(config) | operators
    arguments = {"in_channels": config.input_channels, "out_channels": classes, "spatial_dims": config.dimensions}
    if isinstance(architecture, ResNetUNet):
        own = {"backbone": architecture.encoder, "pretrained": False, "decoder_channels": list(DECODER_CHANNELS)}
        return target | arguments | own
    return target | arguments | {"feature_size": config.features[0]}


def classes_argument(config: BackboneConfig) -> str:
    """What the network's class calls its number of output channels."""
    return "num_classes" if isinstance(find_architecture(config.architecture), NnUNet) else "out_channels"


def unet_arguments(config: BackboneConfig) -> dict[str, Any]:
    """The arguments of nnU-Net's U-Nets that are plain values."""
    dimensions = config.dimensions
    blocks = "n_conv_per_stage" if config.architecture == "plain_unet" else "n_blocks_per_stage"
    return {
        "n_stages": config.levels,
        "features_per_stage": list(config.features),
        "kernel_sizes": [[3] * dimensions for _ in range(config.levels)],
        "strides": [[1 if level == 0 else 2] * dimensions for level in range(config.levels)],
        blocks: per_level(config.encoder_blocks, config.levels, "encoder_blocks"),
        "n_conv_per_stage_decoder": per_level(config.decoder_blocks, config.levels - 1, "decoder_blocks"),
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin_kwargs": {"negative_slope": config.negative_slope, "inplace": True},
    }
