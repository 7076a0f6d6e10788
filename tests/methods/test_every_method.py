"""Of every method: untrained is what no loss reaches, whatever terms are active, and images have one channel."""

from typing import Any

import pytest
import torch

from voxtrast.engine.config import load_config
from voxtrast.methods import METHODS, Batch, Method
from voxtrast.methods.stages import Stage

TINY = [f"{name}-tiny" for name in sorted(METHODS)]


def made(recipe: str, *words: str) -> Method:
    torch.manual_seed(0)
    config = load_config(recipe, words)
    if not words:  # the names are those of any width
        config = load_config(recipe, [f"backbone.features={[4] * config.backbone.levels}"])
    method: Method = METHODS[config.method.name](config.method, config.backbone, config.views)
    if config.stages:
        method.set_stages(config.stages, 100)
    return method


def batch_for(method: Method, count: int = 2) -> Batch:
    dimensions = len(method.views.crop)
    batch: Batch = {"position": torch.linspace(0, 1, count), "case": ["a"] * count}
    for name, view in method.views.views.items():
        size = (count, 1, *(view.size or method.views.crop))
        batch[name] = torch.randn(size)
        if view.clean:
            batch[f"{name}_clean"] = torch.randn(size)
        batch[f"{name}_flips"] = torch.zeros(count, dimensions, dtype=torch.int64)
        batch[f"{name}_quarter_turns"] = torch.zeros(count, dtype=torch.int64)
        if view.displacement:
            batch["displacement"] = torch.randn(count, dimensions, *size[2:])
            batch["mask"] = torch.ones(size)
    return batch


def unreached(method: Method, step: int) -> set[str]:
    """Names in `transferable` of parameters without a gradient, but for biases that a norm takes away."""
    torch.stack(list(method(batch_for(method), step).values())).sum().backward()
    backbone: Any = method.backbone
    found = set()
    for name, parameter in backbone.network.named_parameters(remove_duplicate=False):
        frozen_bias = not parameter.requires_grad and name.endswith("bias") and "conv" in name
        if name in method.transferable() and parameter.grad is None and not frozen_bias:
            found.add(name)
    return found


@pytest.mark.parametrize("recipe", TINY)
def test_a_recipe_names_what_its_losses_do_not_reach(recipe: str) -> None:
    method = made(recipe)
    expected = unreached(method, 99)  # of the last stage, which has all terms
    named = set(method.untrained())
    assert expected <= named
    backbone: Any = method.backbone
    trained = {n for n, p in backbone.network.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert not named & trained


@pytest.mark.parametrize(
    ("recipe", "term"),
    [("pcrl-tiny", "contrast"), ("jcl-tiny", "consistency"), ("dira-tiny", "discriminative")],
)
@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param([], id="as it is"),
        pytest.param(
            ["backbone.architecture=swin_unetr", "backbone.features=[12]", "backbone.norm=''"],
            id="swin_unetr",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_decoder_that_no_active_term_needs_is_named(recipe: str, term: str, backbone: list[str]) -> None:
    crop = {"jcl-tiny": "views.crop=[64,128,128]"}.get(recipe, "views.crop=[32,64,64]") if backbone else ""
    method = made(recipe, *backbone, *([crop] if crop else []))
    method.set_stages([Stage(terms={term: 1.0})], 10)
    if backbone:  # too large to run here: by the names of MONAI's blocks
        named = {name.split(".")[0] for name in method.untrained()}
        assert {"decoder1", "decoder5", "encoder1", "encoder4"} <= named
        assert not named & {"swinViT", "encoder10"}
        return
    expected = unreached(method, 0)
    assert expected
    assert expected <= set(method.untrained())
    assert all(name.startswith("decoder") for name in method.untrained())


@pytest.mark.parametrize("recipe", ["pcrl-tiny", "dira-tiny"])
def test_what_follows_the_network_begins_anew_with_other_weights(recipe: str) -> None:
    method = made(recipe)
    for step in range(2):
        method(batch_for(method), step)
        method.after_step(step)
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(0.1)
    method.weights_loaded(2)
    if recipe == "pcrl-tiny":
        twin, bank, normalizer = method.backbone_twin, method.bank, method.normalizer.item()
        assert normalizer == 0
        method(batch_for(method), 2)
        assert method.normalizer.item() > 0  # measured again
    else:
        twin, bank = method.discrimination.key_backbone, method.discrimination.bank
    assert bank.pushed.item() == 0
    for own, theirs in zip(twin.tensors().values(), method.backbone.parameters(), strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("recipe", TINY)
def test_a_network_of_several_channels_is_refused(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"backbone\.input_channels: a store has one channel, got 3; take 1"):
        made(recipe, "backbone.input_channels=3")
