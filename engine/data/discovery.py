"""What there is to prepare: walks RAW, tells volumes from labels, gives each volume its id. Reads no volume."""

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .rejection import Rejection

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
LABEL_ENDING = "_label"
LONGEST_ID = 160  # file names end at 255 bytes and temporary names are longer


@dataclass(frozen=True)
class Series:
    """A DICOM series: its UID, its files in slice order (absolute), whether it is the only one of its folder."""

    folder: str
    uid: str
    files: tuple[str, ...]
    alone: bool


@dataclass(frozen=True)
class Source:
    """One volume to prepare, with the label that belongs to it. Paths are absolute, names relative to RAW."""

    id: str
    name: str
    files: tuple[str, ...]
    dicom: bool
    label_name: str | None = None
    label_file: str | None = None


@dataclass
class Tree:
    """What the walk found; names are relative to RAW, with forward slashes."""

    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    dicom_folders: list[str] = field(default_factory=list)
    other: int = 0  # files of other kinds: tables, notes, detached data of .mhd and .nhdr headers
    rejected: list[Rejection] = field(default_factory=list)
    folders: bool = False  # RAW has images/, and perhaps labels/


def scan(raw: Path, store: Path) -> Tree:
    """Walk RAW, following links but not loops, and leaving the store out where it lies inside.

    Where RAW/images exists, volumes are looked for there and labels in RAW/labels; everywhere a file NAME_label.nii.gz
    is the label of NAME.nii.gz beside it. Hidden files are passed over.
    """
    tree = Tree(folders=(raw / "images").is_dir())
    skip = _identity(store)
    tops = ("images", "labels") if tree.folders else ("",)
    for top in tops:
        if (raw / top).is_dir():
            _walk(raw, top, [], skip, tree)
    if tree.folders:  # what lies outside the two folders counts as other
        tree.other += sum(1 for entry in raw.iterdir() if entry.name not in tops and entry.is_file())
    for names in (tree.images, tree.labels, tree.dicom_folders):
        names.sort()
    return tree


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _walk(raw: Path, folder: str, ancestors: list[tuple[int, int]], skip: tuple[int, int] | None, tree: Tree) -> None:
    path = raw / folder
    identity = _identity(path)
    if identity is None or identity == skip:
        return
    if identity in ancestors:
        reason = "a symbolic link that leads back to a folder above it"
        tree.rejected.append(Rejection(folder, reason, "remove the link; the files are found without it"))
        return
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        remedy = "make the folder readable and run again"
        tree.rejected.append(Rejection(folder or ".", f"the folder cannot be listed: {error.strerror}", remedy))
        return
    for entry in entries:
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(SUFFIXES) and not _is_folder(entry):
            _sort_image(name, tree)
        elif _is_folder(entry):
            _walk(raw, name, [*ancestors, identity], skip, tree)
        elif _is_dicom(path / entry.name) and not name.startswith("labels/" if tree.folders else "\0"):
            if (folder or ".") not in tree.dicom_folders[-1:]:
                tree.dicom_folders.append(folder or ".")
        else:
            tree.other += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that loops on itself
        return False


def _sort_image(name: str, tree: Tree) -> None:
    is_label = stem(name).endswith(LABEL_ENDING) or (tree.folders and name.startswith("labels/"))
    (tree.labels if is_label else tree.images).append(name)


def _is_dicom(path: Path) -> bool:
    """By suffix, else by the four letters that follow DICOM's preamble of 128 bytes."""
    if path.name.upper() == "DICOMDIR":
        return False
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def stem(name: str) -> str:
    """The name without the suffix of its format."""
    suffix = next((each for each in SUFFIXES if name.lower().endswith(each)), "")
    return name[: len(name) - len(suffix)]


def sources(raw: Path, tree: Tree, series: list[Series]) -> tuple[list[Source], list[Rejection]]:
    """Pair volumes with labels and give each its id; returns the sources sorted by name, and labels without a volume.

    An id is the path relative to RAW (or RAW/images) without its suffix, "/" as "__", other characters that trouble
    shells as "_". Where two volumes come to the same id, the first by name keeps it and the others get a hash appended.
    """
    labels: dict[str, list[str]] = {}
    for name in tree.labels:
        labels.setdefault(_label_key(name, tree.folders), []).append(name)
    found: list[tuple[str, str, tuple[str, ...], bool]] = []  # name, key, files, dicom
    for name in tree.images:
        found.append((name, _inside(stem(name), tree.folders), (str(raw / name),), False))
    for each in series:
        key = raw.resolve().name if each.folder == "." else _inside(each.folder, tree.folders)
        if each.alone:
            found.append((each.folder, key, each.files, True))
        else:
            found.append((f"{each.folder}#{each.uid}", f"{key}-{_short_hash(each.uid)}", each.files, True))
    result, taken = [], set[str]()
    for name, key, files, dicom in sorted(found):
        label = labels[key][0] if key in labels else None
        file = str(raw / label) if label is not None else None
        result.append(Source(_unique_id(key, name, taken), name, files, dicom, label, file))
    keys = {key for _, key, _, _ in found}
    rejected = []
    for key, names in labels.items():
        for position, name in enumerate(names):
            if key not in keys:
                remedy = f"add an image named {key} or remove the label"
                rejected.append(Rejection(name, "a label without its image", remedy))
            elif position > 0:
                reason = f"a second label of the same image; {names[0]} is used"
                rejected.append(Rejection(name, reason, "keep one label for each image"))
    return result, rejected


def _inside(name: str, folders: bool) -> str:
    return name.removeprefix("images/") if folders else name


def _label_key(name: str, folders: bool) -> str:
    key = stem(name)
    if folders and key.startswith("labels/"):
        key = key.removeprefix("labels/")
        return key if not key.endswith(LABEL_ENDING) else key.removesuffix(LABEL_ENDING)
    return _inside(key.removesuffix(LABEL_ENDING), folders)


def _unique_id(key: str, name: str, taken: set[str]) -> str:
    """An id that is safe as a file name; a hash of the source's name is appended where it is taken or too long."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", "__".join(PurePosixPath(key).parts)).lstrip(".") or "volume"
    if safe in taken or len(safe) > LONGEST_ID:
        safe = f"{safe[:LONGEST_ID]}-{_short_hash(name)}"
    taken.add(safe)
    return safe


def _short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
