"""Pretrained weights in the forms that other code bases load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.backbone import BackboneConfig, build_network
from ..errors import UserError
from ..weights import find_weights, load_into, load_weights
from .nnunet import write_nnunet
from .safetensors import write_safetensors

FORMS: dict[str, Callable[..., list[str]]] = {"nnunet": write_nnunet, "safetensors": write_safetensors}


def export(run: Path | str, to: str, file: Path | str, *, patch_size: list[int] | None = None) -> list[str]:
    """Writes a run's weights for another code base.

    Args:
        run: a run folder, or a weights file.
        to: `nnunet` (a `.pth` for nnU-Net's -pretrained_weights) or `safetensors`.
        file: target; `nnunet` also writes the matching plans beside it.
        patch_size: for `nnunet`, the patch that the plans propose, in voxels; default: the crop of pretraining.

    Returns: lines that say what was written, what it takes to use it, and what in it was not pretrained.

    Raises: UserError.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: expected one of {', '.join(sorted(FORMS))}")
    source = find_weights(run)
    tensors, description = load_weights(source)
    if Path(file).is_dir():
        raise UserError(f"{file}: is a folder; expected the name of the file to write")
    if Path(file).resolve() == source.resolve():
        raise UserError(f"{file}: is the file to export; name another target")
    network, untrained = rebuild(source, tensors, description)
    if to == "nnunet":
        return write_nnunet(Path(file), network, description, untrained, patch_size)
    if patch_size is not None:
        raise UserError(f"patch size: has no meaning for --to {to}, only for --to nnunet; leave it out")
    return write_safetensors(Path(file), network, description, untrained)


def rebuild(source: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The network that the description names, holding the tensors; and the names in it that were not pretrained."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what was not pretrained is the same in every export
            network = build_network(BackboneConfig.from_dict(description["backbone"]), classes=2)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source}: its backbone cannot be built ({error}); use the version of voxtrast that "
            f"wrote it ({description.get('version', 'unknown')})"
        ) from error
    untrained = load_into(network, tensors, description.get("untrained", []))
    return network, list(dict.fromkeys([*description.get("not_pretrained", []), *untrained]))
