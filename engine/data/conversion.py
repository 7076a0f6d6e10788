"""What a worker process does with one source: digests, series of a folder, conversion. Jobs and replies are JSON."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from . import dicom, normalise, resampling, store
from .devices import array_module
from .foreground import foreground_places
from .headers import check_regular, detached_files
from .memory import check_memory
from .reading import Volume, read_label, read_volume, read_volume_and_grid
from .rejection import RejectedError


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job. The reply has one of the keys done, rejected (reason, remedy, label) or store_error; with a rejection
    goes `transient` where another try may do better."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    tasks = {"series": _series, "digest": _digest, "convert": _convert, "convert_and_describe": _convert_and_describe}
    task = tasks[job["task"]]
    try:
        return {"done": task(job)}
    except RejectedError as error:
        return _rejected(error.reason, error.remedy, error)
    except store.StoreWriteError as error:
        return {"store_error": error.detail, "number": error.number}
    except MemoryError as error:
        return _rejected("needs more memory than there is", "use fewer workers, or a machine with more memory", error)
    except OSError as error:
        reply = _rejected(f"cannot be read: {error.strerror or error}", "make the file readable and run again", error)
        return {**reply, "transient": error.errno in store.TRANSIENT}
    except Exception as error:  # one strange file must not stop the others
        reason = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return _rejected(reason, "report it with the file, or remove the file", error)


def _rejected(reason: str, remedy: str, error: BaseException) -> dict[str, Any]:
    return {"rejected": {"reason": reason, "remedy": remedy, "label": getattr(error, "of_label", False)}}


class _OfLabel:
    """Marks every exception raised inside as being about the label and not about the image."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.of_label = True  # type: ignore[attr-defined]


def _series(job: dict[str, Any]) -> dict[str, Any]:
    return dicom.list_series(Path(job["folder"]), job["names"])


def _digest(job: dict[str, Any]) -> dict[str, str | None]:
    """sha256 of the source and of its label. Several files: of their digests, sorted, so that names do not matter."""
    files = [Path(file) for file in job["files"]]
    for file in files:
        check_regular(file)
    if len(files) == 1:
        files += detached_files(files[0])
    label = None
    if job["label"] is not None:
        with _OfLabel():
            check_regular(Path(job["label"]))
            label = _combined([Path(job["label"]), *detached_files(Path(job["label"]))])
    return {"source": _combined(files), "label": label}


def _combined(files: list[Path]) -> str:
    digests = sorted(store.file_sha256(file) for file in files)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _convert(job: dict[str, Any]) -> dict[str, Any]:
    """Read, check, normalise, resample and store one volume and its label; returns the fields of its Case."""
    if job["memory_limit_gb"] is not None:
        check_memory(job, job["memory_limit_gb"])
    return _store(job, read_volume([Path(file) for file in job["files"]], job["dicom"]))


def _convert_and_describe(job: dict[str, Any]) -> dict[str, Any]:
    """As `_convert`, with all that a label needs to go back to the file's own grid."""
    volume, grid = read_volume_and_grid([Path(file) for file in job["files"]], job["dicom"])
    own = {"shape": list(volume.values.shape), "spacing_mm": volume.spacing_mm.tolist()}
    return {"case": _store(job, volume), "file_grid": asdict(grid), **own}


def _store(job: dict[str, Any], volume: Volume) -> dict[str, Any]:
    settings = job["settings"]
    xp = array_module(job["device"])
    spacing = volume.spacing_mm
    grid = resampling.isotropic_grid(volume.values.shape, spacing, settings["spacing_mm"])
    resampling.check_grid(grid, settings["minimum_size_voxels"], spacing, settings["spacing_mm"])
    normalise.check_values(volume.values)
    label = None
    if job["label"] is not None:
        with _OfLabel():
            label = resampling.resample_label(read_label(Path(job["label"]), volume), grid, xp=xp)
    modality = _modality(volume, settings["modality"] if settings["modality"] != "auto" else job["modality"])
    normalised = normalise.normalise(volume.values, modality)
    values = resampling.resample_image(normalised, grid, order=settings["order"], xp=xp)
    stored = values.astype(settings["dtype"])
    intensity = normalise.describe(stored)
    affine = grid.affine(volume.affine)
    target, name = Path(job["store"]), f"{job['id']}.npy"
    label_fields: dict[str, Any] = {}
    if label is not None:
        label_fields = {
            "label_sha256": store.write_array(target / store.LABELS / name, label),
            "label_dtype": str(label.dtype),
            "label_classes": [int(each) for each in np.unique(label) if each != 0],
        }
    return {
        "shape": [int(each) for each in stored.shape],
        "spacing_mm": [float(each) for each in np.linalg.norm(affine[:3, :3], axis=0)],
        "affine": affine.tolist(),
        "modality": modality,
        "dtype": settings["dtype"],
        "intensity": intensity,
        "foreground": foreground_places(stored, intensity["low"], intensity["high"]),
        "sha256": store.write_array(target / store.VOLUMES / name, stored),
        **label_fields,
    }


def _modality(volume: Volume, wanted: str) -> str:
    """What is wanted or stated, else the DICOM tag, else a look at the values."""
    if wanted:
        return wanted
    if not volume.modality:
        return normalise.guess_modality(volume.values)
    if volume.modality in ("CT", "MR"):
        return volume.modality.lower()
    reason = f"DICOM modality {volume.modality}, CT or MR was expected"
    raise RejectedError(reason, "remove it, or prepare with modality mr (percentiles) or ct (HU) to use it anyway")
