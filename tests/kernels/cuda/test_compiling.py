"""nvcc compiles all of csrc/cuda on machines without a GPU; nothing spills, and torch loads what comes out."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ptxas import registers_and_spills

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler (no GPU)"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree: setup.py is not here"),
]


def compiled(architectures: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled, of each kernel for each architecture."""
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", architectures)
    command = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["cuda_command"]("nvcc", target)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    assert run.returncode == 0, run.stderr
    assert target.stat().st_size > 0
    return registers_and_spills(run.stdout + run.stderr)


def check(kernels: dict[str, tuple[int, int]], architectures: str) -> None:
    for name, (registers, spilled) in sorted(kernels.items()):
        print(f"{registers:4} registers, {spilled} bytes spilled: {name}")
    for architecture in architectures.split(";"):
        names = [name for name in kernels if name.startswith(f"sm_{architecture} ")]
        assert any("copy_words" in name for name in names)
        assert sum("correlate" in name for name in names) >= 9
    assert all(spilled == 0 for _, spilled in kernels.values())


LOAD = """
import ctypes, os, sys, torch
from voxtrast.kernels import _native
dl = ctypes.CDLL(None)
dl.dlopen.restype, dl.dlerror.restype = ctypes.c_void_p, ctypes.c_char_p
assert dl.dlopen(sys.argv[1].encode(), os.RTLD_LAZY), dl.dlerror()  # what only CUDA builds have is not looked up
for name in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"voxtrast::{name}", "CUDA"), name
"""
OPERATORS = """
stream_copy warp warp_backward compose_displacement vector_regression_loss vector_regression_loss_backward
warped_cosine_loss warped_cosine_loss_backward local_correlation local_correlation_backward
"""


def test_cuda_sources_compile_without_spills_and_find_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "_C_cuda.so"
    check(compiled("90", target, monkeypatch), "90")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, target, *OPERATORS.split()],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_other_architectures_do_not_spill_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures = os.environ.get("VOXTRAST_CUDA_ARCHITECTURES", "80;86;100;120")
    check(compiled(architectures, tmp_path / "_C_cuda.so", monkeypatch), architectures)
