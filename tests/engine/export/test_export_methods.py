"""Every method's weights through every export, judged by the loaders of nnU-Net, MONAI and safetensors."""

import json
import logging
from pathlib import Path
from typing import Any

import monai
import pytest
import torch
from method_weights import RECIPES, SWIN, SWIN_MORE, WITHOUT_SWIN, expected_state, write_weights
from monai.bundle.config_parser import ConfigParser
from monai.networks.nets.swin_unetr import SwinUNETR
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from safetensors.torch import load_model
from typer.testing import CliRunner

from voxtrast.engine.cli import app
from voxtrast.engine.errors import UserError
from voxtrast.engine.export import FORMS, export
from voxtrast.engine.weights import load_weights
from voxtrast.methods.backbone import BackboneConfig

NAMES = {"nnunet": "w.pth", "monai": "w.pt", "safetensors": "w.safetensors", "encoder": "e.safetensors"}


def network_of_plans(plans: Path) -> torch.nn.Module:
    architecture = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_voxtrast"]["architecture"]
    kwargs, imported = architecture["arch_kwargs"], architecture["_kw_requires_import"]
    return get_network_from_plans(architecture["network_class_name"], kwargs, imported, 1, 5, True, True)


def assert_equal_but_for(state: dict[str, Any], expected: dict[str, Any], left: str) -> None:
    assert set(state) == set(expected)
    differing = [name for name in expected if left not in name and not torch.equal(state[name], expected[name])]
    assert not differing


@pytest.mark.parametrize("name", RECIPES)
def test_nnunet_loads_every_method_through_its_own_loader(name: str, tmp_path: Path) -> None:
    method = write_weights(tmp_path, name)
    done = export(tmp_path, "nnunet", tmp_path / "out" / "w.pth")
    network = network_of_plans(tmp_path / "out" / "w.plans.json")
    load_pretrained_weights(network, str(tmp_path / "out" / "w.pth"))  # asserts that no key is missing
    expected = expected_state(method, method.backbone.config)
    assert_equal_but_for(network.state_dict(), expected, ".seg_layers.")

    # The report names what no loss reached, once each, and nothing is left over.
    trained = {id(tensor) for tensor in method.backbone.parameters()}
    assert len(done.fit.loaded) + len(done.fit.filled) + len(done.fit.missing) == len(trained)
    assert set(done.fit.filled) <= set(method.untrained())
    assert bool(done.fit.filled) == bool(method.untrained())
    assert all(".seg_layers." in missing for missing in done.fit.missing)
    assert not done.fit.unexpected
    assert not done.fit.other_shape
    assert bool(done.fit.partly) == (not method.backbone.config.skips)
    wrapped = [key for key in torch.load(tmp_path / "out" / "w.pth", weights_only=True)["network_weights"]
               if "module." in key or "_orig_mod" in key]  # fmt: skip
    assert not wrapped


@pytest.mark.parametrize("name", RECIPES)
def test_a_bundle_of_every_method_builds_its_network_and_loads_strictly(name: str, tmp_path: Path) -> None:
    method = write_weights(tmp_path, name)
    export(tmp_path, "monai", tmp_path / "bundle")
    parser = ConfigParser()
    parser.read_config(tmp_path / "bundle" / "configs" / "train.json")
    parser["bundle_root"] = str(tmp_path / "bundle")
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(parser.get_parsed_content("ckpt_path"), weights_only=True))  # strict
    expected = expected_state(method, method.backbone.config)
    assert_equal_but_for(network.state_dict(), expected, ".seg_layers.")


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(WITHOUT_SWIN)))
def test_monai_loads_swin_unetr_of_every_method_that_takes_it(name: str, tmp_path: Path) -> None:
    method = write_weights(tmp_path, name, *SWIN, *SWIN_MORE.get(name, ()))
    done = export(tmp_path, "monai", tmp_path / "w.pt")
    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=12)
    weights = torch.load(tmp_path / "w.pt", weights_only=True)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert missing == list(done.fit.missing) == ["out.conv.conv.weight", "out.conv.conv.bias"]
    assert not unexpected
    network.load_state_dict(network.state_dict() | weights)  # as the export says: strict, with the task's own layers
    assert_equal_but_for(
        {key: value for key, value in network.state_dict().items() if not key.startswith("out.")},
        {k: v for k, v in expected_state(method, method.backbone.config).items() if not k.startswith("out.")},
        "out.",
    )


@pytest.mark.parametrize("name", sorted(WITHOUT_SWIN))
def test_the_methods_without_swin_unetr_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="skips"):
        write_weights(tmp_path, name, *SWIN, *WITHOUT_SWIN[name])


