"""Raw volumes to a store: the entry point, its settings, its lock and its summary. `preparation.py` does the work."""

import errno
import fcntl
import locale
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import store as layout
from .normalise import CT_WINDOW_HU, MR_PERCENTILES
from .preparation import Preparation
from .store import StoreWriteError

LOCK = ".lock"
OWN_FILES = {LOCK, layout.JOURNAL, layout.SETTINGS, layout.INDEX, layout.REJECTED, layout.DUPLICATES}
OWN_NAMES = OWN_FILES | {layout.VOLUMES, layout.LABELS}


@dataclass(frozen=True)
class PrepareSummary:
    """What a run did. `rejected` counts the lines of rejected.jsonl apart from `duplicates`; `bytes` is the store's."""

    prepared: int
    unchanged: int
    rejected: int
    duplicates: int
    seconds: float
    bytes: int
    dropped: int = 0  # cases whose source is gone from RAW
    other_files: int = 0  # files in RAW that are not images
    modalities: tuple[tuple[str, int], ...] = ()

    @property
    def exit_code(self) -> int:
        """0 where every image is in the store, 1 where rejected.jsonl has lines."""
        return 1 if self.rejected or self.duplicates else 0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name.upper()}" for name, count in self.modalities) or "no volume"
        counts = [f"{self.prepared} prepared", f"{self.unchanged} unchanged", f"{self.rejected} rejected"]
        counts += [f"{self.duplicates} duplicates"]
        counts += [f"{self.dropped} dropped (source gone)"] if self.dropped else []
        counts += [f"{self.other_files} other files passed over"] if self.other_files else []
        return f"{', '.join(counts)}; store: {kinds}, {self.bytes / 1e6:.1f} MB; {self.seconds:.1f} s"


def prepare(
    raw: str | Path,
    store: str | Path,
    *,
    spacing_mm: float = 1.5,
    modality: str = "auto",
    dtype: str = "float16",
    workers: int | None = None,
    minimum_size_voxels: int = 16,
    progress: bool = True,
) -> PrepareSummary:
    """Prepare every volume below `raw` into `store`. Run it again after anything: it goes on where it was.

    Args:
        raw: any tree of NIfTI, NRRD, MHA/MHD files and DICOM folders, or one with images/ and labels/.
        store: a folder of its own; made where it does not exist.
        spacing_mm: edge of the stored voxels, the same on all axes.
        modality: "ct", "mr", or "auto" (by DICOM tag, else by the values: `normalise.guess_modality`).
        dtype: "float16" or "float32", of the stored volumes.
        workers: processes, each with one thread; the number of cores by default.
        minimum_size_voxels: a volume with a shorter axis after resampling is rejected.
        progress: show a bar on standard error.

    Raises:
        UserError: nothing to prepare, wrong setting, store of other settings, in use, or not writable (full disk).
        A bad file does not raise: it gets a line in rejected.jsonl and `exit_code` is 1.
    """
    started = time.monotonic()
    settings = _settings(spacing_mm, modality, dtype, minimum_size_voxels)
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    if count < 1:
        raise UserError(f"workers is {count}, at least 1 was expected: leave it out to use every core")
    raw, target = Path(raw), Path(store)
    if not os.access(raw, os.R_OK | os.X_OK) or not raw.is_dir():
        raise UserError(f"{raw} is not a folder that can be read: give the folder that holds the images")
    preparation = Preparation(raw, target, settings, count, progress)
    spoken = locale.setlocale(locale.LC_ALL)
    try:
        with _claimed(target, settings):
            try:
                preparation.run()
            finally:
                layout.remove_leftovers(target)  # of workers that were ended in the middle of a write
    except StoreWriteError as error:
        kept = f"{len(preparation.known)} volumes are in the store and stay"
        raise UserError(f"cannot write to the store: {error.detail}; {kept}: {_remedy(error.number)}") from error
    finally:
        # GDCM leaves the C locale behind after some damaged files, and with it ASCII for whatever opens a text next.
        locale.setlocale(locale.LC_ALL, spoken)
    done = preparation
    modalities = [(kind, sum(case.modality == kind for case in done.cases)) for kind in ("ct", "mr")]
    return PrepareSummary(
        prepared=done.prepared,
        unchanged=len(done.cases) - done.prepared,
        rejected=len(set(done.rejected)) - done.duplicates,
        duplicates=done.duplicates,
        seconds=time.monotonic() - started,
        bytes=done.bytes,
        dropped=done.dropped,
        other_files=done.other_files,
        modalities=tuple((kind, count) for kind, count in modalities if count),
    )


def _remedy(number: int) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run the same command again, it goes on from here"
    return "make the folder writable or give another one, then run the same command again"


def _settings(spacing_mm: float, modality: str, dtype: str, minimum_size_voxels: int) -> dict[str, Any]:
    if not (math.isfinite(spacing_mm) and spacing_mm > 0):
        raise UserError(f"spacing_mm is {spacing_mm}, a positive number of millimetres was expected: for example 1.5")
    if modality not in ("auto", "ct", "mr"):
        raise UserError(f"modality is {modality!r}, expected one of auto, ct, mr: leave it out for auto")
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype is {dtype!r}, expected float16 or float32: leave it out for float16")
    if minimum_size_voxels < 1:
        raise UserError(f"minimum_size_voxels is {minimum_size_voxels}, at least 1 was expected: leave it out for 16")
    return {
        "format": layout.FORMAT,
        "spacing_mm": float(spacing_mm),
        "modality": modality,
        "dtype": dtype,
        "minimum_size_voxels": minimum_size_voxels,
        "ct_window_hu": list(CT_WINDOW_HU),
        "mr_percentiles": list(MR_PERCENTILES),
    }


@contextmanager
def _claimed(target: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make or check the store's folder and hold its lock. The lock is the kernel's: it goes with the process."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        foreign = sorted(each.name for each in target.iterdir() if each.name not in OWN_NAMES and each.suffix != ".tmp")
        if foreign and not (target / layout.SETTINGS).exists():
            message = f"{target} is not empty and not a store (it holds {foreign[0]}): give a new or an empty folder"
            raise UserError(message)
        lock = open(target / LOCK, "w")  # noqa: SIM115 - held until the end
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to the store {target}: {reason}: {_remedy(error.errno or 0)}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is at work on {target}: wait for it to end, or end it") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the store {target} cannot be locked: {reason}: put it on a disk that can") from error
        layout.remove_leftovers(target)
        _check_settings(target, settings)
        for folder in (layout.VOLUMES, layout.LABELS):
            try:
                (target / folder).mkdir(exist_ok=True)
            except OSError as error:
                raise StoreWriteError.of(error, target / folder) from error
        yield
    finally:
        lock.close()


def _check_settings(target: Path, settings: dict[str, Any]) -> None:
    present = layout.read_settings(target)
    empty = not (target / layout.INDEX).exists() and not (target / layout.JOURNAL).exists()
    if present == settings:
        return
    if present is None or empty:
        layout.write_settings(target, settings)
        return
    keys = [key for key in sorted(settings | present) if settings.get(key) != present.get(key)]
    changes = ", ".join(f"{key} {present.get(key)} (now {settings.get(key)})" for key in keys)
    raise UserError(f"{target} was prepared with {changes}: use the same settings, or give another folder")
