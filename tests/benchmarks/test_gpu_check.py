"""What of benchmarks/gpu_check.sh can be told without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxtrast.benchmarks.kernels import small_sizes

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "gpu_check.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_it_stops_at_once_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    assert done.returncode == 2
    assert "finds no CUDA device; this check needs a machine with a GPU, and nothing was done" in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_operator_has_finite_gradients_at_small_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_sizes.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"cpu {name} done" for name in small_sizes.TYPES]
