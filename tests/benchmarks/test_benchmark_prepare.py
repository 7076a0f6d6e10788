"""That the benchmark of prepare compares like with like, and says what it measured."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from voxtrast.benchmarks import prepare
from voxtrast.engine.data.resampling import Grid, resample_image

SPACING = np.array([2.0, 0.9, 1.2])


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(40, 50, 60)), 1.5)
    return (values / values.std()).astype(np.float32)


@pytest.mark.parametrize("order", [1, 3])
def test_nnunet_and_monai_compute_what_ours_does_on_their_grids(order: int, values: np.ndarray) -> None:
    """Away from the sides, where each has its own idea of what lies outside; nnU-Net's grid shares the outer edges with
    the volume, MONAI's the centre of the first voxel."""
    theirs = prepare.by_nnunet(values, SPACING, 1.5, order)
    ratio = np.array(values.shape) / theirs.shape
    ours = resample_image(values, Grid(theirs.shape, tuple(ratio), tuple(ratio / 2 - 0.5)), order=order, low_pass=False)
    inside = (slice(8, -8),) * 3
    assert np.abs(ours - theirs)[inside].max() < 2e-4
    theirs = prepare.by_monai(values, SPACING, 1.5, order)
    ours = resample_image(values, Grid(theirs.shape, tuple(1.5 / SPACING), (0.0,) * 3), order=order, low_pass=False)
    assert np.abs(ours - theirs)[inside].max() < 2e-4


@pytest.mark.slow
def test_every_provider_is_measured_and_the_profile_adds_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.os, "environ", dict(prepare.os.environ))
    words = ["--quick", "--order", "3", "--rounds", "1", "--output", str(tmp_path / "here.jsonl")]
    assert prepare.main(words) == 0
    lines = [json.loads(line) for line in (tmp_path / "here.jsonl").read_text(encoding="utf-8").splitlines()]
    for op in prepare.WORK:
        found = {line["provider"]: line for line in lines if line["op"] == f"prepare: {op}"}
        assert list(found) == list(prepare.PROVIDERS)
        assert all(line["volumes_per_s"] > 0 for line in found.values())
    (parts,) = (line["parts_s"] for line in lines if line["op"] == "prepare: profile")
    assert all(seconds > 0 for part, seconds in parts.items() if part not in ("other", "tell CT from MR"))
    assert "resample, order 3, made up, small (2)" in capsys.readouterr().out


def test_what_is_left_of_a_peer_that_fails_is_not_in_the_others_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []

    def work(provider: str, file: Path, *_: object) -> float:
        if provider == "nnunetv2" and file.name == "0":
            raise ValueError("not this one")
        events.append(("begins", provider))
        time.sleep(0.02)
        events.append(("ends", provider))
        return 0.02

    monkeypatch.setitem(prepare.WORK, "resample", work)
    files = [Path(str(number)) for number in range(6)]
    with ThreadPoolExecutor(2) as pool:
        lines = prepare.measure(pool, "resample", files, 1.5, 3, 1, tmp_path)
    assert [line.get("cannot") for line in lines] == [None, "fails: ValueError: not this one", None]
    assert len(events) == 2 * (2 * 6 + 5 + 2 * 6)
    last = max(at for at, event in enumerate(events) if event == ("ends", "nnunetv2"))
    assert last < events.index(("begins", "monai"))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--data", str(tmp_path)]) == 2
    assert "no .nii.gz file below it: give a folder of volumes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        prepare.main(["--rounds", "0"])
