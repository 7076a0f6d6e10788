"""How fast the volumes of a store are read: whole regions, by the data plane's own kind of access, cold and warm."""

import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.store import Case, Store
from .finding import BROKEN, GOOD, NOTE, Finding

CASES, CROP = 12, 96  # voxels a side
SLOW_MB_S = 50.0


def check_store(path: Path) -> Iterator[Finding]:
    store = Store(path)
    yield Finding("store", "index", GOOD, f"{path}: {len(store.cases)} volumes")
    damaged = store.damaged(False)
    if damaged:
        case, reason = next(iter(damaged.items()))
        yield Finding(
            "store", "files", BROKEN, f"{len(damaged)} cannot be read, first {case}: {reason}", "prepare again"
        )
        return
    chosen = random.Random(0).sample(store.cases, min(CASES, len(store.cases)))
    forgotten = all(_forget(store.path / "volumes" / f"{case.id}.npy") for case in chosen)
    cold, warm = (_speed(store, chosen) for _ in range(2))
    # The kernel may keep pages that it was asked to drop: a first pass as fast as the second one tells.
    if not forgotten or cold > 0.7 * warm:
        detail = f"{cold:.0f} MB/s, then {warm:.0f}: both from the page cache, which says nothing of the disk"
        yield Finding(
            "store", "reading", NOTE, detail, "measure right after a restart, or a store larger than the memory"
        )
    elif cold < SLOW_MB_S:
        detail = f"{cold:.0f} MB/s from the disk, {warm:.0f} from the page cache"
        yield Finding("store", "reading", NOTE, detail, "copy the store to a local disk, or raise loader.prefetch")
    else:
        yield Finding("store", "reading", GOOD, f"{cold:.0f} MB/s from the disk, {warm:.0f} from the page cache")


def _forget(file: Path) -> bool:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _speed(store: Store, cases: Sequence[Case]) -> float:
    """Megabytes a second of crops in the middle of the volumes, through a memory map."""
    began, read = time.perf_counter(), 0
    for case in cases:
        volume = store.volume(case)
        region = tuple(slice(max(0, (size - CROP) // 2), max(0, (size - CROP) // 2) + CROP) for size in volume.shape)
        read += volume[region].copy().nbytes
    return read / 1e6 / (time.perf_counter() - began)
