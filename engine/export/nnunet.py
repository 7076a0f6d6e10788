"""Weights for nnU-Net: a `.pth` that `nnUNetv2_train -pretrained_weights` takes, and the plans it needs.

nnU-Net's loader asks for every key of its network but the segmentation layers, aliases included (an encoder tensor
goes by four names), under `network_weights`. Newer nnU-Net also reads `nnssl_adaptation_plan` from such a file
(`nnUNetv2_preprocess_like_nnssl`); that route takes over the encoder alone.
"""

from pathlib import Path
from pydoc import locate
from typing import Any

import torch
from torch import nn

from ...methods.backbone import BackboneConfig, find_architecture
from ..errors import UserError
from ..weights import write_whole
from .card import Exported, card, card_file, refuse_existing, write_json
from .definition import unet_arguments
from .fit import examine
from .source import CLASSES, Source

LIBRARY = "dynamic_network_architectures."  # what nnU-Net builds its networks from
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]  # the arguments that nnU-Net looks up by name
CONFIGURATION = {2: "2d", 3: "3d_fullres"}  # nnU-Net's own, to inherit everything else from
DEFAULT_PATCH = 128


def architecture_section(config: BackboneConfig) -> dict[str, Any]:
    """The `architecture` entry of a configuration in nnU-Net's plans that builds the same network.

    Raises: UserError for a network that plans cannot describe.
    """
    class_name = find_architecture(config.architecture).class_name
    if not class_name.startswith(LIBRARY):
        raise UserError(
            f"backbone.architecture: {config.architecture} is {class_name}, which nnU-Net cannot build from plans; "
            "use --to monai, or pretrain plain_unet or residual_unet"
        )
    if config.norm != "instance":
        raise UserError(
            f"backbone.norm: {config.norm!r} cannot be written into nnU-Net's plans, which make a norm from its "
            "channel count alone; pretrain with backbone.norm=instance, or use --to monai"
        )
    dimensions = config.dimensions
    return {
        "network_class_name": class_name,
        "arch_kwargs": unet_arguments(config)
        | {
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "nonlin": "torch.nn.LeakyReLU",
        },
        "_kw_requires_import": list(IMPORTED),
    }


def adaptation_plan(
    config: BackboneConfig, network: Any, patch_size: list[int], spacing_mm: list[float] | None
) -> dict[str, Any]:
    """What newer nnU-Net reads of a pretraining: the architecture, the data it saw, and where the encoder sits.

    Plain Python values only: nnU-Net loads the file with `weights_only=True`. A spacing of None means that nnU-Net
    keeps the target dataset's own.
    """
    architecture = architecture_section(config)
    return {
        "architecture_plans": {
            "arch_class_name": architecture["network_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "arch_kwargs_requiring_import": architecture["_kw_requires_import"],
        },
        "pretrain_plan": {
            "configurations": {"voxtrast": {"spacing": spacing_mm, "patch_size": list(patch_size)}},
        },
        "pretrain_num_input_channels": config.input_channels,
        "recommended_downstream_patchsize": list(patch_size),
        # The library knows these of its own networks; the plain U-Net's stem is a part of its encoder.
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),
        "key_to_lpe": None,  # positional embeddings: only transformers have them
    }


def plans_snippet(config: BackboneConfig, patch_size: list[int]) -> dict[str, Any]:
    """Configurations to merge into the target dataset's plans; nnU-Net inherits the rest from its own.

    The second is the first under another name: nnU-Net's folder of results is named by the configuration, and the arm
    from scratch would replace the pretrained one's.
    """
    name = f"{config.dimensions}d_voxtrast"
    pretrained = {
        "inherits_from": CONFIGURATION[config.dimensions],
        "patch_size": list(patch_size),
        "architecture": architecture_section(config),
    }
    return {"configurations": {name: pretrained, f"{name}_scratch": {"inherits_from": name}}}


def write_nnunet(source: Source, file: Path, *, patch_size: list[int] | None = None, force: bool = False) -> Exported:
    """Writes FILE (`.pth`), the plans `.plans.json` and the card beside it; see `export`."""
    if file.suffix != ".pth":
        raise UserError(f"{file}: nnU-Net's weights end in .pth; name the file {file.with_suffix('.pth').name}")
    plans_file, about_file = file.with_suffix(".plans.json"), card_file(file)
    refuse_existing((file, plans_file, about_file), force)
    config = source.config
    patch, patch_source = _patch(config, source.description, patch_size)
    snippet = plans_snippet(config, patch)
    weights = {name: tensor for name, tensor in source.network.state_dict().items() if ".seg_layers." not in name}
    section = architecture_section(config)
    expected = network_of_plans(section, config.input_channels).state_dict()
    fit = examine(
        section["network_class_name"], expected, weights,
        task_layers=source.task_layers, filled=source.untrained, partly=source.partly,
    )  # fmt: skip
    content = {
        "network_weights": weights,
        "nnssl_adaptation_plan": adaptation_plan(config, source.network, patch, source.description.get("spacing_mm")),
        "voxtrast": {**source.description, "not_pretrained": source.untrained},
    }
    name = next(iter(snippet["configurations"]))
    use = [
        f"add the configurations {name!r} and '{name}_scratch' of {plans_file.name} to the plans of the dataset, then:",
        f"nnUNetv2_train DATASET {name} FOLD -pretrained_weights {file}",
    ]
    write_whole(file, lambda partial: torch.save(content, partial))
    write_json(plans_file, snippet)
    write_json(about_file, card(source, "nnunet", file, fit, use))
    lines = [
        f"{file}: {len(weights)} names (aliases included), as nnU-Net builds the network",
        f"{plans_file}: the configurations {name!r} and, to compare with, '{name}_scratch' for the target dataset's "
        f"plans; patch size {patch} ({patch_source})",
        f"{about_file}: where the weights come from",
    ]
    return Exported((file, plans_file, about_file), fit, [*lines, *fit.lines(), "then: " + use[1]])


def network_of_plans(section: dict[str, Any], input_channels: int) -> nn.Module:
    """The network that nnU-Net builds from this entry of its plans."""
    arguments = dict(section["arch_kwargs"])
    for name in section["_kw_requires_import"]:
        arguments[name] = arguments[name] and locate(arguments[name])
    build: Any = locate(section["network_class_name"])
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = build(
            input_channels=input_channels, num_classes=CLASSES, deep_supervision=True, **arguments
        )
    return network


def _patch(config: BackboneConfig, description: dict[str, Any], wanted: list[int] | None) -> tuple[list[int], str]:
    """The patch size of the plans, and where it comes from."""
    if wanted is not None:
        patch, source = list(wanted), "as asked"
    elif description.get("crop"):
        patch, source = list(description["crop"]), "the crop of pretraining"
    else:
        rounded = -(-DEFAULT_PATCH // config.stride) * config.stride
        patch = [rounded] * config.dimensions
        source = "the weights do not say the crop of pretraining: change it to what fits the data"
    if len(patch) != config.dimensions or any(size <= 0 or size % config.stride for size in patch):
        raise UserError(
            f"patch size {patch}: expected {config.dimensions} multiples of {config.stride}, the network's total stride"
        )
    return patch, source
