"""Pretrained weights in the forms that other code bases load."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..weights import find_weights
from .card import Exported
from .fit import Fit
from .monai import write_monai
from .nnunet import write_nnunet
from .safetensors import write_encoder, write_safetensors
from .source import open_source

__all__ = ["FORMS", "Exported", "Fit", "export"]

FORMS: dict[str, Callable[..., Exported]] = {
    "encoder": write_encoder,
    "monai": write_monai,
    "nnunet": write_nnunet,
    "safetensors": write_safetensors,
}


def export(
    run: Path | str, to: str, file: Path | str, *, patch_size: list[int] | None = None, force: bool = False
) -> Exported:
    """Writes a run's weights for another code base, with a card that says where they come from.

    Args:
        run: a run folder, or a weights file.
        to: `nnunet`: a `.pth` for nnU-Net's -pretrained_weights, and the plans that belong to it; `monai`: a state dict
            (`.pt`, `.pth`) or, without a suffix, the folder of a bundle; `safetensors`: the network's tensors;
            `encoder`: those of its encoder alone.
        file: target.
        patch_size: for `nnunet`, the patch that the plans propose, in voxels; default: the crop of pretraining.
        force: replace what is there.

    Returns: the files, how their tensors fit the network that they are for, and lines that say so.

    Raises: UserError, also where a tensor is missing, unexpected or of another shape.
    """
    if to not in FORMS:
        raise UserError(f"--to {to}: expected one of {', '.join(sorted(FORMS))}")
    if patch_size is not None and to != "nnunet":
        raise UserError(f"patch size: has no meaning for --to {to}, only for --to nnunet; leave it out")
    target, weights = Path(file), find_weights(run)
    if target.resolve() == weights.resolve():
        raise UserError(f"{target}: is the file to export; name another target")
    source = open_source(weights)
    options = {} if patch_size is None else {"patch_size": patch_size}
    done = FORMS[to](source, target, force=force, **options)
    return Exported(done.files, done.fit, [*source.notes, *done.lines])
