"""What an export says of itself, in a file beside it and on screen."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.store import file_sha256
from ..errors import UserError
from ..weights import write_whole
from .definition import network_definition
from .fit import Fit
from .source import CLASSES, Source

# Of the weights file, in the order in which one asks.
_ORIGIN = ("method", "recipe", "step", "data", "crop", "spacing_mm", "versions", "commit")
NOT_RECORDED = "not recorded"
_TARGETS = {
    "nnunet": "for nnU-Net",
    "monai": "for MONAI",
    "safetensors": "under the network's own names",
    "encoder": "of the encoder alone",
}


@dataclass(frozen=True)
class Exported:
    """What was written, how it fits its target, and the lines that say so."""

    files: tuple[Path, ...]
    fit: Fit
    lines: list[str]


def card(source: Source, target: str, file: Path, fit: Fit, use: list[str]) -> dict[str, Any]:
    """The card of a file that has been written; no part of it is a path of this machine's."""
    about = source.description
    not_pretrained = "initial values, the same in every export" if fit.filled else "nothing but the task's own layers"
    partly = {"partly": "their channels of the skips have the run's initial values, shrunk by weight decay"}
    return {
        "what": f"weights pretrained by {about.get('method', 'an unknown method')}, without labels, {_TARGETS[target]}",
        "file": file.name,
        "sha256": file_sha256(file),
        "pretraining": {name: about.get(name, NOT_RECORDED) for name in _ORIGIN},
        "weights_written_by": f"voxtrast {about.get('version', NOT_RECORDED)}",
        "exported_by": f"voxtrast {version('voxtrast')}",
        "backbone": source.config.to_dict(),
        "network": network_definition(source.config, CLASSES),
        "fit": fit.as_dict(),
        "not_pretrained": {"filled": not_pretrained} | (partly if fit.partly else {}),
        "use": [line.replace(str(file), file.name) for line in use],
    }


def card_file(file: Path) -> Path:
    """FILE.json: files of several forms may have names that differ in their suffix alone."""
    return file.with_name(f"{file.name}.json")


def write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
    text = re.sub(r"\[[\d\s.,e+-]+\]", lambda numbers: " ".join(numbers[0].split()), text)  # a line for each list
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def refuse_existing(files: Sequence[Path], force: bool) -> None:
    """Raises: UserError naming the first file that an export would replace."""
    for file in files:
        if file.is_dir():
            raise UserError(f"{file}: is a folder; expected the name of the file to write")
        if file.exists() and not force:
            raise UserError(f"{file}: exists already; name another file, or add --force to replace it")
