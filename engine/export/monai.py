"""Weights for MONAI: a state dict for a network that one's own code builds, or a bundle that builds its network.

A bundle is what MONAI's users pass on: `monai.bundle.load` and every training configuration read the network from
`network_def` and the weights from `models/model.pt`. It serves the networks that are not MONAI's own just as well.
"""

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...methods.backbone import find_architecture
from ..errors import UserError
from ..weights import write_whole
from .card import Exported, card, card_file, refuse_existing, write_json
from .definition import classes_argument, network_definition
from .fit import Fit, examine
from .source import CLASSES, Source

WEIGHTS, CONFIG, METADATA, README = "models/model.pt", "configs/train.json", "configs/metadata.json", "docs/README.md"
CARD, LOGGING = "docs/card.json", "configs/logging.conf"
FILES = (WEIGHTS, CONFIG, METADATA, LOGGING, CARD, README)
# MONAI sets Python's logging by it, and warns where a bundle has none.
TO_STDOUT = """[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=line

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=line
args=(sys.stdout,)

[formatter_line]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""
OURS = "voxtrast"  # the key in the metadata by which a bundle is known as one that may be replaced
STATE_DICTS = (".pt", ".pth")


def write_monai(source: Source, file: Path, *, force: bool = False) -> Exported:
    """Writes a state dict (FILE ends in .pt or .pth) or a bundle (a folder without a suffix); see `export`."""
    if file.suffix in STATE_DICTS:
        return _write_state_dict(source, file, force)
    if file.suffix:
        raise UserError(
            f"{file}: expected a name that ends in .pt or .pth for a state dict, or a folder's name without a dot "
            "for a bundle"
        )
    return _write_bundle(source, file, force)


def _write_state_dict(source: Source, file: Path, force: bool) -> Exported:
    about_file = card_file(file)
    refuse_existing((file, about_file), force)
    state = source.network.state_dict()
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(source.task_layers)}
    fit = _fit(source, weights)
    use = [
        f'state = network.state_dict() | torch.load("{file}", weights_only=True)',
        "network.load_state_dict(state)  # strict; the network keeps its own last layers",
    ]
    write_whole(file, lambda partial: torch.save(weights, partial))
    write_json(about_file, card(source, "monai", file, fit, use))
    lines = [f"{file}: {len(weights)} names, as {fit.network} has them", f"{about_file}: where the weights come from"]
    return Exported((file, about_file), fit, [*lines, *fit.lines(), *(f"then: {line}" for line in use)])


def _write_bundle(source: Source, folder: Path, force: bool) -> Exported:
    folder = folder.resolve() if folder.name in ("", "..") else folder  # a bundle is known by its folder's name
    _refuse_folder(folder, force)
    state = source.network.state_dict()
    fit = _fit(source, state)
    # Complete, so that a network of `network_def` as it stands loads it strictly.
    partial = folder.with_name(f".{folder.name}.partial")
    weights = partial / WEIGHTS
    shutil.rmtree(partial, ignore_errors=True)
    use = _bundle_use(source, folder.name, ".")
    try:
        write_whole(weights, lambda path: torch.save(state, path))
        about = card(source, "monai", weights, fit, use)
        write_json(partial / CONFIG, _training_config(source))
        write_json(partial / METADATA, _metadata(source))
        write_whole(partial / LOGGING, lambda path: path.write_text(TO_STDOUT, encoding="utf-8"))
        write_json(partial / CARD, about)
        readme = _readme(folder.name, about, fit)
        write_whole(partial / README, lambda path: path.write_text(readme, encoding="utf-8"))
        for name in FILES:  # one by one: what else somebody put into an older bundle stays
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or name another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = tuple(folder / name for name in FILES)
    lines = [f"{folder}: a MONAI bundle; {README} says how to use it, {CARD} where the weights come from"]
    return Exported(files, fit, [*lines, *fit.lines(), f"then: {_bundle_use(source, folder.name, folder.parent)[-1]}"])


def built(definition: Mapping[str, Any]) -> nn.Module:
    """The network that MONAI builds from `network_def`."""
    from monai.bundle.config_parser import ConfigParser

    with torch.random.fork_rng(devices=[]):
        network: nn.Module = ConfigParser({"network_def": dict(definition)}).get_parsed_content("network_def")
    return network


def _fit(source: Source, weights: dict[str, Tensor]) -> Fit:
    expected = built(network_definition(source.config, CLASSES)).state_dict()
    filled = [*source.untrained, *(name for name in expected if name.startswith(source.task_layers))]
    class_name = find_architecture(source.config.architecture).class_name
    return examine(
        class_name, expected, weights, task_layers=source.task_layers, filled=filled, partly=source.partly
    )  # fmt: skip


def _refuse_folder(folder: Path, force: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; a bundle is a folder, and a state dict ends in .pt or .pth")
    try:
        ours = OURS in json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f"{folder}: holds something else than a bundle of voxtrast's; name a folder that is not there")
    if not force:
        raise UserError(f"{folder}: exists already; name another folder, or add --force to replace it")


def _training_config(source: Source) -> dict[str, Any]:
    return {
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "ckpt_path": f"$@bundle_root + '/{WEIGHTS}'",
        "network_def": network_definition(source.config, CLASSES),
        "network": "$@network_def.to(@device)",
    }


def _metadata(source: Source) -> dict[str, Any]:
    config, about = source.config, source.description
    patch = about.get("crop") or [2 * config.stride] * config.dimensions
    modalities = about.get("data", {}).get("modalities", {})
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "/".join(each.upper() for each in sorted(modalities)) or "CT or MR",
        "num_channels": config.input_channels,
        "spatial_shape": list(patch),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(channel): "image" for channel in range(config.input_channels)},
    }
    logits = {
        "type": "image",
        "format": "segmentation",
        "num_channels": CLASSES,
        "spatial_shape": list(patch),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {"0": "background", "1": "to be trained"},
    }
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported"},
        "monai_version": version("monai"),
        "pytorch_version": str(torch.__version__).partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": _library(source),
        "name": f"{about.get('method', 'pretrained')} pretraining",
        "task": "pretrained weights, to be fine-tuned for segmentation",
        "description": f"Pretrained without labels by {about.get('method', 'an unknown method')}; segments nothing yet",
        "authors": "whoever ran the pretraining",
        "copyright": "of whoever ran the pretraining",
        "intended_use": "research; not for clinical use",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": logits}},
        OURS: {"not_pretrained": source.untrained, **{k: about[k] for k in ("method", "recipe", "step") if k in about}},
    }


def _library(source: Source) -> dict[str, str]:
    """What builds the network, besides MONAI."""
    package = find_architecture(source.config.architecture).class_name.partition(".")[0]
    return {} if package == "monai" else {package: version(package.replace("_", "-"))}


def _bundle_use(source: Source, name: str, place: Path | str) -> list[str]:
    override = f'{{"{classes_argument(source.config)}": 14}}'
    return [
        "import monai",
        f'network = monai.bundle.load("{name}", bundle_dir="{place}", net_override={override})',
    ]


def _readme(name: str, about: dict[str, Any], fit: Fit) -> str:
    pretraining = "\n".join(f"- {key}: {value}" for key, value in about["pretraining"].items())
    library = about["network"]["_target_"].partition(".")[0].replace("_", "-")
    use = "\n".join(f"    {line}" for line in about["use"])
    return f"""# {name}

{about["what"][0].upper()}{about["what"][1:]}.

It segments nothing before it is fine-tuned. `network_def` in `configs/train.json` builds the network; `models/model.pt`
holds its weights, the last layers among them with initial values. It needs the packages
monai{f" and {library}" if library != "monai" else ""}. The number of classes is the task's; from the folder that holds
this one:

{use}

`load` gives the network its weights and leaves out layers whose shape differs, here the last ones. To train with a
configuration of your own, give both; yours refers to `@network_def` or `@network`, and wins where both say something:

    python -m monai.bundle run --config_file "['configs/train.json', 'my_training.json']" --bundle_root .

## Pretraining

{pretraining}

## Fit

{chr(10).join(f"    {line}" for line in fit.lines())}

`docs/card.json` names every tensor that was not pretrained.
"""