def test_a_decoder_that_was_not_trained_is_named_on_screen_and_in_the_card(tmp_path: Path) -> None:
    method = write_weights(tmp_path, "pcl")
    for to, name in NAMES.items():
        done = export(tmp_path, to, tmp_path / to / name)
        card = json.loads((tmp_path / to / f"{name}.json").read_text(encoding="utf-8"))
        in_decoder = () if to == "encoder" else done.fit.filled
        assert done.fit.filled == in_decoder
        assert card["fit"]["filled"] == list(done.fit.filled)
        assert card["fit"]["loaded"] == len(done.fit.loaded)
        if to != "encoder":
            assert {"decoder.stages.0.convs.0.conv.weight", "decoder.transpconvs.1.bias"} <= set(done.fit.filled)
            assert any(f"{len(done.fit.filled)} not pretrained" in line for line in done.lines)
    assert all(entry.startswith("decoder.") for entry in method.untrained())
    # What is filled in does not depend on what else was drawn before.
    torch.manual_seed(123)
    export(tmp_path, "nnunet", tmp_path / "again.pth")
    first, second = (torch.load(file, weights_only=True)["network_weights"]
                     for file in (tmp_path / "nnunet" / "w.pth", tmp_path / "again.pth"))  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_kernels_that_were_trained_without_their_skips_are_named(tmp_path: Path) -> None:
    write_weights(tmp_path, "pcrlv2")
    done = export(tmp_path, "safetensors", tmp_path / "w.safetensors")
    assert done.fit.partly == tuple(f"decoder.stages.{block}.convs.0.conv.weight" for block in range(2))
    card = json.loads((tmp_path / "w.safetensors.json").read_text(encoding="utf-8"))
    assert card["fit"]["partly"] == list(done.fit.partly)
    assert "skips" in card["not_pretrained"]["partly"]


@pytest.mark.parametrize("name", ["jcl", "pcl"])
def test_the_encoder_alone_loads_strictly_into_an_encoder(name: str, tmp_path: Path) -> None:
    method = write_weights(tmp_path, name)
    done = export(tmp_path, "encoder", tmp_path / "e.safetensors")
    expected = method.backbone.network.encoder.state_dict()
    torch.manual_seed(9)
    other = network_of_definition(json.loads((tmp_path / "e.safetensors.json").read_text(encoding="utf-8"))["network"])
    load_model(other.encoder, tmp_path / "e.safetensors")  # strict; shared tensors are stored once
    assert_equal_but_for(other.encoder.state_dict(), expected, "decoder")
    assert not done.fit.missing
    assert not done.fit.filled
    assert load_weights(tmp_path / "e.safetensors")[1]["not_pretrained"] == []  # the decoder is not its concern
    with pytest.raises(UserError, match="holds 'encoder' of a network alone; give the run"):
        export(tmp_path / "e.safetensors", "nnunet", tmp_path / "w.pth")


def test_the_encoder_of_swin_unetr_is_its_transformer(tmp_path: Path) -> None:
    method = write_weights(tmp_path, "pcl", *SWIN)
    export(tmp_path, "encoder", tmp_path / "e.safetensors")
    network = SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    load_model(network.swinViT, tmp_path / "e.safetensors")
    assert_equal_but_for(network.swinViT.state_dict(), method.backbone.network.swinViT.state_dict(), "decoder")


def network_of_definition(definition: dict[str, Any]) -> Any:
    return ConfigParser({"network_def": definition}).get_parsed_content("network_def")


@pytest.mark.filterwarnings("ignore:parsing config_file")  # a bundle is code, MONAI says
def test_monai_opens_the_bundle_by_name_for_any_number_of_classes(tmp_path: Path) -> None:
    method = write_weights(tmp_path, "dira")
    export(tmp_path, "monai", tmp_path / "bundle")
    network = monai.bundle.load("bundle", bundle_dir=str(tmp_path), device="cpu", net_override={"num_classes": 14})
    state = network.state_dict()
    assert state["decoder.seg_layers.0.weight"].shape[0] == 14
    assert_equal_but_for(state, expected_state(method, method.backbone.config), ".seg_layers.")
    files = {name: str(tmp_path / "bundle" / "configs" / f"{name}.json") for name in ("metadata", "train")}
    monai.bundle.verify_net_in_out(
        net_id="network_def", meta_file=files["metadata"], config_file=files["train"], device="cpu"
    )  # a forward of the size that the metadata says


@pytest.mark.filterwarnings("ignore:parsing config_file")
def test_a_workflow_of_the_bundle_finds_all_that_monai_looks_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_weights(tmp_path, "dira")
    export(tmp_path, "monai", tmp_path / "bundle")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        monai.bundle.create_workflow(config_file=str(tmp_path / "bundle" / "configs" / "train.json"))
        root.info("a line of the workflow's")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, error = capfd.readouterr()
    assert "does not exist" not in out + error
    assert out.rstrip().endswith("root - INFO - a line of the workflow's")


