"""What an export says of itself."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from voxtrast.engine import versions
from voxtrast.engine.config import load_config
from voxtrast.engine.data.store import INDEX, Store, file_sha256
from voxtrast.engine.export import FORMS, export
from voxtrast.engine.runs import build_method, describe
from voxtrast.engine.weights import save_weights

NAMES = {"nnunet": "w.pth", "monai": "w.pt", "safetensors": "w.safetensors", "encoder": "e.safetensors"}


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "run"
    config = load_config("pcl-tiny", [f"data={tiny_store}", f"output={folder}"])
    config.data_sha256 = file_sha256(tiny_store / INDEX)
    method = build_method(config)
    about = describe(config, Store(tiny_store).cases) | {"step": 3, "untrained": method.untrained(), "commit": "abc"}
    save_weights(folder / "weights.safetensors", method.transferable(), about)
    return folder


@pytest.mark.parametrize("to", FORMS)
def test_the_card_says_where_the_weights_come_from_and_names_no_path(
    to: str, run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out" / NAMES[to]
    export(run, to, file)
    text = file.with_name(f"{file.name}.json").read_text(encoding="utf-8")
    card = json.loads(text)
    said = card["pretraining"]
    assert (said["method"], said["recipe"], said["step"], said["commit"]) == ("pcl", "pcl-tiny", 3, "abc")
    assert said["data"] == {
        "volumes": 6,
        "voxels": 6 * 40**3,
        "modalities": {"mr": 6},
        "index_sha256": file_sha256(tiny_store / INDEX),
        "validation_fraction": 0.2,
    }
    assert said["versions"]["torch"] == torch.__version__
    assert card["sha256"] == file_sha256(file)
    assert card["file"] == file.name
    assert not [path for path in (tiny_store, run, tmp_path) if str(path) in text]
    assert '"features_per_stage": [' in text
    longest = max(len(line) for line in text.splitlines())
    assert longest < 200  # read by people: lists of numbers stand in one line


def test_a_bundle_names_no_path_of_this_machine(run: Path, tmp_path: Path) -> None:
    done = export(run, "monai", tmp_path / "bundle")
    for file in done.files:
        if file.suffix != ".pt":
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file
    readme = (tmp_path / "bundle" / "docs" / "README.md").read_text(encoding="utf-8")
    assert "It needs the packages\nmonai and dynamic-network-architectures." in readme
    assert json.loads((tmp_path / "bundle" / "docs" / "card.json").read_text(encoding="utf-8"))["file"] == "model.pt"


def test_the_description_is_of_the_cases_that_are_trained_on(run: Path, tiny_store: Path) -> None:
    config = load_config("pcl-tiny", [f"data={tiny_store}"])
    first, second, *_ = Store(tiny_store).cases
    data = describe(config, [first, replace(second, modality="ct", shape=(40, 40, 20))])["data"]
    assert data["modalities"] == {"ct": 1, "mr": 1}
    assert data["voxels"] == 40**3 + 40 * 40 * 20


def test_the_commit_is_that_of_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VOXTRAST_COMMIT", raising=False)
    engine = tmp_path / "clone" / "engine"
    engine.mkdir(parents=True)
    monkeypatch.setattr(versions, "__file__", str(engine / "versions.py"))
    assert versions.commit() is None  # installed, or copied without its history
    git = ["git", "-C", str(engine.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    found = versions.commit()
    wanted = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    assert found
    assert wanted.startswith(found)
    monkeypatch.setenv("VOXTRAST_COMMIT", "named")
    assert versions.commit() == "named"
