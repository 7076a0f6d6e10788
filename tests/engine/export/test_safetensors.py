"""The safetensors export, and what every export refuses."""

from pathlib import Path

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from safetensors.torch import load_file

from voxtrast.engine.errors import UserError
from voxtrast.engine.export import export
from voxtrast.engine.weights import load_weights, save_weights
from voxtrast.methods.backbone import Backbone, BackboneConfig

CONFIG = BackboneConfig(features=[8, 16], norm="group")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_weights(
        tmp_path / "run" / "weights.safetensors",
        Backbone(CONFIG).transferable(),
        {
            "format": 1,
            "method": "cover",
            "recipe": "cover-3d",
            "step": 5,
            "backbone": CONFIG.to_dict(),
            "version": "0",
            "not_pretrained": ["decoder.transpconvs.0.weight"],
        },
    )
    return tmp_path / "run"


def test_the_export_holds_the_tensors_and_lists_what_was_not_pretrained(run: Path, tmp_path: Path) -> None:
    done = export(run, "safetensors", tmp_path / "out.safetensors")
    assert done.fit.filled == ("decoder.transpconvs.0.weight",)
    assert done.fit.missing == ("decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias")
    before, described = load_weights(run / "weights.safetensors")
    after, description = load_weights(tmp_path / "out.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert description == {
        **described,
        "not_pretrained": ["decoder.transpconvs.0.weight", "decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"],
    }
    # An export can be exported again, to the same content.
    export(tmp_path / "out.safetensors", "safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_monai_loads_the_export_of_its_networks(tmp_path: Path) -> None:
    config = BackboneConfig(architecture="swin_unetr", features=[12], dimensions=2)
    backbone = Backbone(config)
    description = {"format": 1, "backbone": config.to_dict(), "version": "0"}
    save_weights(tmp_path / "weights.safetensors", backbone.transferable(), description)
    done = export(tmp_path, "safetensors", tmp_path / "out.safetensors")
    assert done.fit.missing == ("out.conv.conv.weight", "out.conv.conv.bias")
    network = SwinUNETR(1, 14, feature_size=12, spatial_dims=2)
    missing, unexpected = network.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=False)
    assert missing == ["out.conv.conv.weight", "out.conv.conv.bias"]
    assert not unexpected
    image = torch.randn(1, 1, 32, 64)
    with torch.no_grad():
        assert torch.equal(backbone.encode(image)[-1], network.encoder10(network.swinViT(image)[4]))


def test_unusable_requests_say_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--to onnx: expected one of encoder, monai, nnunet, safetensors"):
        export(run, "onnx", tmp_path / "out")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        export(run, "safetensors", tmp_path / "folder.safetensors")
    with pytest.raises(UserError, match="is the file to export"):
        export(run, "safetensors", run / "weights.safetensors")
    with pytest.raises(UserError, match="no meaning for --to safetensors"):
        export(run, "safetensors", tmp_path / "out", patch_size=[8, 8, 8])
    with pytest.raises(UserError, match="no such weights file"):
        export(tmp_path / "elsewhere", "safetensors", tmp_path / "out")
    with pytest.raises(UserError, match=r"ends in .safetensors, such as out.safetensors"):
        export(run, "encoder", tmp_path / "out")


def test_a_description_of_another_network_is_refused(tmp_path: Path) -> None:
    description = {"format": 1, "backbone": {**CONFIG.to_dict(), "features": [8, 24]}, "version": "0"}
    save_weights(tmp_path / "a.safetensors", Backbone(CONFIG).transferable(), description)
    with pytest.raises(UserError, match="the weights do not fit the network"):
        export(tmp_path / "a.safetensors", "safetensors", tmp_path / "out")
    description["backbone"] = {"architecture": "swin"}
    save_weights(tmp_path / "b.safetensors", {}, description)
    with pytest.raises(UserError, match=r"cannot be built.*'swin' is not one of"):
        export(tmp_path / "b.safetensors", "safetensors", tmp_path / "out")
    description["backbone"] = {"colour": "red"}
    save_weights(tmp_path / "c.safetensors", {}, description)
    with pytest.raises(UserError, match="unknown fields"):
        export(tmp_path / "c.safetensors", "safetensors", tmp_path / "out")
