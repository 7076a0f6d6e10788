import pytest
import torch
from torch import nn

from voxtrast.methods import Backbone, BackboneConfig
from voxtrast.methods.parts.momentum_twin import MomentumTwin


def moved(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_follows_by_its_formula_in_float32(dtype: torch.dtype) -> None:
    """A bfloat16 twin would not move at m = 0.999 at all."""
    torch.manual_seed(0)
    source = nn.Linear(5, 3)
    twin = MomentumTwin(source, 0.999)
    expected = [parameter.detach().double().clone() for parameter in source.parameters()]
    source.to(dtype)
    for _ in range(20):
        moved(source)
        twin.update(source)
        expected = [0.999 * old + 0.001 * new.detach().double()
                    for old, new in zip(expected, source.parameters(), strict=True)]  # fmt: skip
    for found, right in zip(twin.tensors().values(), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-7)


def test_the_twin_starts_as_its_source_and_stays_until_updated() -> None:
    torch.manual_seed(0)
    source = nn.Linear(5, 3)
    twin = MomentumTwin(source, 0.9)
    image = torch.randn(2, 5)
    before = source(image).detach()
    moved(source)
    torch.testing.assert_close(twin(image), before, rtol=0, atol=0)


def test_a_network_that_names_parameters_twice_is_followed_once() -> None:
    torch.manual_seed(0)
    source = Backbone(BackboneConfig(dimensions=2, features=[4, 8], encoder_blocks=[1], decoder_blocks=[1]))
    twin = MomentumTwin(source, 0.5)
    first = next(source.parameters()).detach().clone()
    moved(source)
    twin.update(source)
    name, parameter = next(source.named_parameters())
    torch.testing.assert_close(twin.tensors()[name], 0.5 * first + 0.5 * parameter.detach())


def test_the_twin_has_no_gradients_and_its_norms_own_statistics() -> None:
    source = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    twin = MomentumTwin(source, 0.9)
    assert not list(twin.parameters())
    assert not any(tensor.requires_grad for tensor in twin.tensors().values())
    assert not twin(torch.randn(4, 5).requires_grad_()).requires_grad
    statistics = twin.network[1].running_mean.clone()
    source[1].running_mean.fill_(7.0)
    twin.update(source)
    assert torch.equal(twin.network[1].running_mean, statistics)
    twin.eval()
    twin(torch.randn(4, 5))
    assert torch.equal(twin.network[1].running_mean, statistics)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum: expected 0 up to less than 1"):
        MomentumTwin(nn.Linear(2, 2), momentum)


def test_a_twin_that_begins_anew_is_its_source() -> None:
    source = nn.Linear(3, 2)
    twin = MomentumTwin(source, 0.9)
    with torch.no_grad():
        source.weight.add_(1)
    twin.copy(source)
    for own, theirs in zip(twin.tensors().values(), source.parameters(), strict=True):
        assert torch.equal(own, theirs)
        assert own.data_ptr() != theirs.data_ptr()
        assert not own.requires_grad


def test_its_tensors_have_the_sources_names_and_are_parameters_for_a_while() -> None:
    source = Backbone(BackboneConfig(dimensions=2, features=[4, 8], encoder_blocks=[1], decoder_blocks=[1]))
    twin = MomentumTwin(source, 0.5)
    assert set(twin.network.state_dict()) == set(source.state_dict())
    before = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    with twin.as_parameters():
        assert [name for name, _ in twin.network.named_parameters()] == [name for name, _ in source.named_parameters()]
    assert not list(twin.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())


def test_a_source_in_parts_is_not_followed() -> None:
    source = nn.Linear(5, 3)
    twin = MomentumTwin(source, 0.9)
    source.weight.data = torch.empty(0)  # as ZeRO 3 leaves it
    with pytest.raises(ValueError, match=r"weight: \(0,\) of the source for \(3, 5\); gather it first"):
        twin.update(source)
