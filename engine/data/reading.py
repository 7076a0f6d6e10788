"""Reads one volume or label from its files and turns its axes to RAS. All of SimpleITK's conventions end here.

SimpleITK gives arrays (z, y, x) and geometry in LPS millimetres; what leaves this module is (D, H, W) with voxel
indices increasing toward superior, anterior, right, and an affine (d, h, w, 1) -> RAS millimetres.
"""

import contextlib
import locale
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .dicom import check_slices
from .headers import COPY_AGAIN, check_nifti, check_spacing, check_three_dimensional
from .rejection import RejectedError

LABEL_TOLERANCE_VOXELS = 0.1  # headers store geometry as float32; a tenth of a voxel is beyond any rounding


@dataclass(frozen=True)
class Volume:
    """values (D, H, W) in the file's own type; affine (4, 4); modality from the header ("CT", "MR", ...) or ""."""

    values: np.ndarray
    affine: np.ndarray
    modality: str = ""

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) lengths of a voxel along D, H, W."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


@dataclass(frozen=True)
class FileGrid:
    """The grid of a file as SimpleITK has it: axes (x, y, z), LPS millimetres, direction row by row."""

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin_mm: tuple[float, ...]
    direction: tuple[float, ...]


@contextlib.contextmanager
def keep_locale() -> Iterator[None]:
    """GDCM leaves the C locale behind after some damaged files, and with it ASCII for whatever opens a text next."""
    spoken = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, spoken)


def read_volume(files: list[Path], dicom: bool) -> Volume:
    """Read one source. Raises RejectedError with a reason for a person; never lets a reader's own exception out."""
    return read_volume_and_grid(files, dicom)[0]


def read_volume_and_grid(files: list[Path], dicom: bool) -> tuple[Volume, FileGrid]:
    """As `read_volume`, with the grid that the file itself has, for `write_label`."""
    try:
        image, modality = _read_series(files) if dicom else (_read_file(files[0]), "")
        grid = FileGrid(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        values, affine = _to_ras(image)
    except RuntimeError as error:
        raise RejectedError(*_readable(str(error), files[0])) from None
    return Volume(values, affine, modality), grid


def _read_file(path: Path) -> sitk.Image:
    name = path.name.lower()
    if name.endswith(".nii.gz"):
        return _read_unpacked(path, check_nifti(path))
    if name.endswith(".nii"):
        check_nifti(path)
    return _read_image(path)


def _read_image(path: Path) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    _check_information(reader, reader.GetNumberOfComponents())
    return _squeeze(reader.Execute())


def _read_unpacked(path: Path, content: bytes) -> sitk.Image:
    """The image of a .nii.gz without unpacking it again, which takes longer than all else that is done to it.

    The reader takes files alone, and asks for their suffix: it gets a file in memory under a name that ends in .nii.
    """
    with os.fdopen(os.memfd_create(path.stem), "wb", buffering=0) as memory:
        view = memoryview(content)
        while view:
            view = view[memory.write(view) :]
        del content, view
        folder = tempfile.mkdtemp()
        link = f"{folder}/{path.stem}"
        try:
            os.symlink(f"/proc/{os.getpid()}/fd/{memory.fileno()}", link)
            image = sitk.ReadImage(link)  # whose header was looked at before
        except RuntimeError as error:
            raise RuntimeError(str(error).replace(link, str(path))) from None
        finally:
            with contextlib.suppress(FileNotFoundError):  # where it could not be made, that is what is to be said
                os.unlink(link)
            os.rmdir(folder)
    _check_information(image, image.GetNumberOfComponentsPerPixel())
    return _squeeze(image)


def _check_information(source: sitk.ImageFileReader | sitk.Image, channels: int) -> None:
    check_three_dimensional(tuple(source.GetSize()))
    check_spacing(tuple(source.GetSpacing()[:3]))
    if channels > 1:
        reason = f"has {channels} values for each voxel, one was expected"
        raise RejectedError(reason, "split it into one file for each channel")
    if "complex" in sitk.GetPixelIDValueAsString(source.GetPixelID()):
        raise RejectedError("has complex values", "store the magnitude image")


def _squeeze(image: sitk.Image) -> sitk.Image:
    """Drop axes of length one after the third."""
    while image.GetDimension() > 3:
        image = sitk.Extract(image, [*image.GetSize()[:-1], 0], [0] * image.GetDimension())
    return image


def _read_series(files: list[Path]) -> tuple[sitk.Image, str]:
    modality = check_slices(files)
    if len(files) == 1:  # an enhanced, multi-frame file
        return _read_file(files[0]), modality
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise RejectedError("has colour values, one value for each voxel was expected", "remove the series")
    check_spacing(tuple(image.GetSpacing()))
    return _squeeze(image), modality


def _to_ras(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    image = sitk.DICOMOrient(image, "RAS")  # flips and permutes only: an oblique volume keeps its direction
    steps = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())  # columns x, y, z in LPS mm
    affine = np.eye(4)
    affine[:3, :3] = steps[:, ::-1]  # columns D, H, W
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # LPS to RAS
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
        raise RejectedError("the orientation in the header is not usable", "write a valid orientation into the header")
    return sitk.GetArrayFromImage(image), affine + 0.0  # no negative zeros


def read_label(path: Path, volume: Volume) -> np.ndarray:
    """Read the label of a volume that was read: (D, H, W) uint8, or uint16 where a value is above 255.

    Raises RejectedError where it lies on another grid than the image or holds anything but whole numbers from 0 up.
    """
    label = read_volume([path], dicom=False)
    if label.values.shape != volume.values.shape:
        found, expected = (" x ".join(str(n) for n in each.values.shape) for each in (label, volume))
        reason = f"the label measures {found} voxels (D, H, W), its image {expected}"
        raise RejectedError(reason, "resample the label to its image's grid, or remove it")
    distance = _largest_distance(label.affine, volume.affine, volume.values.shape) / volume.spacing_mm.min()
    if distance > LABEL_TOLERANCE_VOXELS:
        reason = f"the label's position or spacing differs from its image's by up to {distance:.1f} voxels"
        raise RejectedError(reason, "resample the label to its image's grid, or correct its header")
    values = label.values
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and np.array_equal(values, np.rint(values))):
        reason = "the label holds values that are not whole numbers"
        raise RejectedError(reason, "store class numbers, not probabilities")
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise RejectedError(f"the label holds values from {low} to {high}", "number the classes from 0 to 65535")
    return values.astype(np.uint8 if high <= 255 else np.uint16)


