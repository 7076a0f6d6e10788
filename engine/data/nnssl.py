"""nnssl's list of images, pretrain_data.json: collection, datasets, subjects, sessions, images.

The format is that of nnssl's documentation ("nnssl dataset format"): five levels of JSON objects, of which image_path,
modality and the ids are read here. Paths may be absolute, relative to the list, or begin with $NAME, an
environment variable. Masks and free-form information are passed over.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .discovery import SUFFIXES, Source, stem, unique_id
from .inventory import Found, Inventory, Perform
from .rejection import RejectedError, Rejection

# What the field modality says, in lower case, up to the first character that is neither letter nor digit.
CT = {"ct", "cta", "cbct", "cect", "ncct", "ldct"}
MR = {"mr", "mri", "mra", "t1", "t1w", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2star", "t2starw", "flair", "pd", "pdw",
      "dwi", "dti", "adc", "swi", "bold", "asl", "fa", "inplanet1", "inplanet2", "unit1", "minip"}  # fmt: skip
LEVELS = ("datasets", "subjects", "sessions", "images")
OTHERS = {"pt", "pet", "spect", "nm", "us", "xr", "cr", "dx", "mg"}


def of_collection(file: Path, take_modality: bool) -> Inventory:
    """The images of a list. Raises UserError, when called, where the list cannot be understood or is empty."""

    def find(_: Perform) -> Found:
        found = Found([], [])
        taken, ids = set[str](), set[str]()
        entries = sorted(_images(_read(file)), key=lambda entry: entry[0])
        if not entries:
            raise UserError(f"{file} lists no image: give a list with images, or a folder of them")
        for name, image in entries:
            try:
                if name in taken:
                    raise RejectedError("a second image of this name in its session", "give it a name of its own")
                taken.add(name)
                path, modality = _path(file.parent, image), _modality(image)
            except RejectedError as error:
                found.rejected.append(Rejection(name, error.reason, error.remedy))
                continue
            identity = unique_id(stem(name), name, ids)
            modality = modality if take_modality else ""
            found.sources.append(Source(identity, name, (str(path),), False, modality=modality))
        return found

    return find


def _read(file: Path) -> dict[str, Any]:
    try:
        collection = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): give nnssl's pretrain_data.json") from None
    if not isinstance(collection, dict) or not isinstance(collection.get("datasets"), dict):
        raise UserError(f"{file} is not a list of nnssl (no object 'datasets' in it): give its pretrain_data.json")
    return collection


def _images(node: Any, place: str = "", levels: tuple[str, ...] = LEVELS) -> Iterator[tuple[str, Any]]:
    """(dataset/subject/session/name, image) of every entry; in place of what has not the form of its level, why."""
    children = node.get(levels[0]) if isinstance(node, dict) else None
    if levels[0] != "images" and isinstance(children, dict):
        for name, child in children.items():
            yield from _images(child, f"{place}/{name}" if place else str(name), levels[1:])
    elif levels[0] == "images" and isinstance(children, list):
        for number, image in enumerate(children):
            name = (image.get("name") or Path(str(image.get("image_path"))).name) if isinstance(image, dict) else None
            yield f"{place}/{name or f'image {number}'}", image
    else:
        yield place, RejectedError(f"the entry has no {levels[0]}", "correct the list")


def _path(folder: Path, image: Any) -> Path:
    if isinstance(image, RejectedError):
        raise image
    text = image.get("image_path") if isinstance(image, dict) else None
    if not isinstance(text, str) or not text:
        raise RejectedError("the entry has no image_path", "correct the list")
    first, _, rest = text.partition("/")
    if first.startswith("$"):
        if (root := os.environ.get(first[1:])) is None:
            reason = f"its path begins with {first}, an environment variable that is not set"
            raise RejectedError(reason, f"set {first[1:]} to the folder that is meant")
        text = f"{root}/{rest}"
    if not text.lower().endswith(SUFFIXES):
        raise RejectedError(f"the image_path {text} has no ending of {', '.join(SUFFIXES)}", "convert the image")
    return folder / text  # an absolute path stays what it is


def _modality(image: dict[str, Any]) -> str:
    """ "ct" or "mr" where it is stated, "" where it is not, or in words that we do not know: the values will say."""
    stated = image.get("modality")
    words = re.split("[^a-z0-9]+", stated.lower()) if isinstance(stated, str) else []
    word = next((each for each in words if each in CT | MR | OTHERS), "")
    if word in OTHERS:
        raise RejectedError(f"modality {stated}, CT or MR was expected", "remove it from the list")
    return "ct" if word in CT else "mr" if word in MR else ""