BACKBONES = {
    "group norm": (BackboneConfig(features=[8, 16], norm="group"), 8),
    "batch norm": (BackboneConfig(features=[4, 8], norm="batch", architecture="residual_unet", input_channels=2), 8),
    "2d": (BackboneConfig(features=[4, 8, 8], dimensions=2, negative_slope=0.2), 16),
    "resnet": (BackboneConfig(architecture="resnet18_unet", dimensions=2), 64),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_definition_computes_what_the_backbone_computes(name: str) -> None:
    from voxtrast.engine.export.definition import network_definition
    from voxtrast.methods.backbone import build_network

    config, side = BACKBONES[name]
    ours = build_network(config, classes=3).eval()
    theirs = network_of_definition(network_definition(config, 3)).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, config.input_channels, *[side] * config.dimensions)
    with torch.no_grad():
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize("to", [*FORMS, "bundle"])
def test_nothing_is_replaced_without_force(to: str, tmp_path: Path) -> None:
    write_weights(tmp_path / "run", "pcl")
    form, target = ("monai", tmp_path / "bundle") if to == "bundle" else (to, tmp_path / NAMES[to])
    done = export(tmp_path / "run", form, target)
    before = {file: file.read_bytes() for file in done.files}
    assert set(before) == {file for file in tmp_path.rglob("*") if file.is_file()} - {
        tmp_path / "run" / "weights.safetensors"
    }
    write_weights(tmp_path / "run", "pcl", "seed=1")
    with pytest.raises(UserError, match=r"exists already; name another .*, or add --force") as caught:
        export(tmp_path / "run", form, target)
    assert str(target) in str(caught.value)
    assert all(file.read_bytes() == content for file, content in before.items())
    export(tmp_path / "run", form, target, force=True)
    assert all(file.read_bytes() != content for file, content in before.items() if file.suffix in (".pt", ".pth"))
    # A card alone is no reason to lose it.
    if to != "bundle":
        target.unlink()
        with pytest.raises(UserError, match="exists already"):
            export(tmp_path / "run", form, target)


def test_a_bundle_goes_into_the_folder_that_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "run", "pcl")
    (tmp_path / "spine").mkdir()
    monkeypatch.chdir(tmp_path / "spine")
    done = export(tmp_path / "run", "monai", Path())
    assert (tmp_path / "spine" / "models" / "model.pt").is_file()
    assert done.lines[-1].startswith('then: network = monai.bundle.load("spine", ')


def test_what_was_added_to_a_bundle_stays_when_it_is_replaced(tmp_path: Path) -> None:
    write_weights(tmp_path / "run", "pcl")
    export(tmp_path / "run", "monai", tmp_path / "bundle")
    mine = tmp_path / "bundle" / "models" / "finetuned.pt"
    mine.write_text("days")
    done = export(tmp_path / "run", "monai", tmp_path / "bundle", force=True)
    assert {file for file in (tmp_path / "bundle").rglob("*") if file.is_file()} == {*done.files, mine}
    assert not list(tmp_path.glob(".*"))


def test_the_command_prints_the_fit_and_takes_force(tmp_path: Path) -> None:
    write_weights(tmp_path / "run", "pcl")
    words = ["export", str(tmp_path / "run"), str(tmp_path / "w.pt"), "--to", "monai"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0
    assert "fit to PlainConvUNet:\n    24 pretrained\n    20 not pretrained, in the file" in first.output
    assert isinstance(CliRunner().invoke(app, words).exception, UserError)
    assert CliRunner().invoke(app, [*words, "--force"]).output == first.output


def test_a_folder_of_something_else_is_never_replaced_by_a_bundle(tmp_path: Path) -> None:
    write_weights(tmp_path / "run", "pcl")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(UserError, match="holds something else than a bundle of voxtrast's"):
        export(tmp_path / "run", "monai", tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text(encoding="utf-8") == "years"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; a bundle is a folder"):
        export(tmp_path / "run", "monai", tmp_path / "file", force=True)
    with pytest.raises(UserError, match=r"ends in .pt or .pth"):
        export(tmp_path / "run", "monai", tmp_path / "w.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "thesis"]


def test_a_checkpoint_of_nnunets_newer_route_goes_through_its_loader(tmp_path: Path) -> None:
    trainer = pytest.importorskip(
        "nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer",
        reason="this nnunetv2 has no PretrainedTrainer (2.8.1 on PyPI lacks it)",
    ).PretrainedTrainer
    method = write_weights(tmp_path, "cover")
    export(tmp_path, "nnunet", tmp_path / "w.pth")
    plan = torch.load(tmp_path / "w.pth", weights_only=True)["nnssl_adaptation_plan"]
    network = network_of_plans(tmp_path / "w.plans.json")
    trainer.load_pretrained_weights(
        network, str(tmp_path / "w.pth"), 1, 1, plan["recommended_downstream_patchsize"], [64] * 3,
        plan["key_to_encoder"], plan["key_to_stem"], tuple(plan["keys_to_in_proj"]), plan["key_to_lpe"],
    )  # fmt: skip
    assert_equal_but_for(network.encoder.state_dict(), method.backbone.network.encoder.state_dict(), "decoder")
