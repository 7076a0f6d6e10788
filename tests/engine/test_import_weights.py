"""The scripts of docs/import-weights.md, on made-up files of the published forms."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from voxtrast.engine.export import export
from voxtrast.engine.weights import load_weights
from voxtrast.methods.backbone import BackboneConfig, build_network

PAGE = Path(__file__).parent.parent.parent / "docs" / "import-weights.md"
RESENC, SWIN = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SMALL_RESENC = BackboneConfig(architecture="residual_unet", features=[4, 8])
SMALL_SWIN = BackboneConfig(architecture="swin_unetr", features=[12])


def run(script: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With the smallest network of its kind."""
    small = re.sub(r'architecture="residual_unet_l"', 'architecture="residual_unet", features=[4, 8]', script)
    small = small.replace("features=[48]", "features=[12]")
    assert small != script
    monkeypatch.chdir(folder)
    exec(compile(small, str(PAGE), "exec"), {})


def test_a_checkpoint_of_nnssl_becomes_weights_and_an_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(3)
    published = build_network(SMALL_RESENC, classes=1).state_dict()
    plan = {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}
    torch.save({"network_weights": published, "nnssl_adaptation_plan": plan}, tmp_path / "checkpoint_final.pth")
    run(RESENC, monkeypatch, tmp_path)
    tensors, description = load_weights(tmp_path / "imported.safetensors")
    encoder = [name for name in tensors if name.startswith("encoder.")]
    assert all(torch.equal(tensors[name], published[name]) for name in encoder)
    assert set(description["untrained"]) == {name for name in tensors if name.startswith("decoder.")}
    done = export(tmp_path / "imported.safetensors", "nnunet", tmp_path / "w.pth")
    assert done.fit.filled
    weights = torch.load(tmp_path / "w.pth", weights_only=True)["network_weights"]
    assert all(torch.equal(weights[name], published[name]) for name in encoder)


def as_ssl_pretrained(name: str) -> str:
    if name.startswith("layers"):
        return re.sub(r"^(layers\d\.0)\.", r"encoder.\1.0.", name)
    return f"encoder.{name}"


def as_model_swinvit(name: str) -> str:
    return f"module.{name}".replace("mlp.linear", "mlp.fc")


FORMS: dict[str, tuple[Callable[[str], str], str]] = {
    "ssl_pretrained_weights.pth": (as_ssl_pretrained, "model"),
    "model_swinvit.pt": (as_model_swinvit, "state_dict"),
    "own, single GPU, old": (lambda name: f"swin_vit.{name}", "state_dict"),
    "own, several GPUs": (lambda name: f"module.swinViT.{name}", "state_dict"),
}


def swin_of(form: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The transformer's tensors by MONAI's names, and the file's content."""
    torch.manual_seed(3)
    network = build_network(SMALL_SWIN, classes=1)
    wanted = {name: tensor.clone() for name, tensor in network.swinViT.state_dict().items()}
    rename, _ = FORMS[form]
    heads = {rename("norm.weight"): torch.ones(3), "rotation_head.weight": torch.ones(4, 3)}
    return wanted, {rename(name): tensor for name, tensor in wanted.items()} | heads


@pytest.mark.parametrize("form", FORMS)
def test_swin_unetr_of_every_published_form_becomes_weights(
    form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted, content = swin_of(form)
    torch.save({FORMS[form][1]: content}, tmp_path / "ssl_pretrained_weights.pth")
    run(SWIN, monkeypatch, tmp_path)
    tensors, description = load_weights(tmp_path / "imported.safetensors")
    assert all(torch.equal(tensors[f"swinViT.{name}"], tensor) for name, tensor in wanted.items())
    assert set(description["untrained"]) == {name for name in tensors if not name.startswith("swinViT.")}


@pytest.mark.parametrize("form", ["ssl_pretrained_weights.pth", "model_swinvit.pt"])
def test_the_published_names_are_those_that_monai_reads(form: str) -> None:
    """Ours made up by MONAI's own rules: its loaders take them, and put them where the script does."""
    from monai.networks.nets.swin_unetr import filter_swinunetr
    from monai.networks.utils import copy_model_state

    wanted, content = swin_of(form)
    torch.manual_seed(4)
    network = build_network(SMALL_SWIN, classes=1)
    if form == "model_swinvit.pt":
        network.load_from({"state_dict": content})
    else:
        copy_model_state(network, content, filter_func=filter_swinunetr)
    state = network.swinViT.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_a_file_that_lacks_a_tensor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, content = swin_of("model_swinvit.pt")
    del content["module.layers2.0.blocks.1.mlp.fc2.weight"]
    torch.save({"state_dict": content}, tmp_path / "ssl_pretrained_weights.pth")
    with pytest.raises(RuntimeError, match=r"layers2.0.blocks.1.mlp.linear2.weight"):
        run(SWIN, monkeypatch, tmp_path)
    assert not (tmp_path / "imported.safetensors").exists()
