"""Every backbone by name: its maps are the network's own, its keys the library's, and what it cannot do it says."""

from typing import Any

import pytest
import torch
from monai.networks.nets.flexible_unet import FlexibleUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor

from voxtrast.methods import Backbone, BackboneConfig, build_network, transferable_state
from voxtrast.methods.backbone import ARCHITECTURES, left_out
from voxtrast.methods.parts.momentum_twin import MomentumTwin

SMALL = {"features": [8, 16, 24], "encoder_blocks": [1], "decoder_blocks": [1]}
PRESETS = ["residual_unet_s", "residual_unet_m", "residual_unet_l"]
FREE = ["plain_unet", "residual_unet"]
# The smallest of each that a test can afford: of nnU-Net's with narrow maps, of Swin UNETR with a feature size of 12.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain_unet": SMALL,
    "residual_unet": SMALL,
    "resnet18_unet": {},
    "resnet50_unet": {},
    "swin_unetr": {"features": [12]},
}
NETWORKS = [
    pytest.param(name, dimensions, marks=[pytest.mark.slow] if (name, dimensions) == ("resnet50_unet", 3) else [])
    for name in SETTINGS
    for dimensions in (2, 3)
]


def small(architecture: str, dimensions: int, **more: Any) -> BackboneConfig:
    return BackboneConfig(architecture=architecture, dimensions=dimensions, **{**SETTINGS[architecture], **more})


def image_for(config: BackboneConfig, samples: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The smallest that the network takes."""
    sides = [config.stride] * (config.dimensions - 1)
    return torch.randn(samples, 1, *sides, 2 * config.stride, dtype=dtype)


def last_layer(network: Any) -> Any:
    for name in ("segmentation_head", "out"):
        if hasattr(network, name):
            return getattr(network, name)
    return network.decoder.seg_layers[-1]


@pytest.mark.parametrize(("architecture", "dimensions"), NETWORKS)
def test_the_maps_are_those_that_the_network_computes(architecture: str, dimensions: int) -> None:
    torch.manual_seed(0)
    config = small(architecture, dimensions)
    backbone = Backbone(config)
    image = image_for(config, samples=2)
    with torch.no_grad():
        encoder_maps, decoder_maps = backbone(image)
        torch.testing.assert_close(
            last_layer(backbone.network)(decoder_maps[-1]), backbone.network(image), rtol=0, atol=0
        )
    assert [m.shape[1] for m in encoder_maps] == backbone.encoder_channels
    assert [m.shape[1] for m in decoder_maps] == backbone.decoder_channels
    sizes = image.shape[2:]
    assert [m.shape[2:] for m in encoder_maps] == [torch.Size(s // f for s in sizes) for f in backbone.strides]
    assert [m.shape[2:] for m in decoder_maps] == [torch.Size(s // f for s in sizes) for f in backbone.decoder_strides]
    assert (backbone.strides[-1], backbone.decoder_strides[-1]) == (config.stride, 1)
    assert len(decoder_maps) == config.levels == backbone.decoder_blocks + 1


@pytest.mark.parametrize("architecture", FREE)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_maps_are_those_of_the_network_with_other_norms(architecture: str, norm: str) -> None:
    config = small(architecture, 3, norm=norm)
    backbone, image = Backbone(config), image_for(config, samples=2)
    _, maps = backbone(image)
    torch.testing.assert_close(last_layer(backbone.network)(maps[-1]), backbone.network(image), rtol=0, atol=0)


def library_network(config: BackboneConfig, classes: int) -> torch.nn.Module:
    """As a user of MONAI writes it down; nnU-Net's own are built by nnU-Net in the tests of the export."""
    if config.architecture == "swin_unetr":
        return SwinUNETR(1, classes, feature_size=config.features[0], spatial_dims=config.dimensions)
    if config.architecture.startswith("resnet"):
        name = config.architecture.removesuffix("_unet")
        return FlexibleUNet(1, classes, name, pretrained=False, spatial_dims=config.dimensions)
    return build_network(config, classes)


@pytest.mark.parametrize(("architecture", "dimensions"), NETWORKS)
def test_transferable_tensors_fill_a_network_of_the_library_but_for_its_last_layers(
    architecture: str, dimensions: int
) -> None:
    torch.manual_seed(0)
    config = small(architecture, dimensions)
    backbone = Backbone(config).eval()
    network = library_network(config, classes=2).eval()
    pretrained = transferable_state(backbone.network)
    missing, unexpected = network.load_state_dict(pretrained, strict=False)
    assert not unexpected
    assert missing
    assert all(key.startswith(left_out(network)) for key in missing)
    last_layer(network).load_state_dict(last_layer(backbone.network).state_dict())
    assert set(pretrained) == set(transferable_state(network))
    if dimensions == 2:  # with its last layer, too, it is the same network
        image = image_for(config)
        with torch.no_grad():
            assert torch.equal(network(image), backbone.network(image))


def perturb(backbone: Backbone) -> None:
    """Residual blocks begin as the identity, where much has no gradient yet."""
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "config",
    [small(name, 3, norm=norm) for name in FREE for norm in ("instance", "group", "batch")]
    + [small("resnet18_unet", 2), small("swin_unetr", 2)]
    + [
        pytest.param(small(name, 3), marks=pytest.mark.slow)
        for name in ("resnet18_unet", "resnet50_unet", "swin_unetr")
    ],
    ids=lambda config: f"{config.architecture}-{config.norm}-{config.dimensions}d",
)
def test_what_has_no_gradient_is_left_out_of_training(config: BackboneConfig) -> None:
    """In float64 the frozen biases are seen to make no difference, and all that is trained does."""
    torch.manual_seed(0)
    backbone = Backbone(config).double()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert any(name.startswith(tuple(f"network.{part}" for part in left_out(backbone.network))) for name in frozen)
    has_such_biases = config.architecture in FREE and config.norm != "group"
    assert any(name.endswith(".convs.0.conv.bias") for name in frozen) == has_such_biases
    backbone.requires_grad_(True)
    perturb(backbone)
    _, maps = backbone(image_for(config, samples=2, dtype=torch.float64))
    (maps[-1] * torch.randn_like(maps[-1])).sum().backward()
    for name, parameter in backbone.named_parameters():
        size = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert (size < 1e-9) == (name in frozen), (name, size)


