"""Exports judged by nnU-Net itself: its plans build the network, its loader fills it, its maps are ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from typer.testing import CliRunner

from voxtrast.engine.cli import app
from voxtrast.engine.errors import UserError
from voxtrast.engine.export import export
from voxtrast.engine.export.nnunet import architecture_section
from voxtrast.engine.weights import save_weights
from voxtrast.methods.backbone import Backbone, BackboneConfig

CONFIGS = {
    "plain 3d": BackboneConfig(features=[4, 8, 8], negative_slope=0.2),
    "residual 3d": BackboneConfig(
        features=[4, 8, 8], architecture="residual_unet", encoder_blocks=[1, 2, 3], decoder_blocks=[1]
    ),
    "plain 2d": BackboneConfig(features=[4, 8, 8, 8], dimensions=2),
    "residual 2d": BackboneConfig(features=[4, 8], architecture="residual_unet", dimensions=2, input_channels=3),
}


def pretrained_run(folder: Path, config: BackboneConfig, **more: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(config)
    with torch.no_grad():
        for parameter in backbone.parameters():  # nothing may keep a value that initialisation would give
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_weights(
        folder / "weights.safetensors",
        backbone.transferable(),
        {
            "format": 1,
            "method": "cover",
            "recipe": "cover-3d",
            "step": 5,
            "backbone": config.to_dict(),
            "version": "0",
            **more,
        },
    )
    return backbone


def nnunet_network(architecture: dict[str, Any], channels: int) -> torch.nn.Module:
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        4,
        allow_init=True,
        deep_supervision=True,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_nnunet_builds_the_network_from_the_plans_and_loads_every_key(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    ours = pretrained_run(tmp_path / "run", config)
    export(tmp_path / "run", "nnunet", tmp_path / "out" / "weights.pth")

    snippet = json.loads((tmp_path / "out" / "weights.plans.json").read_text(encoding="utf-8"))
    dimensions = config.dimensions
    inherited = {"data_identifier": "nnUNetPlans", "patch_size": [7] * dimensions, "architecture": {}}
    plans = {"configurations": {"2d" if dimensions == 2 else "3d_fullres": inherited, **snippet["configurations"]}}
    configuration = PlansManager(plans).get_configuration(f"{dimensions}d_voxtrast")
    assert configuration.configuration["data_identifier"] == "nnUNetPlans"
    scratch = PlansManager(plans).get_configuration(f"{dimensions}d_voxtrast_scratch").configuration
    name = "inherits_from"
    assert {**scratch, name: ""} == {**configuration.configuration, name: ""}
    assert all(size % config.stride == 0 for size in configuration.patch_size)
    assert len(configuration.pool_op_kernel_sizes) == config.levels

    theirs = nnunet_network(configuration.configuration["architecture"], config.input_channels)
    load_pretrained_weights(theirs, str(tmp_path / "out" / "weights.pth"))
    expected = ours.network.state_dict()
    state = theirs.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state if ".seg_layers." not in key)

    # Opened up in the same way, their network gives our maps on both sides.
    opened = Backbone(config)
    opened.network = theirs
    image = torch.randn(2, config.input_channels, *[2 * config.stride] * dimensions)
    with torch.no_grad():
        for own, other in zip(ours(image), opened(image), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_adaptation_plan_locates_encoder_stem_and_input_of_the_network(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    pretrained_run(tmp_path, config, crop=[48] * config.dimensions)
    export(tmp_path, "nnunet", tmp_path / "weights.pth")
    # As newer nnU-Net opens it: plain values and tensors only.
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert set(plan) == {
        "architecture_plans",
        "pretrain_plan",
        "pretrain_num_input_channels",
        "recommended_downstream_patchsize",
        "key_to_encoder",
        "key_to_stem",
        "keys_to_in_proj",
        "key_to_lpe",
    }
    architecture = plan["architecture_plans"]
    network = nnunet_network(
        {
            "network_class_name": architecture["arch_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "_kw_requires_import": architecture["arch_kwargs_requiring_import"],
        },
        plan["pretrain_num_input_channels"],
    )
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {name.removeprefix(key + "."): tensor for name, tensor in weights.items() if name.startswith(key + ".")}
        network.get_submodule(key).load_state_dict(part)  # strict: no key missing, none left over
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1] == config.input_channels
    [configuration] = plan["pretrain_plan"]["configurations"].values()
    assert configuration == {"spacing": None, "patch_size": [48] * config.dimensions}
    assert plan["recommended_downstream_patchsize"] == [48] * config.dimensions


def test_aliases_cost_no_bytes(tmp_path: Path) -> None:
    config = BackboneConfig(features=[16, 32, 64])
    pretrained_run(tmp_path, config)
    export(tmp_path, "nnunet", tmp_path / "weights.pth")
    assert (tmp_path / "weights.pth").stat().st_size < 1.5 * (tmp_path / "weights.safetensors").stat().st_size


def test_what_plans_cannot_say_is_refused(tmp_path: Path) -> None:
    pretrained_run(tmp_path, BackboneConfig(features=[8, 16], norm="group"))
    with pytest.raises(UserError, match=r"norm: 'group'.*backbone.norm=instance, or use --to monai"):
        export(tmp_path, "nnunet", tmp_path / "weights.pth")
    assert not (tmp_path / "weights.pth").exists()


@pytest.mark.parametrize("architecture", ["swin_unetr", "resnet50_unet"])
def test_a_network_of_monai_is_refused_with_the_way_that_works(architecture: str) -> None:
    with pytest.raises(UserError, match=rf"{architecture} is monai\..*use --to monai"):
        architecture_section(BackboneConfig(architecture=architecture))


def test_a_preset_is_written_out_in_the_plans() -> None:
    section = architecture_section(BackboneConfig(architecture="residual_unet_l"))
    assert section["network_class_name"].endswith("unet.ResidualEncoderUNet")
    assert section["arch_kwargs"]["features_per_stage"] == [32, 64, 128, 256, 320, 320]
    assert section["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6]
    assert section["arch_kwargs"]["n_conv_per_stage_decoder"] == [1] * 5


def test_the_command_takes_a_patch_size(tmp_path: Path) -> None:
    pretrained_run(tmp_path, BackboneConfig(features=[4, 8, 8]))
    words = ["export", str(tmp_path), str(tmp_path / "w.pth"), "--to", "nnunet", "--patch-size"]
    assert CliRunner().invoke(app, [*words, "40,56,44"]).exit_code == 0
    plans = json.loads((tmp_path / "w.plans.json").read_text())
    assert plans["configurations"]["3d_voxtrast"]["patch_size"] == [40, 56, 44]
    said = CliRunner().invoke(app, [*words, "40x56"]).exception
    assert isinstance(said, UserError)
    assert str(said).startswith("--patch-size 40x56: expected whole numbers")


def test_the_patch_size_must_suit_the_network(tmp_path: Path) -> None:
    pretrained_run(tmp_path, BackboneConfig(features=[4, 8, 8]))
    lines = export(tmp_path, "nnunet", tmp_path / "weights.pth", patch_size=[40, 56, 40]).lines
    assert any("[40, 56, 40]" in line for line in lines)
    for wrong in ([40, 56], [40, 56, 42], [0, 8, 8]):
        with pytest.raises(UserError, match="expected 3 multiples of 4"):
            export(tmp_path, "nnunet", tmp_path / "other.pth", patch_size=wrong)
    with pytest.raises(UserError, match=r"end in .pth; name the file weights.pth"):
        export(tmp_path, "nnunet", tmp_path / "weights.pt")
