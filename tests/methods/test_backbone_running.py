"""How a backbone runs changes nothing of what it computes, nor of what is saved."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxtrast.methods import Backbone, BackboneConfig
from voxtrast.methods.backbones import running
from voxtrast.methods.parts.momentum_twin import MomentumTwin

SMALL: dict[str, Any] = {"features": [4, 8, 8], "encoder_blocks": [1], "decoder_blocks": [1]}
NETWORKS: list[Any] = [
    {"architecture": "plain_unet", **SMALL},
    {"architecture": "plain_unet", **SMALL, "norm": "batch"},
    {"architecture": "residual_unet", **SMALL, "skips": False},
    {"architecture": "residual_unet", **SMALL, "dimensions": 2},
    pytest.param({"architecture": "resnet18_unet", "dimensions": 2}, marks=pytest.mark.slow),
    pytest.param({"architecture": "resnet18_unet"}, marks=pytest.mark.slow),
    pytest.param({"architecture": "swin_unetr", "features": [12]}, marks=pytest.mark.slow),
    pytest.param({"architecture": "residual_unet", **SMALL, "norm": "group"}, marks=pytest.mark.slow),
]


def backbone(network: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(**network, **options)).to(dtype)


def image_for(model: Backbone, dtype: torch.dtype = torch.float32) -> Tensor:
    sides = [2 * model.config.stride, *[model.config.stride] * (model.config.dimensions - 1)]
    return torch.randn(2, 1, *sides, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(model: Backbone, image: Tensor) -> dict[str, Tensor]:
    """Gradients and statistics after two forwards that share the weights, as a method with two views has."""
    total = torch.zeros((), dtype=torch.float64)
    for view in (image, image.flip(2)):
        encoder_maps, decoder_maps = model(view)
        for each in (*encoder_maps, *decoder_maps):
            total = total + each.double().square().mean()
    total.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"total": total.detach(), **found, **dict(model.named_buffers())}


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: " ".join(map(str, network.values())))
def test_levels_that_run_again_in_backward_change_no_bit(network: dict[str, Any], levels: int) -> None:
    plain, again = backbone(network), backbone(network, checkpoint_levels=levels)
    assert list(again.state_dict()) == list(plain.state_dict())
    image = image_for(plain)
    wanted, found = step(plain, image), step(again, image)
    assert set(found) == set(wanted)
    different = [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]
    assert not different
    assert all(torch.equal(a, b) for a, b in zip(*(list_of(each, image) for each in (again, plain)), strict=True))


def list_of(model: Backbone, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        encoder_maps, decoder_maps = model.eval()(image)
    return [*encoder_maps, *decoder_maps]


def test_levels_that_run_again_do_so_in_the_precision_of_the_forward() -> None:
    plain, again = backbone(NETWORKS[0]), backbone(NETWORKS[0], checkpoint_levels=2)
    image = image_for(plain)
    results = []
    for model in (plain, again):
        with torch.autocast("cpu", torch.bfloat16):
            fine = model(image)[1][-1]
        assert fine.dtype == torch.bfloat16
        fine.float().square().mean().backward()
        results.append([each.grad for each in model.parameters() if each.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Kept:
    """Counts the bytes that autograd keeps for backward, each storage once; parameters aside."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {each.untyped_storage().data_ptr() for each in module.parameters()}
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def of(self, work: Any) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            self.result = work()
        return sum(self.sizes.values())


def test_each_level_that_runs_again_needs_less_memory() -> None:
    network = {"features": [8, 16, 16], "encoder_blocks": [2], "decoder_blocks": [2]}
    image = torch.randn(1, 1, 32, 32, 32)
    kept = []
    for levels in range(4):
        model = backbone(network, checkpoint_levels=levels)
        kept.append(Kept(model).of(lambda model=model: model(image)))
    assert kept[1] < 0.5 * kept[0]
    assert kept[3] < kept[2] < kept[1]


def test_nothing_is_kept_where_there_is_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "checkpoint", None)  # would fail if it were called
    model = backbone(NETWORKS[0], checkpoint_levels=3)
    with torch.no_grad():
        model(image_for(model))


def test_a_momentum_twin_follows_with_levels_that_run_again() -> None:
    model = backbone(NETWORKS[1], checkpoint_levels=2)
    twin = MomentumTwin(model, 0.5)
    image = image_for(model)
    before = copy.deepcopy(dict(twin.named_buffers()))
    twin(image)
    model(image)
    tracked = "network.network.encoder.stages.0.0.convs.0.norm.num_batches_tracked"
    assert dict(twin.named_buffers())[tracked] == before[tracked] + 1
    assert twin.network.network is not model.network


@pytest.mark.parametrize("network", [NETWORKS[0], NETWORKS[3]], ids=["3-D", "2-D"])
def test_channels_last_computes_the_same_and_keeps_the_order(network: dict[str, Any]) -> None:
    plain, last = (backbone(network, torch.float64, channels_last=choice) for choice in (False, True))
    image = image_for(plain, torch.float64)
    wanted, found = step(plain, image), step(last, image)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: name + m)
    assert all(each.is_contiguous() for each in last.parameters())
    order = torch.channels_last_3d if image.ndim == 5 else torch.channels_last
    seen: list[bool] = []
    model = backbone(network, channels_last=True)
    convolutions = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    for each in convolutions:
        each.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous(memory_format=order)))
    model(image.float())
    assert len(seen) >= 5
    assert all(seen)


@pytest.mark.slow  # compiles
def test_a_compiled_backbone_computes_the_same_under_the_same_names() -> None:
    plain, compiled = (backbone(NETWORKS[0], torch.float64, compile=choice) for choice in (False, True))
    image = image_for(plain, torch.float64)
    wanted, found = step(plain, image), step(compiled, image)
    assert list(found) == list(wanted)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: name + m)
    twin = MomentumTwin(compiled, 0.5)
    with torch.no_grad():
        next(iter(compiled.parameters())).zero_()
    assert not torch.equal(twin(image)[0][0], compiled(image)[0][0])  # each runs its own weights
    running.check_compiler(torch.device("cpu"))


def test_without_a_compiler_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("\nno g++ here\nmore")

    monkeypatch.setattr(torch, "compile", lambda work: broken)
    with pytest.raises(ValueError, match=r"backbone\.compile: .*\(no g\+\+ here\); install .*backbone\.compile=false$"):
        running.check_compiler(torch.device("cpu"))


def test_what_is_said_of_weights_does_not_say_how_they_ran() -> None:
    config = BackboneConfig(**SMALL, checkpoint_levels=2, channels_last=True, compile=False)
    said = config.to_dict()
    assert said == BackboneConfig(**SMALL).to_dict()
    assert not set(said) & set(running.FIELDS)
    assert BackboneConfig.from_dict(said).features == config.features


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The order of additions must not depend on the machine's load."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("levels", [-1, 4])
def test_more_levels_than_there_are_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.checkpoint_levels: the network has 3 levels, got {levels}"):
        backbone(NETWORKS[0], checkpoint_levels=levels)
