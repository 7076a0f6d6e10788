"""A fine-tuned network as one file, with all that predicting on new images needs."""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ...methods.backbone import BackboneConfig, architecture_of, build_network
from ..data.normalise import CT_WINDOW_HU, MR_PERCENTILES
from ..data.store import Store
from ..errors import UserError
from ..weights import FORMAT, SEGMENTATION, copy_into, load_weights, save_weights
from .training import Budget

# Of prepare's settings, what decides how a volume looks to the network.
PREPARED_BY = ("spacing_mm", "modality", "dtype", "order")


@dataclass(frozen=True)
class SegmentationModel:
    network: nn.Module
    classes: tuple[int, ...]  # label values; class k of the network is classes[k]
    crop: tuple[int, int, int]  # of the sliding window, (D, H, W) voxels
    prepare: dict[str, Any]  # settings that its volumes were prepared with
    flips: bool  # whether it was trained on mirrored crops


def save_model(
    folder: Path,
    network: nn.Module,
    store: Store,
    classes: tuple[int, ...],
    budget: Budget,
    description: dict[str, Any],
    run: dict[str, Any],
    settings: list[Any],
) -> Path:
    """Writes a network that was trained on a store, and says where.

    Args:
        folder: gets ARM-labelsN-seedS.safetensors; with a checksum behind it where that is a model of other settings.
        description: of the weights that it started from.
        run: arm, labels and seed.
        settings: all else that made it; JSON values.
    """
    made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"{run['arm']}-labels{run['labels']}-seed{run['seed']}.safetensors"
    if path.exists() and _settings_of(path) != made:
        path = path.with_name(f"{path.stem}-{made}.safetensors")
    doubled = architecture_of(network).second_names
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(doubled)}
    spacings = {case.spacing_mm for case in store.cases}
    save_weights(
        path,
        tensors,
        {
            "format": FORMAT,
            "kind": SEGMENTATION,
            "method": description.get("method"),
            "recipe": description.get("recipe"),
            "step": budget.steps,
            "backbone": description["backbone"],
            "version": version("voxtrast"),
            **run,
            "settings": made,
            "classes": list(classes),
            "crop": list(budget.crop),
            "flips": budget.flips,
            "spacing_mm": list(spacings.pop()) if len(spacings) == 1 else None,
            "prepare": store.settings,
            "modalities": sorted({case.modality for case in store.cases}),
        },
    )
    return path


def _settings_of(path: Path) -> str | None:
    try:
        found: str | None = load_weights(path)[1].get("settings")
    except UserError:
        return None
    return found


def find_model(path: Path | str) -> Path:
    """The model file itself, or the only one of a folder. Raises: UserError."""
    path = Path(path)
    if not path.is_dir():
        return path
    models = sorted(each for each in path.glob("*.safetensors") if not each.name.startswith("."))
    if len(models) != 1:
        names = ", ".join(each.name for each in models[:5]) or "none"
        raise UserError(f"{path}: holds {len(models)} .safetensors files ({names}); name the one to predict with")
    return models[0]


def load_model(path: Path) -> SegmentationModel:
    """The network of a file that `save_model` wrote, on the CPU.

    Raises: UserError for any other file, and for one whose volumes were prepared in a way that this version does not
        know.
    """
    tensors, description = load_weights(path)
    if description.get("kind") != SEGMENTATION:
        raise UserError(
            f"{path}: holds pretrained weights and no segmentation layers; give a model that `voxtrast finetune` saved"
        )
    try:
        config = BackboneConfig.from_dict(description["backbone"])
        classes = tuple(int(value) for value in description["classes"])
        depth, height, width = (int(side) for side in description["crop"])
        prepare = dict(description["prepare"])
        network = build_network(config, len(classes))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its network cannot be built ({error!r}); use the version of voxtrast that wrote it "
            f"({description.get('version', 'unknown')})"
        ) from error
    doubled = architecture_of(network).second_names
    expected = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(doubled)}
    try:
        copy_into(expected, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _check_prepared(path, prepare)
    modalities = description.get("modalities", [])
    if prepare["modality"] == "auto" and len(modalities) == 1:
        # A look at the values can take a cropped CT for MR; all that the network knows is of one modality.
        prepare["modality"] = modalities[0]
    return SegmentationModel(network, classes, (depth, height, width), prepare, bool(description.get("flips")))


def _check_prepared(path: Path, prepare: dict[str, Any]) -> None:
    missing = [name for name in PREPARED_BY if name not in prepare]
    if missing:
        raise UserError(
            f"{path}: does not say how its volumes were prepared ({', '.join(missing)}); fine-tune on a store that "
            "`voxtrast prepare` made"
        )
    for name, ours in (("ct_window_hu", CT_WINDOW_HU), ("mr_percentiles", MR_PERCENTILES)):
        found = prepare.get(name, list(ours))
        if list(found) != list(ours):
            raise UserError(
                f"{path}: its volumes were prepared with {name} {found}, this version has {list(ours)}; "
                "use the version of voxtrast that wrote it"
            )
