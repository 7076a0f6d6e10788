"""The networks that can be pretrained, by name."""

from torch import nn

from .architecture import Architecture
from .nnunet import NnUNet, ResidualPreset
from .resnet_unet import ResNetUNet
from .swin_unetr import SwinUNETR

# M and L of nnU-Net are one network, seen with other crops and batches (see nnunet.py); S is ours.
ARCHITECTURES: dict[str, Architecture] = {
    "plain_unet": NnUNet("PlainConvUNet"),
    "residual_unet": NnUNet("ResidualEncoderUNet"),
    "residual_unet_s": ResidualPreset("residual_unet_s"),
    "residual_unet_m": ResidualPreset("residual_unet_m"),
    "residual_unet_l": ResidualPreset("residual_unet_l"),
    "resnet18_unet": ResNetUNet("resnet18"),
    "resnet50_unet": ResNetUNet("resnet50"),
    "swin_unetr": SwinUNETR(),
}

# Prefixes of all names that no pretraining fills, whatever the architecture.
LEFT_OUT = tuple(
    sorted({prefix for each in ARCHITECTURES.values() for prefix in (*each.second_names, *each.last_layers)})
)


def find_architecture(name: str) -> Architecture:
    """Raises: ValueError naming `backbone.architecture`."""
    if name not in ARCHITECTURES:
        raise ValueError(f"backbone.architecture: {name!r} is not one of {sorted(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(network: nn.Module) -> Architecture:
    """The first architecture that builds networks of this class; those that share a class share their names."""
    for architecture in ARCHITECTURES.values():
        if type(network).__name__ == architecture.class_name.rpartition(".")[2]:
            return architecture
    known = sorted({architecture.class_name for architecture in ARCHITECTURES.values()})
    raise ValueError(f"network: {type(network).__name__} is none of the backbones' classes {known}")


__all__ = ["ARCHITECTURES", "LEFT_OUT", "Architecture", "architecture_of", "find_architecture"]
