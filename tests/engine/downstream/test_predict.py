"""Raw images to labels on their own grids: with networks whose answer is known, through files of every kind."""

import csv
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from scipy import ndimage
from torch import Tensor, nn
from typer.testing import CliRunner

from voxtrast.engine.cli import app
from voxtrast.engine.data.resampling import isotropic_grid
from voxtrast.engine.downstream import predict as module
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.downstream.inference import mirror_axes, predict_logits
from voxtrast.engine.downstream.model import SegmentationModel
from voxtrast.engine.downstream.original_grid import most_probable
from voxtrast.engine.downstream.output_folder import OutputFolder
from voxtrast.engine.downstream.predict import PredictSummary, predict
from voxtrast.engine.errors import UserError

PREPARED = {"spacing_mm": 1.0, "modality": "ct", "dtype": "float16", "order": 3}
CLASSES = (0, 3, 700)  # values with a gap, and one that needs 16 bits
HU = (-800.0, 0.0, 800.0)


class Thresholds(nn.Module):
    """Three classes by intensity: below -0.4, between, above 0.4 (in thousands of HU)."""

    def forward(self, image: Tensor) -> Tensor:
        return 100 * torch.cat([-image - 0.4, 0.4 - image.abs(), image - 0.4], dim=1)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    turns = []
    for axis, angle in enumerate((x, y, z)):
        turn = np.eye(3)
        one, other = [each for each in range(3) if each != axis]
        turn[one, one] = turn[other, other] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


# Axes of a sagittal series, one of them flipped; and the same turned out of every plane.
SAGITTAL = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
DIRECTIONS = {
    "flipped": np.diag([-1.0, 1.0, -1.0]),
    "sagittal": SAGITTAL,
    "oblique": rotation(0.2, 0.3, -0.2) @ SAGITTAL,
}


def subject(direction: np.ndarray, spacing: tuple[float, ...] = (0.8, 1.3, 3.0)) -> tuple[sitk.Image, sitk.Image]:
    """An image and its label: a box and a ball off its centre, in no way symmetric."""
    shape = (18, 30, 40)  # z, y, x
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) * np.array(spacing[::-1])
    ball = np.linalg.norm(places - places[6, 12, 25], axis=-1) < 10
    label = np.where(ball, 2, 0)
    label[9:15, 15:27, 4:14] = 1
    image = sitk.GetImageFromArray(np.array(HU, np.float32)[label] + np.arange(40, dtype=np.float32))
    stored = sitk.GetImageFromArray(np.array(CLASSES, np.uint16)[label])
    for each in (image, stored):
        each.SetSpacing(spacing)
        each.SetOrigin((-31.25, 12.5, 1 / 3))
        each.SetDirection(direction.ravel().tolist())
    return image, stored


