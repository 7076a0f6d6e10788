"""What is frozen stays, what decays decays by layer, and every tensor of every network belongs to one layer."""

from pathlib import Path
from typing import Any

import pytest
import torch

from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.downstream.tuning import Plan, Tuning, layers_of
from voxtrast.engine.errors import UserError
from voxtrast.engine.weights import load_weights, save_weights
from voxtrast.methods.backbone import BackboneConfig, build_network

CONFIGS = [
    BackboneConfig(features=[4, 8, 8]),
    BackboneConfig(architecture="residual_unet", features=[4, 8, 8]),
    BackboneConfig(architecture="resnet18_unet"),
    BackboneConfig(architecture="swin_unetr", features=[12]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.architecture)
def test_every_tensor_has_one_layer_and_the_rate_falls_from_head_to_stem(config: BackboneConfig) -> None:
    network = build_network(config, 3)
    layers = layers_of(network, config, [], decay=0.5)
    found = [id(parameter) for layer in layers for parameter in layer.parameters]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in network.parameters()}
    rates = [layer.rate for layer in layers]
    assert rates == [0.5**depth for depth in range(len(layers))]
    names = [layer.name for layer in layers]
    assert names[0] == "head"
    assert names[1] == f"decoder.{config.levels - 2}"
    assert names[-1] == "encoder.0"
    # The stem is what the image meets: the last layer holds the tensor with as many input channels as the image.
    assert any(parameter.ndim == 5 and parameter.shape[1] == 1 for parameter in layers[-1].parameters)


def test_blocks_that_pretraining_did_not_reach_are_no_step_down_to_the_encoder() -> None:
    config = CONFIGS[0]
    network = build_network(config, 3)
    new = [name for name, _ in network.named_parameters() if not name.startswith("encoder.")]
    layers = layers_of(network, config, new, decay=0.5)
    assert [layer.name for layer in layers[:2]] == ["head", f"encoder.{config.levels - 1}"]
    assert [layer.rate for layer in layers] == [0.5**depth for depth in range(config.levels + 1)]


def run(weights: Path, store: Store, **settings: Any) -> dict[str, Any]:
    fixed = {"labels": 1, "seed": 0, "steps": 2, "batch": 1, "test_cases": 1, "progress": False, "surface": False}
    return finetune(weights, store.path, **{**fixed, **settings})


def changed(weights: Path, line: dict[str, Any]) -> set[str]:
    """First parts of the names of pretrained tensors that training moved."""
    before, _ = load_weights(weights)
    after, _ = load_weights(line["model"])
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_a_frozen_encoder_keeps_its_tensors_and_one_frozen_at_first_does_not(weights: Path, store: Store) -> None:
    assert changed(weights, run(weights, store)) == {"encoder", "decoder"}
    line = run(weights, store, freeze="encoder")
    assert line["model"] != run(weights, store)["model"]  # no arm takes another's place
    assert changed(weights, line) == {"decoder"}
    assert line["freeze"] == "encoder"
    assert line["tuned"]["never_trained"] == line["tuned"]["tensors"]["encoder"] > 0
    later = run(weights, store, freeze="encoder:1")
    assert changed(weights, later) == {"encoder", "decoder"}
    assert later["tuned"]["never_trained"] == 0


def test_a_warm_up_trains_the_head_alone_and_the_head_is_what_pretraining_did_not_fill(
    weights: Path, store: Store, tmp_path: Path
) -> None:
    tensors, description = load_weights(weights)
    listed = [name for name in tensors if name.startswith("decoder.stages.1.")]
    save_weights(tmp_path / "partial.safetensors", tensors, {**description, "untrained": listed})
    config = BackboneConfig.from_dict(description["backbone"])
    network = build_network(config, 3)
    plan = Plan(network, layers_of(network, config, listed), Tuning(head_warmup=2), steps=3)
    names = {name for name, _ in network.named_parameters()}
    for step in (1, 2, 3):
        plan.begin(step)
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        new = {name for name in names if name.startswith(("decoder.seg_layers.", "decoder.stages.1."))}
        assert trained == (names if step == 3 else new)
    line = run(tmp_path / "partial.safetensors", store, head_warmup=1)
    assert line["tuned"]["tensors"]["head"] == len(new)


def test_frozen_batch_norm_keeps_its_running_means() -> None:
    config = BackboneConfig(features=[4, 8], norm="batch")
    network = build_network(config, 2)
    plan = Plan(network, layers_of(network, config, []), Tuning(freeze="encoder:1"), steps=2)
    frozen, free = network.encoder.stages[0][0].convs[0].norm, network.decoder.stages[0].convs[0].norm
    for step, moves in ((1, False), (2, True)):
        plan.begin(step)
        before, other = frozen.running_mean.clone(), free.running_mean.clone()
        network(torch.randn(2, 1, 8, 8, 8))
        assert torch.equal(frozen.running_mean, before) is not moves
        assert not torch.equal(free.running_mean, other)


@pytest.mark.slow
def test_layer_decay_slows_the_stem(weights: Path, store: Store) -> None:
    before, _ = load_weights(weights)
    name = "encoder.stages.0.0.convs.0.conv.weight"
    moved = []
    for decay in (1.0, 0.5):
        line = run(weights, store, layer_decay=decay)
        after, _ = load_weights(line["model"])
        moved.append((after[name] - before[name]).abs().mean().item())
    # Adam's steps are as long as the rate: head, two blocks and three levels make 0.5 ** 5 at the stem.
    assert moved[1] / moved[0] == pytest.approx(0.5**5, rel=0.5)
    assert line["tuned"]["rates"]["encoder.0"] == pytest.approx(3e-3 * 0.5**5)


@pytest.mark.slow
def test_layers_that_are_all_alike_train_as_without_a_plan(weights: Path, store: Store) -> None:
    """The plan itself changes no number: a decay of almost 1 is training as usual."""
    usual, planned = run(weights, store), run(weights, store, layer_decay=1 - 1e-12)
    assert planned["loss"] == pytest.approx(usual["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": "decoder"}, "--freeze decoder: expected none, encoder or encoder:STEPS"),
        ({"freeze": "encoder:x"}, "--freeze encoder:x: expected none"),
        ({"freeze": "encoder:2"}, "expected 1 to 1 of the 2 steps; write --freeze encoder"),
        ({"layer_decay": 0.0}, "--layer-decay 0.0: expected above 0 to 1"),
        ({"layer_decay": 1.5}, "--layer-decay 1.5"),
        ({"head_warmup": 2}, "--head-warmup 2: expected 0 to 1 of the 2 steps"),
        ({"freeze": "encoder", "from_scratch": True}, "--from-scratch has no pretrained tensors: leave --freeze"),
        ({"mirror": "x"}, "--mirror x: expected one or more of d, h, w"),
        ({"overlap": 1.0}, "--overlap 1.0: expected a share from 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(
    settings: dict[str, Any], message: str, weights: Path, store: Store
) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(weights, store, **settings)
    assert not (weights.parent / "finetune").exists()


def test_what_is_trained_is_said(weights: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(weights, store, freeze="encoder:1", layer_decay=0.75, head_warmup=1, progress=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "of them new; the new ones alone for 1 steps; the encoder's" in said
    assert "frozen for 1 steps; learning rate 0.003 at the head to 0.00071 at the stem" in said
