"""The memory that a volume takes, told before it is read."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from voxtrast.engine.data.memory import estimated_bytes
from voxtrast.engine.data.workers import ONE_THREAD

MEASURE = """
import pathlib, sys
from voxtrast.engine.data.conversion import perform
settings = {"spacing_mm": float(sys.argv[2]), "minimum_size_voxels": 1, "modality": "mr", "dtype": "float16",
            "order": 3}
job = {"task": "convert", "source": "a", "id": "a", "files": [sys.argv[1]], "dicom": False, "label": None,
       "store": sys.argv[3], "settings": settings, "modality": "", "device": "cpu", "memory_limit_gb": None}
assert "done" in perform(job)
status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


SOLID, LONG = (150, 160, 170), (6000, 16, 16)


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "dtype"),
    [
        (SOLID, 0.75, "int16"),
        (LONG, 1.5, "int16"),
        *[pytest.param(SOLID, 1.5, dtype, marks=pytest.mark.slow) for dtype in ("float32", "float64")],
        pytest.param(LONG, 0.5, "int16", marks=pytest.mark.slow),
        pytest.param(LONG[::-1], 1.5, "int16", marks=pytest.mark.slow),
    ],
)
def test_a_worker_stays_below_the_estimate_and_not_far(
    shape: tuple, spacing_mm: float, dtype: str, tmp_path: Path, write: Callable
) -> None:
    values = (np.random.default_rng(0).normal(size=shape) * 100 + 500).astype(dtype)
    file = write(tmp_path / "a.mha", values, (1.0, 1.0, 1.0))
    (tmp_path / "volumes").mkdir()
    environment = {**os.environ, **ONE_THREAD}
    command = [sys.executable, "-c", MEASURE, str(file), str(spacing_mm), str(tmp_path)]
    peak = int(
        subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, env=environment
        ).stdout
    )
    estimate = estimated_bytes([file], spacing_mm)
    assert 0.4 * estimate < peak < estimate, (peak, estimate)


def test_a_volume_beyond_the_limit_is_refused_unread(
    tmp_path: Path, write: Callable, run: Callable, rejected: Callable
) -> None:
    write(tmp_path / "raw/small.nii.gz", 1)
    file = write(tmp_path / "raw/large.mha", np.zeros((4, 400, 400), np.int16))
    header = file.read_bytes()[:-1_280_000].replace(b"400 400 4\n", b"400 400 400\n")
    file.write_bytes(header)
    with open(file, "r+b") as stream:  # zeros: were it read, it would be refused as constant
        stream.truncate(len(header) + 2 * 400**3)
    summary = run(tmp_path / "raw", tmp_path / "store", memory_limit_gb=0.5)
    assert summary.prepared == 1
    line = rejected(tmp_path / "store")["large.mha"]
    assert line["reason"].startswith("too large for the memory: about 1.7")
    assert line["reason"].endswith("0.5 GB a worker are allowed")
    run(tmp_path / "raw", tmp_path / "store", memory_limit_gb=1.7)
    assert rejected(tmp_path / "store")["large.mha"]["reason"] == "constant: every voxel is 0"
