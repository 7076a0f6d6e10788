"""Raw volumes to a store: the entry point, its settings, its lock and its summary. `preparation.py` does the work."""

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import store as layout
from .cluster import ClusterPool
from .devices import array_module
from .inventory import Inventory, of_tree
from .nnssl import of_collection
from .normalise import CT_WINDOW_HU, MR_PERCENTILES
from .preparation import Preparation, Work
from .progress import Progress
from .reading import keep_locale
from .resampling import ORDERS
from .sharding import (
    PART,
    SHARDS,
    RecordedPool,
    Shard,
    read_parts,
    refuse_parts,
    retire_parts,
    shard_folders,
    shard_store,
    write_part,
)
from .store import Store, StoreWriteError
from .workers import Pool, WorkerPool

LOCK = ".lock"
OWN_FILES = {LOCK, layout.JOURNAL, layout.SETTINGS, layout.INDEX, layout.REJECTED, layout.DUPLICATES, PART}
OWN_NAMES = OWN_FILES | {layout.VOLUMES, layout.LABELS, SHARDS}


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
    order: int = 3,
    workers: int | None = None,
    minimum_size_voxels: int = 16,
    device: str = "cpu",
    timeout_s: float = 3600.0,
    memory_limit_gb: float | None = None,
    scheduler: str | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> PrepareSummary:
    """Prepare every volume below `raw` into `store`. Run it again after anything: it goes on where it was.

    Args:
        raw: any tree of NIfTI, NRRD, MHA/MHD files and DICOM folders, or one with images/ and labels/; or a list of
            images, nnssl's pretrain_data.json.
        store: a folder of its own; made where it does not exist.
        spacing_mm: edge of the stored voxels, the same on all axes.
        modality: "ct", "mr", or "auto" (by the list or the DICOM tag, else by the values: `normalise.guess_modality`).
        dtype: "float16" or "float32", of the stored volumes.
        order: of the splines that resample images: 3, 1, or 0 for the nearest voxel.
        workers: processes, each with one thread; the number of cores by default. A cluster has its own.
        minimum_size_voxels: a volume with a shorter axis after resampling is rejected.
        device: "cpu" or "cuda", for resampling.
        timeout_s: a volume that takes a worker longer is given up; math.inf for no limit.
        memory_limit_gb: of a worker; a volume that would need more, by its header, is rejected unread.
        scheduler: address of a Dask scheduler; its workers see `raw` and `store` at the same paths. Equal bytes need
            the same kind of processor in all of them; so do shards.
        shard: "i/n": only slice i of n, for `merge` to put together.
        progress: show a bar on standard error, or a line a minute where that is no terminal.

    Raises:
        UserError: nothing to prepare, wrong setting, store of other settings, in use, or not writable (full disk).
        A bad file does not raise: it gets a line in rejected.jsonl and `exit_code` is 1.
    """
    settings = _settings(spacing_mm, modality, dtype, minimum_size_voxels, order)
    count = workers if workers is not None else len(os.sched_getaffinity(0))
    if count < 1:
        raise UserError(f"workers is {count}, at least 1 was expected: leave it out to use every core")
    for name, limit in (("timeout_s", timeout_s), ("memory_limit_gb", memory_limit_gb)):
        if limit is not None and not limit > 0:
            raise UserError(f"{name} is {limit}, a positive number was expected: leave it out for the default")
    if scheduler is None:
        array_module(device)  # a cluster's workers are asked themselves
    raw, store = Path(raw).absolute(), Path(store)  # the workers of a cluster stand in other folders
    slice_ = Shard.parse(shard) if shard is not None else None
    target = store if slice_ is None else shard_store(store, slice_)

    def pool() -> Pool:
        if scheduler is None:
            return WorkerPool(count, timeout_s)
        return ClusterPool(scheduler, raw, target, device, timeout_s)

    work = Work(
        origin=str(raw),
        inventory=_inventory(raw, store, modality),
        pool=pool,
        device=device,
        memory_limit_gb=memory_limit_gb,
        slice=slice_.has if slice_ is not None else None,
    )
    if slice_ is None:
        refuse_parts(store)
        return _run(Preparation(work, target, settings, progress))
    _check_place(store, settings)
    preparation = Preparation(work, target, settings, progress, main=store)
    # A part that is there is no longer valid, once this run has the shard to itself.
    return _run(preparation, lambda: layout.remove(target / PART), lambda: write_part(preparation, slice_))


def merge(store: str | Path, *, progress: bool = True) -> PrepareSummary:
    """Put the shards of a store together, once all of them have ended: the bytes are those of a run without shards.

    Raises UserError where a shard is missing or at work, or saw other files or settings than the others.
    """
    store = Path(store)
    with ExitStack() as locks:
        for folder in shard_folders(store):
            locks.enter_context(_locked(folder))
        parts = read_parts(store)
        work = Work(str(store / SHARDS), parts.find, lambda: RecordedPool(parts, store))

        def finish() -> None:
            retire_parts(store)
            locks.close()  # a network disk keeps the files that somebody has open

        return _run(Preparation(work, store, parts.settings, progress), finish=finish)


