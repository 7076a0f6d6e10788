"""What the doctor finds, says and advises; its training on two ranks."""

import copy
import json
import subprocess
from pathlib import Path

import pytest
import torch

from voxtrast.engine.checkpoint import State
from voxtrast.engine.config import load_config
from voxtrast.engine.data.store import Store
from voxtrast.engine.doctor import Finding, examine, print_report, two_ranks
from voxtrast.engine.doctor import operators as doctor_operators
from voxtrast.engine.doctor import versions as doctor_versions
from voxtrast.engine.doctor.finding import BROKEN, GOOD, NOTE
from voxtrast.engine.doctor.operators import OPERATORS
from voxtrast.engine.doctor.two_ranks import RECIPE, SETTINGS, check_two_ranks, compare, write_made_up_store
from voxtrast.engine.runs import build_method
from voxtrast.kernels import _native


def test_a_quick_look_finds_every_operator_and_every_needed_package(tmp_path: Path) -> None:
    write_made_up_store(tmp_path / "store")
    found = {(each.area, each.name): each for each in examine(store=tmp_path / "store", quick=True)}
    assert not [each for each in found.values() if each.state == BROKEN]
    assert {f"{name} (cpu)" for name in OPERATORS} <= {name for area, name in found if area == "operators"}
    assert {"python", "torch", "deepspeed", "nvidia-dali-cuda130"} <= {
        name for area, name in found if area == "versions"
    }
    assert found[("store", "index")].detail.endswith("4 volumes")
    assert "MB/s" in found[("store", "reading")].detail
    assert all(each.remedy for each in found.values() if each.state != GOOD and each.name != "GPU")


def test_a_version_out_of_its_range_and_a_missing_package_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"deepspeed": "0.16.1", "nvidia-dali-cuda130": None, "cupy-cuda13x": None, "torch": None}
    real = doctor_versions._installed
    monkeypatch.setattr(doctor_versions, "_installed", lambda name: versions[name] if name in versions else real(name))
    found = {each.name: each for each in doctor_versions.check_versions()}
    assert found["deepspeed"].state == BROKEN
    assert found["deepspeed"].detail == "0.16.1 is not within <0.20,>=0.19"
    assert found["nvidia-dali-cuda130"].state == BROKEN
    assert found["nvidia-dali-cuda130"].remedy == "pip install 'voxtrast[dali]'"
    assert found["cupy-cuda13x"].state == NOTE
    assert found["torch"].detail.startswith("not installed; voxtrast needs torch")
    versions["cupy-cuda12x"] = "14.1"
    found = {each.name: each for each in doctor_versions.check_versions()}
    assert found["cupy-cuda12x"].state == GOOD  # the extra of another CUDA
    assert "cupy-cuda13x" not in found


def test_an_operator_without_its_library_runs_as_reference_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "is_compiled", lambda name, device: name != "warp")
    found = {each.name: each for each in doctor_operators.check_operators()}
    assert found["warp (cpu)"].state == NOTE
    assert found["warp (cpu)"].detail.startswith("torch reference")
    assert found["info_nce (cpu)"].state == GOOD
    name = {"avx512": "AVX-512", "avx2": "AVX2"}.get(_native.cpu_target(), "portable")
    assert found["info_nce (cpu)"].detail.startswith(f"compiled, {name}: ")


def test_a_store_with_a_missing_volume_and_a_folder_that_is_none_are_broken(tmp_path: Path) -> None:
    write_made_up_store(tmp_path / "store")
    (tmp_path / "store" / "volumes" / f"{Store(tmp_path / 'store').cases[0].id}.npy").unlink()
    for path in (tmp_path / "store", tmp_path):
        broken = [each for each in examine(store=path, quick=True) if each.state == BROKEN]
        assert len(broken) == 1
        assert broken[0].area == "store"
        assert broken[0].remedy


def test_the_hosts_of_a_bad_hostfile_are_one_broken_finding(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=two\n")
    broken = [each for each in examine(hostfile=tmp_path / "hosts", quick=True) if each.state == BROKEN]
    assert len(broken) == 1
    assert "line 1" in broken[0].detail


def test_lines_json_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("devices", "GPU", GOOD, "none"), Finding("store", "index", BROKEN, "damaged", "prepare again")]
    assert print_report(findings) == 1
    assert capsys.readouterr().out.splitlines() == [
        "good    devices  GPU: none",
        "broken  store  index: damaged -> prepare again",
        "2 findings, 1 broken, 0 notes",
    ]
    assert print_report(findings[:1], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["findings"][0]["name"] == "GPU"


def test_a_rank_that_is_left_out_of_the_mean_is_found() -> None:
    words = [RECIPE, "data=store", "output=run", *SETTINGS]
    start = build_method(load_config(words[0], words[1:])).state_dict()
    right, wrong = copy.deepcopy(start), copy.deepcopy(start)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in start.items():
        if tensor.is_floating_point():
            gradients = torch.randn(2, *tensor.shape, generator=generator)
            right[name] = tensor - 0.001 * gradients.mean(0)
            wrong[name] = tensor - 0.001 * gradients[0]
    runs = [([1.0, 0.9], State(2, model, {}, {})) for model in (right, wrong)]
    assert compare(runs[0], runs[0], words).state == GOOD
    assert compare(runs[0], runs[1], words).state == BROKEN
    assert compare(runs[0], ([1.0, 0.91], runs[0][1]), words).state == BROKEN


def test_a_training_without_an_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(ranks: int, words: list[str], device: str) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(words, 300)

    monkeypatch.setattr(two_ranks, "_train", endless)
    [finding] = check_two_ranks()
    assert finding.state == BROKEN
    assert "no end within 300 s" in finding.detail


@pytest.mark.slow
def test_two_ranks_train_as_one_does() -> None:
    [finding] = check_two_ranks()
    print(finding.detail)
    assert finding.state == GOOD, finding.detail
