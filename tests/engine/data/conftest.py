"""Small volumes written with SimpleITK, and what the tests of prepare and of the store share.

The kernels of views are tested without SimpleITK, too: it is imported where it is used.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

if TYPE_CHECKING:
    from voxtrast.engine.data.prepare import PrepareSummary


def smooth_values(seed: int, shape: tuple[int, int, int] = (20, 22, 24)) -> np.ndarray:
    """(D, H, W) float32, positive, no flat background: like a small MR crop."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return (500 + 400 * ndimage.gaussian_filter(noise, 1.5)).astype(np.float32)


@pytest.fixture(scope="session")
def values() -> Callable[..., np.ndarray]:
    return smooth_values


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """write(path, array (D, H, W), spacing_mm=..., dtype=...) through SimpleITK, whatever the suffix."""
    import SimpleITK as sitk

    def writer(
        path: Path,
        array: np.ndarray | int = 0,
        spacing_mm: tuple[float, float, float] = (1.5, 1.5, 1.5),
        direction: tuple[float, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
        origin: tuple[float, float, float] = (0, 0, 0),
    ) -> Path:
        image = sitk.GetImageFromArray(smooth_values(array) if isinstance(array, int) else array, isVector=False)
        if image.GetDimension() == 3:
            image.SetSpacing(spacing_mm)
            image.SetDirection(direction)
            image.SetOrigin(origin)
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        return path

    return writer


@pytest.fixture(scope="session")
def write_dicom() -> Callable[..., list[Path]]:
    """write_dicom(folder, array int16 (D, H, W), uid=..., modality=...): one file a slice, 2 mm apart, HU shifted."""
    import SimpleITK as sitk

    def writer(
        folder: Path,
        array: np.ndarray,
        uid: str = "1.2.3.4",
        modality: str = "CT",
        step_mm: float = 2.0,
        shift_mm: tuple[float, float] = (0.0, 0.0),
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        output = sitk.ImageFileWriter()
        output.KeepOriginalImageUIDOn()
        for number, plane in enumerate(array):
            image = sitk.GetImageFromArray(plane[None].astype(np.int16))
            image.SetSpacing((1.5, 1.5, 2.0))
            tags = {
                "0008|0060": modality,
                "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
                "0008|0018": f"{uid}.{number + 1}",
                "0020|000d": "1.2.3",
                "0020|000e": uid,
                "0020|0013": str(number + 1),
                "0020|0032": f"{number * shift_mm[0]}\\{number * shift_mm[1]}\\{number * step_mm}",
                "0020|0037": "1\\0\\0\\0\\1\\0",
                "0028|1052": "-1024",
                "0028|1053": "1",
            }
            for key, value in tags.items():
                image.SetMetaData(key, value)
            # names that sort against the slices' order: position decides, not the name
            file = folder / f"{uid.replace('.', '_')}_{len(array) - number:03d}.dcm"
            output.SetFileName(str(file))
            output.Execute(image)
            files.append(file)
        return files

    return writer


@pytest.fixture(scope="session")
def ras_affine() -> Callable[..., np.ndarray]:
    """ras_affine(codes, spacing_mm, angles_degrees): (i, j, k) -> RAS mm of an image whose axes run toward `codes`."""

    def build(codes: str, spacing_mm: tuple[float, ...], angles_degrees: tuple[float, ...]) -> np.ndarray:
        affine = np.diag([0.0, 0.0, 0.0, 1.0])
        for axis, code in enumerate(codes):
            world = max("RAS".find(code), "LPI".find(code))
            affine[world, axis] = spacing_mm[axis] * (1 if code in "RAS" else -1)
        affine[:3, :3] = Rotation.from_euler("xyz", angles_degrees, degrees=True).as_matrix() @ affine[:3, :3]
        affine[:3, 3] = (-11.0, 7.5, 3.25)
        return affine

    return build


@pytest.fixture(scope="session")
def run() -> "Callable[..., PrepareSummary]":
    """prepare() with one worker, as most tests have one or two volumes, and no bar."""

    from voxtrast.engine.data.prepare import prepare

    def runner(raw: Path, store: Path, **settings: Any) -> "PrepareSummary":
        return prepare(raw, store, **{"workers": 1, "progress": False, **settings})

    return runner


@pytest.fixture(scope="session")
def rejected() -> Callable[[Path], dict[str, dict[str, str]]]:
    """rejected(store): lines of rejected.jsonl by file; each has exactly the three fields, on one line."""

    def reader(store: Path) -> dict[str, dict[str, str]]:
        lines = [json.loads(line) for line in (store / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(set(line) == {"file", "reason", "remedy"} and all(line.values()) for line in lines)
        assert [line["file"] for line in lines] == sorted(line["file"] for line in lines)
        return {line["file"]: line for line in lines}

    return reader


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """contents(store): sha256 of every file by its path: equal for equal stores."""

    def reader(store: Path) -> dict[str, str]:
        files = sorted(file for file in store.rglob("*") if file.is_file())
        return {str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    return reader


@pytest.fixture(scope="session")
def real_volumes() -> Path:
    folder = os.environ.get("VOXTRAST_DATA")
    if not folder:
        pytest.skip("VOXTRAST_DATA is not set: no real volumes to test on")
    return Path(folder)
