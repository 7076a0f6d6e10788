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
IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "imagestr"), ("labels", "labelstr")  # in any case; the latter are nnU-Net's
FIRST_CHANNEL = "_0000"  # nnU-Net: images/ID_0000.nii.gz, labels/ID.nii.gz
WHOLE_RAW = "volume"  # the id where RAW itself is a DICOM folder: RAW may be renamed
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
    modality: str = ""  # "ct" or "mr" where a list of the files states it


@dataclass
class Tree:
    """What the walk found; names are relative to RAW, with forward slashes.

    `images_folder` is RAW/images by its own name, or None: then images lie anywhere. The same with `labels_folder`,
    which counts only beside an `images_folder`.
    """

    images: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    dicom_files: dict[str, list[str]] = field(default_factory=dict)  # by folder; what looks like DICOM, readable or not
    other: int = 0  # files of other kinds: tables, notes, detached data of .mhd and .nhdr headers
    rejected: list[Rejection] = field(default_factory=list)
    images_folder: str | None = None
    labels_folder: str | None = None


def scan(raw: Path, store: Path) -> Tree:
    """Walk RAW, following links but not loops, and leaving the store out where it lies inside.

    Where RAW/images (or imagesTr) exists, volumes are looked for there and labels in RAW/labels (or labelsTr), and a
    volume anywhere else is rejected; everywhere a file NAME_label.nii.gz is the label of NAME.nii.gz beside it.
    Hidden files are passed over.
    """
    images, labels = _top_folder(raw, IMAGE_FOLDERS), _top_folder(raw, LABEL_FOLDERS)
    tree = Tree(images_folder=images, labels_folder=labels if images is not None else None)
    _walk(raw, "", [], _identity(store), tree)
    if images is not None:
        _reject_outside(tree)
    for names in (tree.images, tree.labels, *tree.dicom_files.values()):
        names.sort()
    return tree


def _top_folder(raw: Path, names: tuple[str, ...]) -> str | None:
    """The folder of RAW with one of these names, the earlier name first, in any case."""
    try:
        present = sorted(entry.name for entry in os.scandir(raw) if _is_folder(entry))
    except OSError:  # the walk reports it
        return None
    return next((each for name in names for each in present if each.lower() == name), None)


def _reject_outside(tree: Tree) -> None:
    own = [f"{folder}/" for folder in (tree.images_folder, tree.labels_folder) if folder is not None]
    reason, remedy = f"lies outside {own[0]}", f"move it into {own[0]}, or out of the folder that is prepared"
    for names in (tree.images, tree.labels, tree.dicom_files):
        for name in [each for each in names if not f"{each}/".startswith(tuple(own))]:
            tree.rejected.append(Rejection(name, reason, remedy))
            if isinstance(names, dict):
                del names[name]
            else:
                names.remove(name)


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
        elif not _below(name, tree.labels_folder) and _is_dicom(path / entry.name):
            tree.dicom_files.setdefault(folder or ".", []).append(entry.name)
        else:
            tree.other += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that loops on itself
        return False


def _sort_image(name: str, tree: Tree) -> None:
    is_label = stem(name).endswith(LABEL_ENDING) or _below(name, tree.labels_folder)
    (tree.labels if is_label else tree.images).append(name)


def _below(name: str, folder: str | None) -> bool:
    return folder is not None and name.startswith(f"{folder}/")


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
    shells as "_"; "volume" where RAW itself is the DICOM folder. Where two volumes come to the same id, the first by
    name keeps it and the others get a hash appended.
    """
    labels: dict[str, list[str]] = {}
    for name in tree.labels:
        labels.setdefault(_label_key(name, tree), []).append(name)
    found: list[tuple[str, str, tuple[str, ...], bool]] = []  # name, key, files, dicom
    for name in tree.images:
        found.append((name, _inside(stem(name), tree), (str(raw / name),), False))
    for each in series:
        key = WHOLE_RAW if each.folder == "." else _inside(each.folder, tree)
        if each.alone:
            found.append((each.folder, key, each.files, True))
        else:
            digest = _short_hash(each.uid)  # a UID leads back to the patient
            found.append((f"{each.folder}#{digest}", f"{key}-{digest}", each.files, True))
    keys = {key for _, key, _, _ in found}
    if tree.images_folder is not None:
        for key in sorted(keys):
            own = key.removesuffix(FIRST_CHANNEL)
            if own != key and own not in keys and own in labels and key not in labels:
                labels[key] = labels.pop(own)
    result, taken = [], set[str]()
    for name, key, files, dicom in sorted(found):
        label = labels[key][0] if key in labels else None
        file = str(raw / label) if label is not None else None
        result.append(Source(unique_id(key, name, taken), name, files, dicom, label, file))
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


def _inside(name: str, tree: Tree) -> str:
    return name.removeprefix(f"{tree.images_folder}/")


def _label_key(name: str, tree: Tree) -> str:
    key = stem(name)
    if _below(key, tree.labels_folder):
        key = key.removeprefix(f"{tree.labels_folder}/")
    return _inside(key, tree).removesuffix(LABEL_ENDING)


def unique_id(key: str, name: str, taken: set[str]) -> str:
    """An id that is safe as a file name; a hash of the source's name is appended where it is taken or too long."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", "__".join(PurePosixPath(key).parts)).lstrip(".") or "volume"
    if safe in taken or len(safe) > LONGEST_ID:
        safe = f"{safe[:LONGEST_ID]}-{_short_hash(name)}"
    taken.add(safe)
    return safe


def _short_hash(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]
