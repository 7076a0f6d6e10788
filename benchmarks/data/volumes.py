"""The volumes that views are made of: a store of made-up ones, and any store in memory, for those who do not read."""

import os
from pathlib import Path

import numpy as np
from scipy import ndimage

from voxtrast.engine.data.planner import usable_cases
from voxtrast.engine.data.store import VOLUMES, Case, Store, write_array, write_index, write_settings

from ..place import Cannot
from .recipe import Volume

COUNT = 4  # more of them would only take longer to make: no cache holds one
MOST = 8  # of a store, in memory


def side_of(crop: int) -> int:
    """Of made-up volumes: crops have room to move, and most of what views look at lies inside."""
    return crop + crop // 2 + 16


def make_store(folder: Path, side: int, dtype: str) -> None:
    """Smooth noise of (side, side, side), as `prepare` would leave it."""
    (folder / VOLUMES).mkdir(parents=True)
    cases = []
    for number in range(COUNT):
        noise = np.random.default_rng(number).standard_normal((side,) * 3, np.float32)
        smooth = ndimage.gaussian_filter(noise, 1.5)
        voxels = (smooth / smooth.std()).astype(dtype)
        low, high = np.percentile(voxels[::3, ::3, ::3].astype(np.float32), [0.5, 99.5])
        intensity = {"background": float(voxels.min()), "low": float(low), "high": float(high), "mean": 0.0, "std": 1.0}
        digest = write_array(folder / VOLUMES / f"made-{number}.npy", voxels)
        affine = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        shape, spacing = (side, side, side), (1.0, 1.0, 1.0)
        cases.append(Case(f"made-{number}", shape, spacing, affine, "mr", dtype, intensity, "made up", "", digest))
    write_settings(folder, {"format": 1, "spacing_mm": 1.0, "order": 3})
    write_index(folder, cases)


def load_volumes(path: Path, crop: int) -> list[Volume]:
    """Raises: UserError where the store holds none that is large enough."""
    store = Store(path)
    cases, _ = usable_cases(store.cases, (crop,) * 3)
    return [
        Volume(
            np.array(store.volume(case), np.float32),
            case.intensity["background"],
            case.intensity["high"] - case.intensity["low"],
        )
        for case in cases[:MOST]
    ]


class ColdFiles:
    """The files of a store's volumes, to be put out of the page cache.

    Raises: Cannot where that has no effect, as in a file system that lies in memory.
    """

    def __init__(self, store: Store) -> None:
        self._files = [store.path / VOLUMES / f"{case.id}.npy" for case in store.cases]
        for file in self._files:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())  # what is not written yet would stay
        self.evict()
        try:
            cold = [not self._in_memory(file) for file in self._files]
        except OSError as error:
            raise Cannot(f"whether a file lies in memory is not to be learnt here: {error.strerror}") from error
        if not any(cold):
            raise Cannot("the store stays in memory, whatever the kernel is told (tmpfs?): put it on a disk")

    @staticmethod
    def _in_memory(file: Path) -> bool:
        """Of one place in it; asking has the kernel read there, and a fast disk may be first."""
        with open(file, "rb") as stream:
            try:
                os.preadv(stream.fileno(), [bytearray(16)], file.stat().st_size // 2, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
        return True

    def evict(self) -> None:
        for file in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
