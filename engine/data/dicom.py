"""DICOM series: which there are in a folder, and whether their slices make a volume."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .headers import check_regular
from .rejection import RejectedError

# Objects that travel with images and hold none of their own: no volume, no complaint.
NOT_IMAGES = {"SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTRECORD", "REG", "SEG", "AU", "DOC", "PLAN"}
# The same by SOP class: reports, presentation states, raw data and segmentations, documents, radiotherapy, directories.
KINDS_WITHOUT_IMAGE = tuple(
    f"1.2.840.10008.{kind}".encode()
    for kind in ("1.3.10", *(f"5.1.4.1.1.{part}." for part in (88, 11, 66, 104, 481, 9)))
)
MODALITY, POSITION, ORIENTATION, FRAMES = "0008|0060", "0020|0032", "0020|0037", "0028|0008"
UNEVEN = 0.05  # of the usual distance; scanners write positions to about a hundredth of a millimetre
LARGEST_TILT_DEGREES = 1.0


@dataclass(frozen=True)
class Slice:
    name: str
    size: tuple[int, ...]
    position: np.ndarray | None  # (3,) LPS mm
    orientation: np.ndarray | None  # (6,) direction of rows, then of columns
    modality: str
    frames: int


def list_series(folder: Path, names: list[str]) -> dict[str, Any]:
    """The image series of a folder (not of those below it), and the files among `names` that belong to none.

    Returns "series": uid and files (in slice order) of each, sorted by uid; "lost": (name, reason) of each file that
    looks like DICOM and cannot be listed. Any of those may be a slice of a series, so none of the series is whole.
    """
    series: list[dict[str, object]] = []
    listed: set[str] = set()
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
        listed.update(Path(file).name for file in files)
        if files and _modality(files[0]) not in NOT_IMAGES:
            series.append({"uid": uid, "files": list(files)})
    lost = [(name, reason) for name in names if name not in listed and (reason := _why_lost(folder / name))]
    return {"series": sorted(series, key=lambda each: str(each["uid"])), "lost": lost}


def _why_lost(file: Path) -> str:
    """Why GDCM does not list a file; nothing where it is an object that holds no image."""
    try:
        check_regular(file)
        with open(file, "rb") as stream:
            start = stream.read(1024)
    except RejectedError as error:
        return error.reason
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if start[128:132] != b"DICM":
        return "not a DICOM file in spite of its name"
    _, mark, rest = start.partition(b"\x02\x00\x02\x00UI")  # (0002,0002), the kind of object; always in this encoding
    if mark and rest[2:].startswith(KINDS_WITHOUT_IMAGE):
        return ""
    return "the DICOM file is truncated or damaged"


def _modality(file: str) -> str:
    try:
        return _read_header(Path(file)).modality
    except RuntimeError:
        return ""  # reading it for real will say what is wrong


def _read_header(file: Path) -> Slice:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()

    def tag(key: str) -> str:
        return reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""

    def numbers(key: str, count: int) -> np.ndarray | None:
        try:
            values = np.array([float(each) for each in tag(key).split("\\")])
        except ValueError:
            return None
        return values if values.shape == (count,) and np.isfinite(values).all() else None

    frames = tag(FRAMES)
    count = int(frames) if frames.isdigit() else 1
    size = tuple(reader.GetSize())
    return Slice(file.name, size, numbers(POSITION, 3), numbers(ORIENTATION, 6), tag(MODALITY), count)


def check_slices(files: list[Path]) -> str:
    """Reject a series whose slices do not make one evenly spaced volume; returns its modality tag.

    A slice that is missing shows as one distance larger than the others. RuntimeError of the reader passes through.
    """
    slices = [_read_header(file) for file in files]
    modality = slices[0].modality
    if len(slices) == 1:
        if slices[0].frames > 1:
            return modality
        raise RejectedError("the series has a single slice", "add the slices that are missing, or remove the series")
    first = slices[0]
    for each in slices:
        if each.size != first.size:
            sizes = f"{first.name} is {_shown(first.size)}, {each.name} is {_shown(each.size)}"
            raise RejectedError(f"slices of different size: {sizes}", "put each series into a folder of its own")
        if each.position is None or each.orientation is None:
            raise RejectedError(f"slice {each.name} has no position or orientation", "export the original series again")
    orientations = np.array([each.orientation for each in slices])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise RejectedError("the slices are not parallel (a localizer?)", "remove the series")
    _check_distances(slices, orientations[0])
    return modality


def _check_distances(slices: list[Slice], orientation: np.ndarray) -> None:
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([each.position for each in slices])
    order = np.argsort(positions @ normal, kind="stable")
    steps = np.diff(positions[order], axis=0)
    distances = steps @ normal
    usual = float(np.median(distances))
    names = [slices[index].name for index in order]
    if distances.min() < 1e-3:
        where = int(distances.argmin())
        reason = f"slices {names[where]} and {names[where + 1]} lie at the same place"
        raise RejectedError(reason, "put each time point, echo or series into a folder of its own")
    worst = int(np.abs(distances - usual).argmax())
    if abs(distances[worst] - usual) > UNEVEN * usual:
        pair = f"{names[worst]} and {names[worst + 1]}"
        between = f"between {pair} lie {distances[worst]:.2f} mm, usual are {usual:.2f} mm"
        missing = round(distances[worst] / usual) - 1
        reason = f"uneven slice positions: {between}" + (f" ({missing} missing)" if missing > 0 else "")
        raise RejectedError(reason, "add the missing slices, or export the series again")
    tilt = np.degrees(np.arccos(np.clip(distances / np.linalg.norm(steps, axis=1), -1, 1))).max()
    if tilt > LARGEST_TILT_DEGREES:
        reason = f"gantry tilt: the slices are shifted against each other by {tilt:.1f} degrees"
        raise RejectedError(reason, "convert the series with a tool that corrects the tilt (for example dcm2niix)")


def _shown(size: tuple[int, ...]) -> str:
    return " x ".join(str(each) for each in size)