def check(store: str | Path, *, workers: int | None = None, progress: bool = True) -> list[str]:
    """Read every file of a finished store; one line for each that is missing, damaged or changed, with the remedy.

    Raises UserError where there is no store to be read, or one with shards that are not merged.
    """
    opened = Store(store)
    refuse_parts(opened.path)
    files = [(file, case.shape, *rest) for case in opened.cases for file, *rest in layout.case_files(opened.path, case)]

    def problem(file: tuple[Any, ...]) -> str:
        try:
            layout.check_file(*file)
        except UserError as error:
            return str(error)
        return ""

    with Progress(progress) as shown, ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return [line for line in shown.follow("checking", len(files), pool.map(problem, files)) if line]


def _inventory(raw: Path, store: Path, modality: str) -> Inventory:
    if raw.suffix.lower() == ".json" and raw.is_file():
        return of_collection(raw, take_modality=modality == "auto")
    if not os.access(raw, os.R_OK | os.X_OK) or not raw.is_dir():
        raise UserError(f"{raw} is not a folder that can be read: give the folder that holds the images")
    return of_tree(raw, store)


def _run(
    preparation: Preparation, begin: Callable[[], None] = lambda: None, finish: Callable[[], None] = lambda: None
) -> PrepareSummary:
    """`begin` is the first thing done with the store locked, `finish` the last."""
    started = time.monotonic()
    target = preparation.target
    try:
        with keep_locale(), _claimed(target, preparation.settings):
            try:
                begin()
                preparation.run()
                finish()
            finally:
                layout.remove_leftovers(target)  # of workers that were ended in the middle of a write
    except StoreWriteError as error:
        kept = f"{len(preparation.known)} volumes are in the store and stay"
        raise UserError(f"cannot write to the store: {error.detail}; {kept}: {_remedy(error.number)}") from error
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


def _settings(spacing_mm: float, modality: str, dtype: str, minimum_size_voxels: int, order: int) -> dict[str, Any]:
    if not (math.isfinite(spacing_mm) and spacing_mm > 0):
        raise UserError(f"spacing_mm is {spacing_mm}, a positive number of millimetres was expected: for example 1.5")
    if modality not in ("auto", "ct", "mr"):
        raise UserError(f"modality is {modality!r}, expected one of auto, ct, mr: leave it out for auto")
    if dtype not in ("float16", "float32"):
        raise UserError(f"dtype is {dtype!r}, expected float16 or float32: leave it out for float16")
    if minimum_size_voxels < 1:
        raise UserError(f"minimum_size_voxels is {minimum_size_voxels}, at least 1 was expected: leave it out for 16")
    if order not in ORDERS:
        raise UserError(f"order is {order}, expected 0, 1 or 3: leave it out for 3")
    return {
        "format": layout.FORMAT,
        "spacing_mm": float(spacing_mm),
        "modality": modality,
        "dtype": dtype,
        "minimum_size_voxels": minimum_size_voxels,
        "order": order,
        "ct_window_hu": list(CT_WINDOW_HU),
        "mr_percentiles": list(MR_PERCENTILES),
    }


@contextmanager
def _claimed(target: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make or check the store's folder and hold its lock."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    with _locked(target):
        layout.remove_leftovers(target)
        _check_settings(target, settings)
        for folder in (layout.VOLUMES, layout.LABELS):
            try:
                (target / folder).mkdir(exist_ok=True)
            except OSError as error:
                raise StoreWriteError.of(error, target / folder) from error
        yield


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a store. It is the kernel's: it goes with the process."""
    try:
        lock = open(target / LOCK, "w", encoding="utf-8")  # noqa: SIM115 - held until the end
    except OSError as error:
        raise _unwritable(target, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is at work on {target}: wait for it to end, or end it") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"the store {target} cannot be locked: {reason}: put it on a disk that can") from error
        yield


def _unwritable(target: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"cannot write to the store {target}: {reason}: {_remedy(error.errno or 0)}")


def _refuse_foreign(target: Path) -> None:
    foreign = sorted(each.name for each in target.iterdir() if each.name not in OWN_NAMES and each.suffix != ".tmp")
    if foreign and not (target / layout.SETTINGS).exists():
        message = f"{target} is not empty and not a store (it holds {foreign[0]}): give a new or an empty folder"
        raise UserError(message)


def _check_place(store: Path, settings: dict[str, Any]) -> None:
    """Refuse what the merge would refuse, before a shard has worked for it."""
    if store.is_dir():
        _refuse_foreign(store)
    if (store / layout.INDEX).exists():
        _refuse_other_settings(store, layout.read_settings(store), settings)


def _check_settings(target: Path, settings: dict[str, Any]) -> None:
    present = layout.read_settings(target)
    empty = not (target / layout.INDEX).exists() and not (target / layout.JOURNAL).exists()
    if present == settings:
        return
    if present is None or empty:
        layout.write_settings(target, settings)
        return
    _refuse_other_settings(target, present, settings)


def _refuse_other_settings(target: Path, present: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    present = present or {}
    if present == settings:
        return
    keys = [key for key in sorted(settings | present) if settings.get(key) != present.get(key)]
    changes = ", ".join(f"{key} {present.get(key)} (now {settings.get(key)})" for key in keys)
    raise UserError(f"{target} was prepared with {changes}: use the same settings, or give another folder")
