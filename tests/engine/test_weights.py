"""Weights files: what goes in comes out, and what cannot be used says why."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from voxtrast.engine.errors import UserError
from voxtrast.engine.weights import find_weights, load_into, load_weights, save_weights
from voxtrast.methods.backbone import Backbone, BackboneConfig, build_network, transferable_state

CONFIGS = [
    BackboneConfig(features=[4, 8, 8]),
    BackboneConfig(features=[4, 8, 8], architecture="residual_unet"),
    BackboneConfig(features=[4, 8], dimensions=2),
    BackboneConfig(features=[8, 16], norm="group"),
    BackboneConfig(architecture="resnet18_unet", dimensions=2),
    BackboneConfig(architecture="swin_unetr", features=[12]),
]


def described(config: BackboneConfig) -> dict:
    return {
        "format": 1,
        "method": "cover",
        "recipe": "cover-3d",
        "step": 3,
        "backbone": config.to_dict(),
        "version": "0",
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.architecture}-{c.dimensions}d-{c.norm}")
def test_every_tensor_comes_back_under_every_name_and_into_a_network(config: BackboneConfig, tmp_path: Path) -> None:
    saved = Backbone(config).transferable()
    save_weights(tmp_path / "new" / "w.safetensors", saved, described(config))
    tensors, description = load_weights(tmp_path / "new" / "w.safetensors")
    assert description == described(config)
    assert set(tensors) == set(saved)
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)

    network = build_network(config, classes=4)
    left = load_into(network, tensors)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in transferable_state(network).items())
    assert left
    assert all(name.startswith(("decoder.seg_layers.", "segmentation_head.", "out.")) for name in left)


def test_a_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    config = CONFIGS[0]
    save_weights(tmp_path / "w.safetensors", Backbone(config).transferable(), described(config))
    stored = load_file(tmp_path / "w.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        parameter.numel()
        for name, parameter in build_network(config, 2).named_parameters()
        if ".seg_layers." not in name
    )
    assert all(name.startswith(("encoder.", "decoder.")) and ".all_modules." not in name for name in stored)
    # The first names alone fill a network: the others are the same tensors.
    network = build_network(config, classes=2)
    load_into(network, stored)
    assert torch.equal(
        network.state_dict()["encoder.stages.0.0.convs.0.all_modules.0.weight"],
        stored["encoder.stages.0.0.convs.0.conv.weight"],
    )


def test_copies_of_a_shared_tensor_are_stored_once_too(tmp_path: Path) -> None:
    config = CONFIGS[0]
    shared = Backbone(config).transferable()
    save_weights(tmp_path / "shared", shared, described(config))
    save_weights(tmp_path / "copied", {name: tensor.clone() for name, tensor in shared.items()}, described(config))
    assert (tmp_path / "copied").read_bytes() == (tmp_path / "shared").read_bytes()


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    tensors = Backbone(CONFIGS[0]).transferable()
    for name in ("a", "b"):
        save_weights(tmp_path / name, tensors, described(CONFIGS[0]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "w.safetensors"
    tensors = Backbone(CONFIGS[0]).transferable()
    save_weights(path, tensors, described(CONFIGS[0]))
    before = path.read_bytes()

    def full(stored, partial, metadata) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("voxtrast.engine.weights.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        save_weights(path, tensors, described(CONFIGS[0]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_is_no_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(tmp_path / "file" / "w.safetensors", {}, described(CONFIGS[0]))


def test_a_run_folder_stands_for_its_weights(tmp_path: Path) -> None:
    assert find_weights(tmp_path) == tmp_path / "weights.safetensors"
    assert find_weights(tmp_path / "w.safetensors") == tmp_path / "w.safetensors"


def write_metadata(path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, path, metadata={"voxtrast": text})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such weights file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 not safetensors"), "not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "not a readable safetensors file"),
        (lambda path: torch.save({"a": 1}, path), "not a readable safetensors file"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "without the metadata key 'voxtrast'"),
        (lambda path: write_metadata(path, "{"), "description is broken"),
        (lambda path: write_metadata(path, "[]"), "description is broken"),
        (lambda path: write_metadata(path, "{}"), "description is broken"),
        (lambda path: write_metadata(path, json.dumps({"format": 2, "backbone": {}})), "format 2 is unknown"),
        (lambda path: write_metadata(path, json.dumps({"format": 1, "backbone": 3})), "description is broken"),
        (
            lambda path: write_metadata(path, json.dumps({"format": 1, "backbone": {}, "aliases": {"x": "y"}})),
            "'y' that its description names is missing",
        ),
    ],
    ids=[
        "missing",
        "text",
        "empty",
        "pickle",
        "no metadata",
        "half",
        "list",
        "no format",
        "newer",
        "backbone",
        "alias",
    ],
)
def test_an_unusable_file_gets_one_clear_line(write, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, Backbone(CONFIGS[0]).transferable(), described(CONFIGS[0]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_weights(path)


def test_weights_of_another_network_name_what_differs_and_change_nothing() -> None:
    network = build_network(BackboneConfig(features=[4, 8, 8]), classes=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    wider = Backbone(BackboneConfig(features=[4, 8, 16])).transferable()
    with pytest.raises(UserError, match=r"of another shape: .*\(16, 8, 3, 3, 3\) for \(8, 8, 3, 3, 3\)"):
        load_into(network, wider)
    deeper = Backbone(BackboneConfig(features=[4, 8, 8, 8])).transferable()
    with pytest.raises(UserError, match=r"unknown: encoder.stages.3"):
        load_into(network, deeper)
    with pytest.raises(UserError, match=r"missing: encoder.stages.0.*and 40 more"):
        load_into(network, {})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="'backbone' is missing"):
        save_weights(Path("unused"), {}, {"format": 1})
