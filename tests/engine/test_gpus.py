"""A GPU that torch cannot use is told, where `auto` would go to the CPU without a word."""

from pathlib import Path

import pytest
import torch

from voxtrast.engine import gpus
from voxtrast.engine.doctor.devices import check_devices
from voxtrast.engine.doctor.finding import GOOD, NOTE
from voxtrast.engine.downstream.inference import find_device
from voxtrast.engine.ranks import start_processes, stop_processes


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the driver's, in a machine whose torch sees none."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_torch_cannot_use_are_told_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_device("auto") == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: 2 NVIDIA GPU(s) are here, but torch {torch.__version__}, built ")
    assert gpus.REMEDY in line
    (found,) = [each for each in check_devices() if each.name == "GPU"]
    assert (found.state, found.remedy) == (NOTE, gpus.REMEDY)
    assert found.detail.startswith("2 NVIDIA GPU(s)")


@pytest.mark.usefixtures("two_gpus")
def test_pretraining_tells_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert start_processes("auto").device == torch.device("cpu")
    finally:
        stop_processes()
    assert "2 NVIDIA GPU(s) are here" in capsys.readouterr().err


@pytest.mark.usefixtures("two_gpus")
def test_nothing_is_said_of_gpus_that_are_hidden_or_not_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    find_device("auto")
    assert capsys.readouterr().err == ""


def test_nothing_is_said_where_there_is_no_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_device("auto")
    (found,) = [each for each in check_devices() if each.name == "GPU"]
    assert capsys.readouterr().err == ""
    assert (found.state, found.remedy) == (GOOD, "")