@pytest.fixture
def thresholds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model file whose network is `Thresholds`."""
    model = SegmentationModel(Thresholds(), CLASSES, (24, 24, 24), dict(PREPARED), flips=True)
    monkeypatch.setattr(module, "load_model", lambda path: model)
    (tmp_path / "model.safetensors").write_bytes(b"thresholds")
    return tmp_path / "model.safetensors"


def run(model: Path, raw: Path, output: Path, **settings: Any) -> PredictSummary:
    return predict(model, raw, output, **{"progress": False, **settings})


def geometry(image: sitk.Image) -> tuple[Any, ...]:
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_labels_come_back_onto_the_file_s_own_grid(
    direction: str, suffix: str, thresholds: Path, tmp_path: Path
) -> None:
    image, label = subject(DIRECTIONS[direction])
    (tmp_path / "raw").mkdir()
    file = tmp_path / "raw" / f"scan{suffix}"
    sitk.WriteImage(image, file)
    assert run(thresholds, tmp_path / "raw", tmp_path / "out").exit_code == 0
    found, original = sitk.ReadImage(tmp_path / "out" / f"scan{suffix}"), sitk.ReadImage(file)
    if (direction, suffix) == ("oblique", ".nii.gz"):  # NIfTI holds quaternions of float32
        assert geometry(found)[:3] == geometry(original)[:3]
        assert found.GetDirection() == pytest.approx(original.GetDirection(), abs=1e-8)
    elif (direction, suffix) == ("oblique", ".nrrd"):  # NRRD holds direction times spacing
        assert found.GetDirection() == pytest.approx(original.GetDirection(), abs=1e-15)
        assert found.GetSpacing() == pytest.approx(original.GetSpacing(), abs=1e-15)
    else:
        assert geometry(found) == geometry(original)
    values, expected = sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(label)
    assert values.dtype == np.uint16
    low, high = (filtered(expected, size=3) for filtered in (ndimage.minimum_filter, ndimage.maximum_filter))
    inside = low == high
    assert {value: (inside & (expected == value)).any() for value in CLASSES} == dict.fromkeys(CLASSES, True)
    assert np.array_equal(values[inside], expected[inside])
    # At the borders too all but a few voxels: what has moved by a voxel would not reach that.
    assert (values == expected).mean() > 0.985


def test_a_volume_of_the_store_s_spacing_comes_back_voxel_for_voxel() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, (7, 8, 9))
    probabilities = np.eye(3, dtype=np.float32)[labels].transpose(3, 0, 1, 2)
    grid = isotropic_grid((7, 8, 9), np.ones(3), 1.0)
    assert np.array_equal(most_probable(probabilities, (7, 8, 9), grid), labels)


def test_a_class_that_is_nowhere_above_the_others_share_is_not_resampled_and_not_missed() -> None:
    probabilities = np.zeros((3, 6, 6, 6), np.float32)
    probabilities[0], probabilities[1], probabilities[2] = 0.3, 0.36, 0.34
    grid = isotropic_grid((11, 11, 11), np.full(3, 0.5), 1.0)
    assert (most_probable(probabilities, (11, 11, 11), grid) == 1).all()


def write(folder: Path, *names: str) -> tuple[sitk.Image, sitk.Image]:
    image, label = subject(DIRECTIONS["flipped"])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        sitk.WriteImage(label if "label" in name else image, folder / name)
    return image, label


def test_bad_files_are_named_and_the_others_are_predicted(
    thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "good.nii.gz", "other/good.mha", "labels_are_no_images_label.nii.gz")
    whole = (raw / "good.nii.gz").read_bytes()
    (raw / "broken.nii.gz").write_bytes(whole[: len(whole) // 2])
    summary = run(thresholds, raw, out, progress=True)
    assert (summary.predicted, summary.exit_code) == (2, 1)
    [line] = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line["file"] == "broken.nii.gz"
    assert "truncated" in line["reason"]
    assert "rejected: broken.nii.gz: truncated" in capsys.readouterr().err
    assert sorted(each.name for each in out.iterdir()) == [
        ".predict.lock",
        "good.nii.gz",
        "other__good.mha",
        "predict.jsonl",
        "rejected.jsonl",
    ]


def test_it_goes_on_where_it_was_and_replaces_nothing_of_another_model(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz", "b.nii.gz")
    assert run(thresholds, raw, out).predicted == 2
    (out / "a.nii.gz").unlink()
    (out / ".a.nii.gz.1.partial.nii.gz").write_text("of a run that was killed")
    before = (out / "b.nii.gz").stat().st_mtime_ns
    summary = run(thresholds, raw, out)
    assert (summary.predicted, summary.kept) == (1, 1)
    assert sorted(each.name for each in out.glob("[!.]*")) == ["a.nii.gz", "b.nii.gz", "predict.jsonl"]
    assert not list(out.glob(".*.partial.*"))
    assert (out / "b.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a\.nii\.gz: was made with another mirror; .* --force"):
        run(thresholds, raw, out, mirror="w")
    assert run(thresholds, raw, out, mirror="w", force=True).predicted == 2
    assert (out / "b.nii.gz").stat().st_mtime_ns != before


def test_labels_of_two_models_never_pass_for_those_of_one(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz", "b.nii.gz")
    run(thresholds, raw, out)
    thresholds.write_bytes(b"another model")
    assert run(thresholds, raw / "a.nii.gz", out, force=True).predicted == 1
    with pytest.raises(UserError, match=r"b\.nii\.gz: was made with another model_sha256"):
        run(thresholds, raw, out)


def test_the_label_of_another_image_of_the_same_name_is_not_kept(thresholds: Path, tmp_path: Path) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    for folder in (one, two):
        write(folder, "ct.nii.gz")
    os.utime(two / "ct.nii.gz", ns=(1, 1))
    assert run(thresholds, one / "ct.nii.gz", out).predicted == 1
    assert run(thresholds, one / "ct.nii.gz", out).kept == 1
    with pytest.raises(UserError, match=r"ct\.nii\.gz: was made with another image"):
        run(thresholds, two / "ct.nii.gz", out)


def test_scores_of_before_stay_where_no_labels_are_given(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz", "a_label.nii.gz")
    assert run(thresholds, raw, out, labels=raw).scored == 1  # images and labels side by side
    scores = (out / "scores.csv").read_text(encoding="utf-8")
    run(thresholds, raw, out)
    assert (out / "scores.csv").read_text(encoding="utf-8") == scores


def test_scores_of_replaced_labels_go_with_them(thresholds: Path, tmp_path: Path) -> None:
    raw, out, labels = tmp_path / "raw", tmp_path / "out", tmp_path / "labels"
    write(raw, "a.nii.gz")
    write(labels, "a_label.nii.gz")
    assert run(thresholds, raw, out, labels=labels).scored == 1
    run(thresholds, raw, out, force=True)
    assert not (out / "scores.csv").exists()
    run(thresholds, raw, out, labels=labels)
    assert len((out / "scores.csv").read_text(encoding="utf-8").splitlines()) == 3
    (labels / "a_label.nii.gz").write_text("damaged")
    assert run(thresholds, raw, out, labels=labels).scored == 0
    assert len((out / "scores.csv").read_text(encoding="utf-8").splitlines()) == 1


def test_a_name_in_brackets_is_no_markup(thresholds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "raw", "a.nii.gz")
    (tmp_path / "raw" / "scan[t1].nii.gz").write_text("damaged")
    run(thresholds, tmp_path / "raw", tmp_path / "out", progress=True)
    assert "rejected: scan[t1].nii.gz: " in capsys.readouterr().err


def test_an_image_whose_classes_do_not_fit_into_memory_costs_itself_alone(
    thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz", "b.nii.gz")
    free = iter([10, 10**12])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=next(free)))
    summary = run(thresholds, raw, out)
    assert (summary.predicted, len(summary.rejected)) == (1, 1)
    assert "GB of memory" in summary.rejected[0].reason


def test_a_label_that_cannot_be_read_costs_its_score_alone(thresholds: Path, tmp_path: Path) -> None:
    raw, labels, out = tmp_path / "raw", tmp_path / "labels", tmp_path / "out"
    write(raw, "a.nii.gz", "b.nii.gz")
    write(labels, "b_label.nii.gz")
    (labels / "a.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    summary = run(thresholds, raw, out, labels=labels)
    assert (summary.scored, summary.exit_code) == (1, 1)
    assert "does not exist" in summary.rejected[0].reason


def test_two_runs_in_one_folder_are_refused_and_remove_nothing(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz")
    run(thresholds, raw, out)
    other = OutputFolder(out, {}, {}, {}, force=False)
    with other.locked(), pytest.raises(UserError, match="another `voxtrast predict`"):
        run(thresholds, raw, out, force=True)
    assert (out / "a.nii.gz").exists()


def test_a_network_that_saw_no_mirrored_image_is_not_shown_any(
    thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SegmentationModel(Thresholds(), CLASSES, (24, 24, 24), dict(PREPARED), flips=False)
    monkeypatch.setattr(module, "load_model", lambda path: model)
    write(tmp_path / "raw", "a.nii.gz")
    with pytest.raises(UserError, match=r"--mirror: the network was trained without --flips"):
        run(thresholds, tmp_path / "raw", tmp_path / "out", mirror="w")


def test_files_of_unknown_origin_are_kept_unless_forced(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz")
    out.mkdir()
    for name in ("a.nii.gz", "scores.csv"):
        (out / name).write_text("of somebody")
        with pytest.raises(UserError, match=rf"{name} exists and is not known .* --force"):
            run(thresholds, raw, out)
        assert (out / name).read_text(encoding="utf-8") == "of somebody"
        (out / name).unlink()
    with pytest.raises(UserError, match=r"raw: is the folder of the images"):
        run(thresholds, raw, raw, force=True)
    with pytest.raises(UserError, match=r"a.nii.gz: is one of the images"):
        run(thresholds, raw / "a.nii.gz", raw, force=True)


def test_scores_are_those_of_the_original_geometry(thresholds: Path, tmp_path: Path) -> None:
    raw, out, labels = tmp_path / "raw", tmp_path / "out", tmp_path / "labels"
    _, label = write(raw, "a_0000.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz")
    labels.mkdir()
    sitk.WriteImage(label, labels / "a.nii.gz")  # as nnU-Net names them
    moved = sitk.Image(label)
    moved.SetOrigin((0.0, 0.0, 0.0))
    sitk.WriteImage(moved, labels / "b.nii.gz")
    values = sitk.GetArrayFromImage(label)
    values[0, 0, 0] = 9
    strange = sitk.GetImageFromArray(values)
    strange.CopyInformation(label)
    sitk.WriteImage(strange, labels / "c.nii.gz")
    summary = run(thresholds, raw, out, labels=labels)
    assert (summary.predicted, summary.scored, summary.exit_code) == (4, 1, 1)
    reasons = {each.file: each.reason for each in summary.rejected}
    assert "position or spacing differs" in reasons[str(labels / "b.nii.gz")]
    assert reasons[str(labels / "c.nii.gz")] == "the label holds the values [9], the model knows [0, 3, 700]"
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [(row["case"], row["class"], row["found"]) for row in rows] == [
        ("a_0000", "3", "both"),
        ("a_0000", "700", "both"),
    ]
    assert all(float(row["dice"]) > 0.9 for row in rows)
    # The thickest voxel is the most that a border can be off. (Around the ball these thresholds see the middle class.)
    assert 0 <= float(rows[1]["surface_distance_mm"]) <= float(rows[1]["hd95_mm"]) <= 3
    assert summary.scores["hd95"]["mean"] is not None
    assert "on 1 labelled cases" in str(summary)


def test_mirroring_averages_over_all_combinations_and_undoes_each() -> None:
    class Slope(nn.Module):
        """Sees where it is: what only mirroring can even out."""

        def forward(self, image: Tensor) -> Tensor:
            steps = torch.arange(image.shape[-1], dtype=image.dtype).expand_as(image)
            return torch.cat([image, image * 0 + steps], dim=1)

    image = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = predict_logits(Slope(), image, (8, 8, 8), 0.0, torch.device("cpu"), mirror=(0, 2))
    torch.testing.assert_close(logits[0], image[0])
    torch.testing.assert_close(logits[1], torch.full((8, 8, 8), 3.5))
    assert mirror_axes("w, d") == (0, 2)
    assert mirror_axes("") == ()


def test_a_network_that_was_fine_tuned_predicts_a_dicom_series_and_a_single_file(
    weights: Path, make_store: Callable[..., Any], tmp_path: Path
) -> None:
    store = make_store([(1,)] * 3, size=16)
    settings = {"format": 1, **PREPARED, "modality": "auto"}
    (store.path / "store.json").write_text(json.dumps(settings))
    line = finetune(weights, store.path, labels=1, seed=0, steps=1, batch=1, test_cases=1, progress=False)
    image, _ = subject(DIRECTIONS["flipped"])
    raw = tmp_path / "raw"
    write_series(raw / "patient", image)
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(line["model"], folder)
    summary = run(folder, raw, tmp_path / "out")
    assert (summary.predicted, summary.exit_code) == (1, 0)
    found = sitk.ReadImage(tmp_path / "out" / "patient.nii.gz")
    assert found.GetSize() == image.GetSize()
    assert set(np.unique(sitk.GetArrayFromImage(found))) <= {0, 1}
    sitk.WriteImage(image, tmp_path / "one.nii.gz")
    run(folder, tmp_path / "one.nii.gz", tmp_path / "single")
    assert (tmp_path / "single" / "one.nii.gz").exists()


def write_series(folder: Path, image: sitk.Image) -> None:
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    whole = sitk.Cast(image, sitk.sitkInt16)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    for number in range(whole.GetDepth()):
        cut = whole[:, :, number]
        tags = {
            "0008|0060": "MR",
            "0020|000e": "1.2.3.4",
            "0020|000d": "1.2.3",
            "0008|0018": f"1.2.3.4.{number + 1}",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{each:.6f}" for each in whole.TransformIndexToPhysicalPoint((0, 0, number))),
            "0020|0037": "\\".join(f"{each:g}" for each in (*direction[:, 0], *direction[:, 1])),
            "0018|0050": str(image.GetSpacing()[2]),
        }
        for key, value in tags.items():
            cut.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(cut)


def test_what_cannot_be_predicted_is_one_clear_line(
    weights: Path, thresholds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    for wrong, settings, message in (
        (raw, {"mirror": "q"}, "--mirror q"),
        (raw, {"device": "abacus"}, "device 'abacus': not usable here"),
        (tmp_path / "missing", {}, "no such image or folder"),
        (tmp_path / "empty", {}, "no volume found below"),
        (tmp_path / "notes.txt", {}, "notes.txt: not an image; expected a file ending in .nii.gz"),
        (raw, {"labels": tmp_path / "nowhere"}, "--labels .*nowhere: no such folder"),
        (raw, {"labels": tmp_path / "empty"}, "none of its 0 labels has the name of one of the 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            run(thresholds, wrong, out, **settings)
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="holds pretrained weights and no segmentation layers; give a model that"):
        run(weights, raw, out)
    with pytest.raises(UserError, match=r"empty: holds 0 .safetensors files \(none\)"):
        run(tmp_path / "empty", raw, out)


def test_the_command_line_says_what_was_done_and_ends_with_one_for_a_bad_file(thresholds: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write(raw, "a.nii.gz")
    said = CliRunner().invoke(app, ["predict", str(thresholds), str(raw), str(out), "--mirror", "d,w", "--no-surface"])
    assert (said.exit_code, said.stdout) == (0, "1 predicted, 0 kept from before, 0 rejected\n")
    assert json.loads((out / "predict.jsonl").read_text(encoding="utf-8"))["mirror"] == "d,w"
    (raw / "b.nii.gz").write_text("no image")
    said = CliRunner().invoke(app, ["predict", str(thresholds), str(raw), str(out), "--mirror", "d,w"])
    assert (said.exit_code, said.stdout) == (1, "0 predicted, 1 kept from before, 1 rejected\n")
