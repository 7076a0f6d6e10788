"""nvcc compiles the kernels of views without a GPU, nothing spills, and DALI takes the operator that comes of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptxas import registers_and_spills

from voxtrast.engine.data import native

KERNELS = ("smooth_lines", "sample_viewsIf", "sample_viewsI6__half", "finish_statistics", "clear_windows",
           "mark_windows", "shuffle_pixels", "swap_patches", "lower_resolution", "pass_over_views")  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler (no GPU)")


def check(architecture: str, target: Path) -> None:
    source = native.SOURCES / "view" / "cuda" / "gpu_views.cu"
    command = [
        "nvcc",
        "-O3",
        "-std=c++20",
        "-Xptxas",
        "-v",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
    ]
    run = subprocess.run(
        [*command, f"-I{native.SOURCES}", "-c", source, "-o", target],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert run.returncode == 0, run.stderr
    found = registers_and_spills(run.stdout + run.stderr)
    for name, (registers, spilled) in sorted(found.items()):
        print(f"{registers:4} registers, {spilled} bytes spilled: {name}")
    assert all(sum(kernel in name for name in found) == 1 for kernel in KERNELS)
    assert len(found) == len(KERNELS)
    assert all(spilled == 0 for _, spilled in found.values())
    # Two blocks of 256 threads share the 65,536 registers of a multiprocessor.
    assert all(registers <= 128 for registers, _ in found.values())


def test_the_kernels_of_views_compile_without_spills(tmp_path: Path) -> None:
    check("90", tmp_path / "views.o")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "86", "100", "120"])
def test_the_other_architectures_do_not_spill_either(tmp_path: Path, architecture: str) -> None:
    check(architecture, tmp_path / "views.o")


GRAPH = """
from voxtrast.engine.data import native
assert native.load_plugin() is None
from nvidia.dali import Pipeline, fn
pipeline = Pipeline(batch_size=2, num_threads=1, device_id=0, exec_dynamic=True)
with pipeline:
    files, plans = fn.external_source(source=lambda: 1, num_outputs=2, ndim=[1, 1])
    region = fn.voxtrast_read(files, plans)
    views = fn.voxtrast_view(region.gpu(), plans, device="gpu", view=0, clean=True, displacement=True, mask=True)
    print(*(view.device for view in views), fn.voxtrast_view(region, plans, view=0).device)
"""


@pytest.mark.slow
def test_dali_takes_the_operator_for_both_devices() -> None:
    environment = {**os.environ, "VOXTRAST_CUDA_ARCHITECTURES": "90"}
    environment.pop("VOXTRAST_CUDA", None)
    run = subprocess.run(
        [sys.executable, "-c", GRAPH], env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["gpu"] * 4 + ["cpu"]