def write_label(file: Path, values: np.ndarray, grid: FileGrid) -> None:
    """Write a label of a volume that was read, on the grid of the file that it was read from.

    Args:
        file: of a name that no reader looks for yet; its suffix says the format.
        values: (D, H, W) uint8 or uint16, axes as `read_volume` gives them.

    Raises: RuntimeError or OSError, SimpleITK's and the system's.
    """
    direction = np.array(grid.direction).reshape(3, 3)
    probe = sitk.Image(2, 2, 2, sitk.sitkUInt8)
    probe.SetDirection(grid.direction)
    turned = np.array(sitk.DICOMOrient(probe, "RAS").GetDirection()).reshape(3, 3)
    # Column j of the file's direction is column order[j] of the volume's, or its opposite.
    match = np.rint(turned.T @ direction).astype(int)
    order = np.abs(match).argmax(axis=0)
    back = values.transpose(2, 1, 0).transpose(order)
    back = np.flip(back, tuple(axis for axis in range(3) if match[order[axis], axis] < 0))
    image = sitk.GetImageFromArray(np.ascontiguousarray(back.transpose(2, 1, 0)))
    if image.GetSize() != tuple(grid.size):
        raise RuntimeError(f"a label of {image.GetSize()} voxels for a grid of {tuple(grid.size)}")
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin(grid.origin_mm)
    image.SetDirection(grid.direction)
    sitk.WriteImage(image, str(file), useCompression=True)


def _largest_distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance in mm between the places that two affines give to a corner of the grid."""
    corners = np.array([[*(np.array(corner) * (np.array(shape) - 1)), 1] for corner in np.ndindex(2, 2, 2)])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


# What the readers beneath us say, what it means to the person whose file it is, and what to do.
SHEARED = "the axes in the header are not at right angles to each other (sheared)"
MEANINGS = {
    "Unable to determine ImageIO": ("not an image of a known format: its content does not fit its suffix", COPY_AGAIN),
    "Zero-valued spacing": ("the voxel spacing in the header is zero", "write the true voxel size into the header"),
    "orthonormal": (SHEARED, "resample it to a grid with right angles, or correct the header"),
    "File cannot be read": ("the image data are truncated, damaged or missing", COPY_AGAIN),
    "Error reading": ("the image data are truncated or damaged", COPY_AGAIN),
    "nrrdLoad: trouble": ("the image data are truncated or damaged", COPY_AGAIN),
}


def _readable(message: str, path: Path) -> tuple[str, str]:
    """Reason and remedy from an exception of ITK: without folders, source paths, pointers and class names."""
    for words, meaning in MEANINGS.items():
        if words in message:
            return meaning
    lines = [line.strip() for line in message.replace(str(path.parent), "").splitlines()]
    text = " ".join(line for line in lines if not line.startswith("Exception thrown")) or message
    text = re.sub(r"/\S+\.(?:cxx|hxx|h):\d+:|(?:sitk|ITK)(?:::)? ?ERROR: |\(0x[0-9a-f]+\)|\(nil\)", " ", text)
    return f"cannot be read: {' '.join(text.split())[:300] or 'for an unknown reason'}", COPY_AGAIN
