"""Prepare: what is found and paired, and a store that depends on its input alone."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from voxtrast.engine.data.preparation import Preparation
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError

# What is found


def test_every_format_gives_the_same_volume(tmp_path: Path, write: Callable, run: Callable, rejected: Callable) -> None:
    """Which the check for equal volumes then reports: one stays, the first by name."""
    for suffix in ("nii", "nii.gz", "nrrd", "nhdr", "mha", "mhd"):
        folder = tmp_path / "raw" / suffix.replace(".", "_")
        write(folder / f"a.{suffix}", 1, (1.0, 1.5, 2.0), direction=(0, 1, 0, 1, 0, 0, 0, 0, -1), origin=(3, 4, 5))
    summary = run(tmp_path / "raw", tmp_path / "store")
    assert (summary.prepared, summary.duplicates, summary.rejected, summary.exit_code) == (1, 5, 0, 1)
    assert [case.source for case in Store(tmp_path / "store").cases] == ["mha/a.mha"]
    assert all("the same volume as mha/a.mha" in line["reason"] for line in rejected(tmp_path / "store").values())


def test_detached_data_count_as_the_source(tmp_path: Path, write: Callable, run: Callable, values: Callable) -> None:
    write(tmp_path / "raw/a.mhd", 1)
    first = Store(run(tmp_path / "raw", tmp_path / "store") and tmp_path / "store").cases[0]
    (tmp_path / "raw/a.raw").write_bytes(values(2).tobytes())
    assert run(tmp_path / "raw", tmp_path / "store").prepared == 1
    assert Store(tmp_path / "store").cases[0].source_sha256 != first.source_sha256


def test_dicom_series_are_found_split_and_read_in_hounsfield_units(
    tmp_path: Path, write_dicom: Callable, values: Callable, run: Callable
) -> None:
    array = np.concatenate([np.full((6, 22, 24), -1000), values(1)[:14] / 10 - 50]).astype(np.int16)
    write_dicom(tmp_path / "raw/patient/one", array)
    write_dicom(tmp_path / "raw/patient/two", array[::-1], uid="1.2.3.5", modality="MR")
    write_dicom(tmp_path / "raw/patient/two", array[:, ::-1], uid="1.2.3.6")
    settings = {"dtype": "float32", "spacing_mm": 2.0}
    summary = run(tmp_path / "raw", tmp_path / "store", **settings)
    assert (summary.prepared, summary.exit_code) == (3, 0), (tmp_path / "store/rejected.jsonl").read_text(
        encoding="utf-8"
    )
    store = Store(tmp_path / "store")
    assert [(case.id[:12], case.source, case.modality) for case in store.cases if case.id.endswith("one")] == [
        ("patient__one", "patient/one", "ct")
    ]
    assert {(case.source, case.modality) for case in store.cases} == {
        ("patient/one", "ct"),
        ("patient/two#f53eea05", "mr"),
        ("patient/two#2948ed61", "ct"),
    }
    one = next(case for case in store.cases if case.source == "patient/one")
    assert "1.2.3.5" not in "".join(
        file.read_text(encoding="utf-8") for file in (tmp_path / "store").glob("*.json*")
    ), "no UID"
    volume = store.volume(one)
    assert one.shape[0] == 20, "the slices are 2 mm apart"
    np.testing.assert_allclose(volume[:5], -1.0, atol=0.02)  # d = 0 is the lowest position, whatever the file's name
    np.testing.assert_allclose(volume[10:].mean(), array[10:].mean() / 1000, atol=0.003)
    assert run(tmp_path / "raw", tmp_path / "store", **settings).unchanged == 3


def test_a_dicom_folder_may_itself_be_the_raw_folder(
    tmp_path: Path, write_dicom: Callable, values: Callable, run: Callable
) -> None:
    write_dicom(tmp_path / "patient7", values(1).astype(np.int16))
    assert run(tmp_path / "patient7", tmp_path / "store").exit_code == 0
    assert [(case.id, case.source) for case in Store(tmp_path / "store").cases] == [("volume", ".")], (
        "whatever RAW is called"
    )


def test_dicom_objects_without_an_image_are_passed_over(
    tmp_path: Path, write_dicom: Callable, values: Callable, run: Callable
) -> None:
    slices = write_dicom(tmp_path / "raw/a", values(1).astype(np.int16))
    kind, report = b"1.2.840.10008.5.1.4.1.1.2", b"1.2.840.10008.5.1.4.1.1.88.11"
    data = slices[0].read_bytes()[:400]
    at = data.index(kind)
    length = len(report) + 1
    data = data[: at - 2] + length.to_bytes(2, "little") + report + b"\0" + data[at + len(kind) + 1 :]
    (tmp_path / "raw/a/report.dcm").write_bytes(data)
    assert run(tmp_path / "raw", tmp_path / "store").exit_code == 0


def test_volumes_outside_images_get_a_line(
    tmp_path: Path, write: Callable, write_dicom: Callable, values: Callable, run: Callable, rejected: Callable
) -> None:
    raw, label = tmp_path / "raw", np.zeros((20, 22, 24), np.uint8)
    write(raw / "images/a.nii.gz", 1)
    write(raw / "labels/a.nii.gz", label)
    write(raw / "b.nii.gz", 2)
    write(raw / "more/c.nii.gz", 3)
    write(raw / "more/c_label.nii.gz", label)
    write_dicom(raw / "more/series", values(4).astype(np.int16))
    (raw / "index.csv").touch()
    summary = run(raw, tmp_path / "store")
    assert (summary.prepared, summary.rejected, summary.other_files, summary.exit_code) == (1, 4, 1, 1)
    lines = rejected(tmp_path / "store")
    assert set(lines) == {"b.nii.gz", "more/c.nii.gz", "more/c_label.nii.gz", "more/series"}
    assert all(line["reason"] == "lies outside images/" for line in lines.values())
    assert all(line["remedy"].startswith("move it into images/") for line in lines.values())


@pytest.mark.parametrize(("images", "labels"), [("Images", "LABELS"), ("imagesTr", "labelsTr")])
def test_folders_of_pairs_in_any_case_and_as_nnunet_names_them(
    images: str, labels: str, tmp_path: Path, write: Callable, run: Callable
) -> None:
    raw = tmp_path / "raw"
    for number, name in enumerate(("a", "b_0000", "c_0000", "c_0001", "d_0000")):
        write(raw / f"{images}/{name}.nii.gz", number)
    for number, name in enumerate(("a", "b", "c", "d_0000")):
        write(raw / f"{labels}/{name}.nii.gz", np.full((20, 22, 24), number + 1, np.uint8))
    assert run(raw, tmp_path / "store").exit_code == 0
    assert {case.id: case.label_classes for case in Store(tmp_path / "store").cases} == {
        "a": (1,),
        "b_0000": (2,),
        "c_0000": (3,),
        "c_0001": (),
        "d_0000": (4,),
    }


def test_ids_are_safe_unique_and_independent_of_the_other_files_order(
    tmp_path: Path, write: Callable, run: Callable
) -> None:
    names = [
        "a/b.nii.gz",
        "a__b.nii.gz",
        "sp ace & more.nii.gz",
        "x.mha",
        "x.nrrd",
        "ümlaut.nii",
        ".hidden.nii",
        "n" * 240 + ".nii",
    ]
    for number, name in enumerate(names):
        write(tmp_path / "raw" / name, number)
    summary = run(tmp_path / "raw", tmp_path / "store")
    assert (summary.prepared, summary.exit_code, summary.other_files) == (7, 0, 0)
    ids = {case.source: case.id for case in Store(tmp_path / "store").cases}
    assert ids.pop("n" * 240 + ".nii")[:161] == "n" * 160 + "-"
    assert (ids["a/b.nii.gz"], ids["x.mha"]) == ("a__b", "x")
    assert ids["a__b.nii.gz"].startswith("a__b-")
    assert ids["x.nrrd"].startswith("x-")
    assert (ids["sp ace & more.nii.gz"], ids["ümlaut.nii"]) == ("sp_ace___more", "_mlaut")


def test_a_store_inside_raw_and_a_link_to_a_folder_are_no_trouble(
    tmp_path: Path, write: Callable, run: Callable
) -> None:
    write(tmp_path / "elsewhere/a.nii.gz", 1)
    write(tmp_path / "raw/b.nii.gz", 2)
    (tmp_path / "raw/link").symlink_to(tmp_path / "elsewhere")
    assert run(tmp_path / "raw", tmp_path / "raw/store").prepared == 2
    summary = run(tmp_path / "raw", tmp_path / "raw/store")
    assert (summary.unchanged, summary.other_files, summary.exit_code) == (2, 0, 0)


def test_labels_follow_the_image_and_keep_their_values(tmp_path: Path, write: Callable, run: Callable) -> None:
    zyx = np.stack(np.meshgrid(*[np.arange(30)] * 3, indexing="ij")) - 14.5
    ball = (zyx**2).sum(axis=0) < 81
    image = np.random.default_rng(0).normal(100, 3, ball.shape).astype(np.float32) + 200 * ball
    flips = (-1, 0, 0, 0, 0, 1, 0, 1, 0)
    write(tmp_path / "raw/images/a.nii.gz", image, (1.0, 1.2, 0.8), direction=flips)
    write(tmp_path / "raw/labels/a.nii.gz", ball.astype(np.uint16) * 700, (1.0, 1.2, 0.8), direction=flips)
    run(tmp_path / "raw", tmp_path / "store", spacing_mm=0.9)
    store = Store(tmp_path / "store")
    case = store.cases[0]
    volume, label = np.array(store.volume(case), np.float32), store.label(case)
    assert (label.dtype, case.label_dtype, case.label_classes) == (np.uint16, "uint16", (700,))
    assert set(np.unique(label)) == {0, 700}
    np.testing.assert_allclose(case.spacing_mm, 0.9, rtol=1e-6)
    bright = volume > (volume.min() + volume.max()) / 2
    dice = 2 * np.sum(bright & (label > 0)) / (bright.sum() + (label > 0).sum())
    assert dice > 0.97


def test_real_volumes_of_every_kind_are_prepared(real_volumes: Path, tmp_path: Path, run: Callable) -> None:
    for name in ("mr_pyradiomics_breast1", "mr_pyradiomics_breast1_label", "ct_head_vtk_headsq"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / f"raw/{name}.nii.gz").symlink_to(real_volumes.resolve() / f"misc_pretrain/{name}.nii.gz")
    assert run(tmp_path / "raw", tmp_path / "store", spacing_mm=2.0, minimum_size_voxels=12).exit_code == 0
    head, breast = Store(tmp_path / "store").cases
    assert (head.label_sha256, breast.label_classes) == (None, (1,))
    assert breast.shape == (22, 40, 15)  # (45, 120, 21) voxels of 0.66 x 0.66 x 2.1 mm


# Runs again


def test_second_run_does_nothing(tmp_path: Path, write: Callable, run: Callable, contents: Callable) -> None:
    for number in range(3):
        write(tmp_path / f"raw/{number}.nii.gz", number)
    write(tmp_path / "raw/0_label.nii.gz", np.zeros((20, 22, 24), np.uint8))
    run(tmp_path / "raw", tmp_path / "store")
    before = contents(tmp_path / "store")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "store/volumes").iterdir()}
    summary = run(tmp_path / "raw", tmp_path / "store")
    assert (summary.prepared, summary.unchanged, summary.exit_code) == (0, 3, 0)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "store/volumes").iterdir()}
    assert contents(tmp_path / "store") == before
    assert summary.bytes == sum(file.stat().st_size for file in (tmp_path / "store").glob("*/*.npy"))
    assert str(summary).startswith("0 prepared, 3 unchanged, 0 rejected, 0 duplicates; store: 3 MR, 0.1 MB; ")


def test_what_changed_is_redone_and_what_is_gone_is_dropped(
    tmp_path: Path, write: Callable, run: Callable, contents: Callable
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    for number in range(5):
        write(raw / f"{number}.nii.gz", number)
    write(raw / "3_label.nii.gz", np.zeros((20, 22, 24), np.uint8))
    run(raw, store)
    write(raw / "1.nii.gz", 11)  # another content
    (raw / "2.nii.gz").unlink()  # gone
    write(raw / "3_label.nii.gz", np.ones((20, 22, 24), np.uint8))  # only the label
    (store / "volumes/4.npy").unlink()  # damage to the store
    summary = run(raw, store)
    assert (summary.prepared, summary.unchanged, summary.dropped, summary.exit_code) == (3, 1, 1, 0)
    assert not (store / "volumes/2.npy").exists()
    run(raw, tmp_path / "anew", workers=2)
    assert contents(store) == contents(tmp_path / "anew"), "as if prepared from nothing, with another number of workers"


def test_equal_volumes_are_not_converted_again(
    tmp_path: Path, write: Callable, run: Callable, contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    for name in ("a.mha", "b.nii.gz", "c.nrrd"):
        write(raw / name, 1)
    write(raw / "b_label.nii.gz", np.ones((20, 22, 24), np.uint8))
    assert run(raw, store).duplicates == 2
    before = contents(store)
    jobs = []
    original = Preparation._job
    monkeypatch.setattr(Preparation, "_job", lambda self, source: jobs.append(source.id) or original(self, source))
    summary = run(raw, store)
    assert (summary.prepared, summary.unchanged, summary.duplicates, jobs) == (0, 1, 2, [])
    assert contents(store) == before
    (raw / "a.mha").unlink()  # now b is the first
    with pytest.raises(UserError, match="none of the 1 volumes"):
        run(raw, store)
    write(raw / "d.nii.gz", 4)
    write(raw / "a.mha", 5)
    run(raw, store)
    assert sorted(jobs) == ["a", "b", "c", "d"]
    run(raw, tmp_path / "anew")
    assert contents(store) == contents(tmp_path / "anew")
    (raw / "c.nrrd").unlink()
    run(raw, store)
    assert not (store / "duplicates.jsonl").exists()


def test_other_settings_other_raw_and_foreign_folders_are_refused(
    tmp_path: Path, write: Callable, run: Callable
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    write(tmp_path / "other/b.nii.gz", 2)
    run(tmp_path / "raw", tmp_path / "store")
    with pytest.raises(
        UserError, match=r"was prepared with dtype float16 \(now float32\), spacing_mm 1.5 \(now 1.0\): use"
    ):
        run(tmp_path / "raw", tmp_path / "store", dtype="float32", spacing_mm=1.0)
    with pytest.raises(UserError, match=r"none of the 1 volumes in .* comes from"):
        run(tmp_path / "other", tmp_path / "store")
    with pytest.raises(UserError, match=r"is not empty and not a store \(it holds a.nii.gz\)"):
        run(tmp_path / "other", tmp_path / "raw")
    assert Store(tmp_path / "store").cases[0].id == "a"


def test_settings_of_a_store_that_holds_nothing_may_change(tmp_path: Path, write: Callable, run: Callable) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no volume found"):
        run(tmp_path / "empty", tmp_path / "store")
    write(tmp_path / "raw/a.nii.gz", 1)
    assert run(tmp_path / "raw", tmp_path / "store", dtype="float32").prepared == 1


def test_two_prepares_on_one_store_do_not_meet(tmp_path: Path, write: Callable, run: Callable) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    (tmp_path / "store").mkdir()
    with open(tmp_path / "store/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare is at work"):
            run(tmp_path / "raw", tmp_path / "store")
    assert run(tmp_path / "raw", tmp_path / "store").prepared == 1, "a lock file without a holder is no lock"


def test_settings_are_written_for_the_reader(tmp_path: Path, write: Callable, run: Callable) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    run(tmp_path / "raw", tmp_path / "store", spacing_mm=1.5, modality="mr")
    assert json.loads((tmp_path / "store/store.json").read_text(encoding="utf-8")) == {
        "format": 1,
        "spacing_mm": 1.5,
        "modality": "mr",
        "dtype": "float16",
        "minimum_size_voxels": 16,
        "order": 3,
        "ct_window_hu": [-1000.0, 1000.0],
        "mr_percentiles": [0.5, 99.5],
    }
