"""nvcc compiles all of csrc/cuda on machines without a GPU; nothing spills."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler (no GPU)"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree: setup.py is not here"),
]


def compiled(architectures: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled, of each kernel for each architecture."""
    monkeypatch.setenv("VOXTRAST_CUDA_ARCHITECTURES", architectures)
    command = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["cuda_command"]("nvcc", target)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert target.stat().st_size > 0
    pattern = r"function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?(\d+) registers"
    found = re.findall(pattern, run.stdout + run.stderr, re.DOTALL)
    return {f"{sm} {name}": (int(registers), int(stored) + int(read)) for name, sm, stored, read, registers in found}


def check(kernels: dict[str, tuple[int, int]], architectures: str) -> None:
    for name, (registers, spilled) in sorted(kernels.items()):
        print(f"{registers:4} registers, {spilled} bytes spilled: {name}")
    for architecture in architectures.split(";"):
        names = [name for name in kernels if name.startswith(f"sm_{architecture} ")]
        assert any("copy_words" in name for name in names)
        assert sum("correlate" in name for name in names) >= 9
    assert all(spilled == 0 for _, spilled in kernels.values())


def test_cuda_sources_compile_without_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(compiled("90", tmp_path / "_C_cuda.so", monkeypatch), "90")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_other_architectures_do_not_spill_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures = os.environ.get("VOXTRAST_CUDA_ARCHITECTURES", "80;86;100;120")
    check(compiled(architectures, tmp_path / "_C_cuda.so", monkeypatch), architectures)