@pytest.mark.parametrize("architecture", ["residual_unet", "resnet18_unet", "swin_unetr"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_decoder_blocks_that_are_not_trained_are_frozen_and_listed(architecture: str, blocks: int) -> None:
    torch.manual_seed(0)
    config = small(architecture, 2)
    backbone = Backbone(config, decoder_blocks=blocks).double()
    untrained = {f"network.{name}" for name in backbone.untrained()}
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert bool(untrained) == (blocks < config.levels - 1)
    assert not trained & untrained
    perturb(backbone)
    _, maps = backbone(image_for(config, samples=2, dtype=torch.float64))
    assert len(maps) == blocks + 1
    (maps[-1] * torch.randn_like(maps[-1])).sum().backward()
    for name, parameter in backbone.named_parameters():
        size = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert (size > 1e-9) == (name in trained), (name, size)


@pytest.mark.parametrize("architecture", ["plain_unet", "residual_unet", "resnet18_unet"])
def test_without_skips_the_decoder_is_that_with_skips_of_zeros(architecture: str) -> None:
    torch.manual_seed(0)
    dimensions = 3 if architecture in FREE else 2
    config = small(architecture, dimensions)
    backbone, image = Backbone(config).double().eval(), image_for(config, dtype=torch.float64)
    alone = Backbone(small(architecture, dimensions, skips=False)).double().eval()
    alone.load_state_dict(backbone.state_dict())
    *skips, bottleneck = backbone.encode(image)
    expected = backbone.decode([*(torch.zeros_like(skip) for skip in skips), bottleneck])
    for ours, theirs in zip(alone(image)[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with_skips = backbone(image)[1]
    assert not torch.allclose(with_skips[1], expected[1])


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_gradient_passes_the_shortcuts_of_resnet18(dimensions: int) -> None:
    """In MONAI it does not: with the convolutions beside a shortcut silenced, nothing comes through."""
    config = small("resnet18_unet", dimensions)
    networks: list[Any] = [build_network(config, 2), library_network(config, 2)]
    outputs, gradients = [], []
    image = torch.rand(2, 64, *[8] * dimensions, requires_grad=True)
    for network in networks:
        block = network.encoder.layer2[0]
        torch.nn.init.zeros_(block.bn2.weight)
        outputs.append(block(image))
        gradients.append(torch.autograd.grad(outputs[-1].sum(), image)[0].norm().item())
    assert torch.equal(*outputs)
    assert gradients[0] > 1
    assert gradients[1] == 0


@pytest.mark.parametrize("architecture", ["residual_unet", "resnet18_unet", "swin_unetr"])
def test_a_momentum_twin_has_the_same_maps_and_moves_alone(architecture: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(small(architecture, 2)).eval()
    twin = MomentumTwin(backbone, momentum=0.5).eval()
    image = image_for(backbone.config)
    assert torch.equal(twin(image)[1][-1], backbone(image)[1][-1])
    assert not any(parameter.requires_grad for parameter in twin.parameters())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architecture": "unet"}, "backbone.architecture: 'unet' is not one of"),
        ({"dimensions": 4}, "backbone.dimensions"),
        ({"input_channels": 0}, "backbone.input_channels"),
        ({"norm": "layer"}, "backbone.norm"),
        ({"features": [8]}, "backbone.features"),
        ({"encoder_blocks": [1, 2]}, "backbone.encoder_blocks"),
        ({"architecture": "residual_unet_l", "features": [8, 16]}, r"backbone.features: \[8, 16\], but.*take \[32, 64"),
        (
            {"architecture": "residual_unet_s", "encoder_blocks": [2]},
            r"backbone.encoder_blocks.*take \[1, 3, 4, 6, 6\]",
        ),
        ({"architecture": "residual_unet_m", "decoder_blocks": [2]}, r"backbone.decoder_blocks.*take \[1\]"),
        ({"architecture": "resnet18_unet", "features": [8, 16, 24]}, "backbone.features"),
        ({"architecture": "resnet50_unet", "encoder_blocks": [2]}, r"backbone.encoder_blocks.*take \[3, 4, 6, 3\]"),
        ({"architecture": "resnet50_unet", "decoder_blocks": [1]}, "backbone.decoder_blocks"),
        ({"architecture": "resnet18_unet", "norm": "instance"}, "backbone.norm.*batch norm alone; take 'batch'"),
        ({"architecture": "resnet18_unet", "negative_slope": 0.2}, "backbone.negative_slope.*take 0.01"),
        ({"architecture": "swin_unetr", "features": [32]}, r"multiple of 12, got 32; write backbone.features=\[48\]"),
        ({"architecture": "swin_unetr", "features": [24, 48]}, r"its feature size alone; write backbone.features=\[48"),
        ({"architecture": "swin_unetr", "encoder_blocks": [4]}, "backbone.encoder_blocks"),
        ({"architecture": "swin_unetr", "norm": "group"}, "backbone.norm.*take 'instance'"),
        ({"architecture": "swin_unetr", "negative_slope": 0.2}, "backbone.negative_slope"),
        ({"architecture": "swin_unetr", "skips": False}, "backbone.skips.*take True"),
    ],
)
def test_a_wrong_field_is_named_and_none_is_ignored(values: dict, named: str) -> None:
    settings = {**SMALL, **values} if "architecture" not in values else values
    with pytest.raises(ValueError, match=named):
        build_network(BackboneConfig(**settings), classes=2)


def test_what_is_left_empty_becomes_the_architectures_own() -> None:
    assert BackboneConfig().features == [32, 64, 128, 256, 320]
    swin = BackboneConfig(architecture="swin_unetr", features=[24])
    assert (swin.features, swin.norm) == ([24, 24, 48, 96, 192, 384], "instance")
    assert (swin.levels, swin.stride) == (6, 32)
    resnet = BackboneConfig(architecture="resnet50_unet")
    assert (resnet.strides, resnet.decoder_channels) == ([2, 4, 8, 16, 32], [2048, 256, 128, 64, 32, 16])
    assert resnet.norm == "batch"
    for config in (swin, resnet):
        assert BackboneConfig.from_dict(config.to_dict()) == config
    # Each has lists of its own.
    resnet.features[0] = 1
    assert BackboneConfig(architecture="resnet50_unet").features[0] == 64


@pytest.mark.parametrize(
    ("architecture", "patch", "widest"),
    [("residual_unet_m", [128] * 3, 320), ("residual_unet_l", [192] * 3, 320), ("residual_unet_m", [256] * 2, 512)],
)
def test_the_presets_are_what_nnunets_planner_makes_of_isotropic_images(
    architecture: str, patch: list[int], widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patches are those of its own search, which takes minutes; depth and blocks are asked of it here."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners

    monkeypatch.setattr(ExperimentPlanner, "__init__", lambda *_: None)  # it wants a data set
    planners = {
        "residual_unet_m": residual_encoder_unet_planners.nnUNetPlannerResEncM,
        "residual_unet_l": residual_encoder_unet_planners.nnUNetPlannerResEncL,
    }
    planner = planners[architecture](0)
    least_edge = 4  # `UNet_featuremap_min_edge_length`
    _, strides, *_ = get_pool_and_conv_props([1.0] * len(patch), patch, least_edge, 999999)
    levels = len(strides)
    config = BackboneConfig(architecture=architecture, dimensions=len(patch))
    assert config.levels == levels
    assert all(stride == (2,) * len(patch) for stride in strides[1:])
    assert config.encoder_blocks == list(planner.UNet_blocks_per_stage_encoder[:levels])
    assert config.decoder_blocks * (levels - 1) == list(planner.UNet_blocks_per_stage_decoder[: levels - 1])
    assert config.features == [min(widest, 32 * 2**level) for level in range(levels)]


@pytest.mark.parametrize("architecture", PRESETS)
def test_a_preset_is_the_free_network_of_its_sizes(architecture: str) -> None:
    preset = BackboneConfig(architecture=architecture)
    free = BackboneConfig(**{**preset.to_dict(), "architecture": "residual_unet"})
    with torch.device("meta"):
        ours, theirs = (build_network(config, 2).state_dict() for config in (preset, free))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize(
    ("architecture", "size", "said"),
    [
        ("plain_unet", (8, 10, 8), r"3 multiples of 4 .* got \[8, 10, 8\]; take \[8, 12, 8\]"),
        ("plain_unet", (8, 8), "3 multiples of 4 .*; take as many numbers"),
        ("resnet18_unet", (40, 64, 64), r"multiples of 32 .*take \[64, 64, 64\]"),
        ("swin_unetr", (24, 32, 24), r"multiples of 32 .*take \[32, 32, 32\]"),
        ("swin_unetr", (32, 32, 32), r"single voxel, over which instance norm .*take \[32, 32, 64\]"),
        ("plain_unet", (4, 4, 4), r"single voxel.*take \[4, 4, 8\]"),
        ("resnet18_unet", (32, 32, 32), r"single voxel, over which batch norm .*take \[32, 32, 64\]"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_refused_with_one_that_it_can(
    architecture: str, size: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Backbone(small(architecture, 3))(torch.zeros(1, 1, *size))


def test_a_method_that_trains_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 levels have 2 decoder blocks, and the method trains 3"):
        Backbone(BackboneConfig(**SMALL), decoder_blocks=3)


def test_a_network_of_another_class_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv3d is none of the backbones' classes"):
        transferable_state(torch.nn.Conv3d(1, 1, 1))


def test_every_architecture_is_tested_here() -> None:
    assert set(SETTINGS) | set(PRESETS) == set(ARCHITECTURES)


def test_a_description_with_unknown_fields_is_refused() -> None:
    config = BackboneConfig(**SMALL)
    assert BackboneConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="depth"):
        BackboneConfig.from_dict({"depth": 3})
