import pytest
import torch

from voxtrast.methods import Backbone, BackboneConfig, build_network, transferable_state

SMALL = {"features": [8, 16, 24], "encoder_blocks": [1], "decoder_blocks": [1]}


@pytest.mark.parametrize("architecture", ["plain_unet", "residual_unet"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_the_maps_are_those_that_the_network_computes(architecture: str, dimensions: int, norm: str) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(architecture=architecture, dimensions=dimensions, norm=norm, **SMALL)
    backbone = Backbone(config)
    image = torch.randn(2, 1, *[8] * dimensions)
    encoder_maps, decoder_maps = backbone(image)
    assert [m.shape[1] for m in encoder_maps] == [8, 16, 24]
    assert [m.shape[1] for m in decoder_maps] == [24, 16, 8]
    assert [m.shape[-1] for m in decoder_maps] == [2, 4, 8]
    logits = backbone.network.decoder.seg_layers[-1](decoder_maps[-1])
    torch.testing.assert_close(logits, backbone.network(image), rtol=0, atol=0)


def test_transferable_tensors_fill_a_segmentation_network_but_for_its_last_layers() -> None:
    backbone = Backbone(BackboneConfig(**SMALL))
    network = build_network(backbone.config, classes=5)
    missing, unexpected = network.load_state_dict(transferable_state(backbone.network), strict=False)
    assert not unexpected
    assert all(key.startswith(("decoder.encoder.", "decoder.seg_layers.")) for key in missing)
    for name, tensor in transferable_state(backbone.network).items():
        assert torch.equal(network.state_dict()[name], tensor)


@pytest.mark.parametrize("architecture", ["plain_unet", "residual_unet"])
@pytest.mark.parametrize("norm", ["instance", "group"])
def test_what_has_no_gradient_is_left_out_of_training(architecture: str, norm: str) -> None:
    """In float64 the frozen biases are seen to make no difference, and all that is trained does."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(architecture=architecture, norm=norm, **SMALL)).double()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert any(".seg_layers." in name for name in frozen)
    assert (norm == "instance") == any(".conv.bias" in name for name in frozen)
    backbone.requires_grad_(True)
    with torch.no_grad():
        for parameter in backbone.parameters():  # residual blocks begin as the identity, where much has no gradient yet
            parameter.add_(0.1 * torch.randn_like(parameter))
    _, maps = backbone(torch.randn(1, 1, 16, 16, 16, dtype=torch.float64))
    (maps[-1] * torch.randn_like(maps[-1])).sum().backward()
    for name, parameter in backbone.named_parameters():
        size = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert (size < 1e-9) == (name in frozen), (name, size)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"architecture": "unet"}, "backbone.architecture"),
        ({"dimensions": 4}, "backbone.dimensions"),
        ({"norm": "layer"}, "backbone.norm"),
        ({"features": [8]}, "backbone.features"),
        ({"encoder_blocks": [1, 2]}, "backbone.encoder_blocks"),
    ],
)
def test_a_wrong_field_is_named(changed: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build_network(BackboneConfig(**{**SMALL, **changed}), classes=2)


def test_a_size_that_the_levels_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        Backbone(BackboneConfig(**SMALL))(torch.zeros(1, 1, 8, 10, 8))


def test_a_description_with_unknown_fields_is_refused() -> None:
    config = BackboneConfig(**SMALL)
    assert BackboneConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="depth"):
        BackboneConfig.from_dict({"depth": 3})
