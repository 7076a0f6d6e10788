"""The weights file that a run of each method writes, without the run."""

from pathlib import Path

import torch
from torch import Tensor

from voxtrast.engine.config import load_config
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import save_weights
from voxtrast.methods import METHODS, Method
from voxtrast.methods.backbone import BackboneConfig, build_network

RECIPES = {name: f"{name}-tiny" for name in METHODS}
# Swin UNETR at its smallest, and what each method needs besides.
SWIN = ("backbone.architecture=swin_unetr", "backbone.features=[12]", "backbone.encoder_blocks=[]",
        "backbone.decoder_blocks=[]", "views.crop=[64,64,64]")  # fmt: skip
SWIN_MORE = {"cover": ("method.units=[4,4,4,4,1,1]",), "jcl": ("views.crop=[128,128,128]",)}
WITHOUT_SWIN = {"pcrlv2": ("views.local.size=[64,64,64]",)}  # it takes a decoder without skips


def write_weights(folder: Path, name: str, *words: str) -> Method:
    """Writes FOLDER/weights.safetensors; no tensor of it has a value that initialisation would give."""
    config = load_config(RECIPES[name], list(words))
    method = build_method(config)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    description = {
        "format": 1,
        "method": name,
        "recipe": RECIPES[name],
        "step": 7,
        "backbone": config.backbone.to_dict(),
        "crop": list(config.views.crop),
        "version": "0",
        "untrained": method.untrained(),
    }
    save_weights(folder / "weights.safetensors", method.transferable(), description)
    return method


def expected_state(method: Method, config: BackboneConfig) -> dict[str, Tensor]:
    """By name: the method's tensors, and for what it did not train the initial values of every export."""
    torch.manual_seed(0)
    initial = build_network(config, classes=2).state_dict()
    untrained = set(method.untrained())
    return {
        name: initial[name] if name in untrained else tensor
        for name, tensor in method.backbone.network.state_dict().items()
    }
