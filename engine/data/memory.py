"""How much memory a volume will take, told by its header alone."""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from .rejection import RejectedError
from .resampling import isotropic_grid

BASE_BYTES = 200e6  # of a worker that has read nothing: Python, numpy, scipy, SimpleITK
BYTES_OF_PIXEL = {"8-bit": 1, "16-bit": 2, "32-bit": 4, "64-bit": 8}


def check_memory(job: dict[str, Any], limit_gb: float) -> None:
    """Reject a volume that would take its worker beyond the limit. A header that cannot be read passes: reading the
    volume will say what is wrong with it."""
    try:
        needed = estimated_bytes([Path(file) for file in job["files"]], job["settings"]["spacing_mm"])
    except RuntimeError:
        return
    if needed > limit_gb * 1e9:
        allowed = f"{limit_gb:g} GB a worker are allowed"
        reason = f"too large for the memory: about {needed / 1e9:.2g} GB are needed, {allowed}"
        raise RejectedError(reason, "raise memory_limit_gb (with fewer workers), or prepare with a coarser spacing")


def estimated_bytes(files: list[Path], spacing_mm: float) -> float:
    """Peak of a worker, from above: of what is held at once while a volume is read, resampled and stored.

    Reading: the file, its content and ITK's two copies (as read, and turned). Resampling: the turned array, float32
    of the normalised volume, its clipped foreground and mask, and the volume between two axes and behind the last.
    Storing: what is stored, in float32 twice over.
    Raises RuntimeError where the reader cannot make sense of the header.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(files[0]))
    reader.ReadImageInformation()
    size, spacing = reader.GetSize()[:3][::-1], reader.GetSpacing()[:3][::-1]
    if len(files) > 1:
        size = (len(files), *size[1:])
    voxels = float(np.prod(size))
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    pixel = next((count for name, count in BYTES_OF_PIXEL.items() if name in kind), 8)
    if not all(0 < each < np.inf for each in spacing):
        return 0.0  # is refused for that
    grid = isotropic_grid(tuple(size), np.array(spacing), spacing_mm)
    after = float(np.prod(grid.shape))
    reading = sum(file.stat().st_size for file in files) + 3 * pixel * voxels
    resampling = (pixel + 13) * voxels + 8 * max(voxels, after)
    storing = (pixel + 4) * voxels + 12 * after
    return BASE_BYTES + max(reading, resampling, storing)
