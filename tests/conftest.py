"""For all tests; what only some need is imported where it is used: the kernels are tested with torch alone, too."""

import locale
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton


SPOKEN = locale.setlocale(locale.LC_ALL)


@pytest.fixture(autouse=True)
def keep_locale() -> Iterator[None]:
    """ITK leaves the C locale behind after some damaged files: ASCII, for every test that follows."""
    locale.setlocale(locale.LC_ALL, SPOKEN)  # a fixture of the session may have read some
    yield
    locale.setlocale(locale.LC_ALL, SPOKEN)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six made-up volumes of 40^3 at 1 mm, prepared the way a user's are: smooth blobs with texture, and a label of the
    bright parts."""
    import numpy as np
    import SimpleITK as sitk
    from scipy import ndimage

    from voxtrast.engine.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "raw" / kind).mkdir(parents=True)
    for index in range(6):
        blobs = ndimage.gaussian_filter(generator.standard_normal((40, 40, 40)), 4)
        texture = ndimage.gaussian_filter(generator.standard_normal((40, 40, 40)), 1)
        volume = 500 + 2000 * blobs / blobs.std() + 300 * texture / texture.std()
        for kind, array in (("images", volume), ("labels", (blobs > blobs.std()).astype(np.uint8))):
            image = sitk.GetImageFromArray(array.astype(np.float32) if kind == "images" else array)
            sitk.WriteImage(image, str(folder / "raw" / kind / f"case_{index}.nii.gz"))
    summary = prepare(folder / "raw", folder / "store", spacing_mm=1.0, workers=1, progress=False)
    assert summary.exit_code == 0
    return folder / "store"
