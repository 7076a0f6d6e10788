"""Bad input, nothing lost: each bad file gets one clear line, the rest is prepared, a rerun continues."""

import ctypes
import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from voxtrast.engine.data.prepare import PrepareSummary
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError

# file -> what its reason must say. Files named good* must be prepared.
EXPECTED = {
    "truncated.nii.gz": r"truncated: the compressed data end early, after \d+ bytes",
    "truncated.nii": r"truncated: the header promises 42592 bytes, the file holds 21296",
    "truncated.nrrd": "data are truncated or damaged",
    "truncated.mha": "data are truncated, damaged or missing",
    "truncated_packed.nrrd": "data are truncated or damaged",
    "truncated_packed.mha": "data are truncated, damaged or missing",
    "damaged.nii.gz": "damaged: the compressed data contradict their checksum",
    "empty.nii.gz": r"the file is empty \(0 bytes\)",
    "empty.mha": r"the file is empty \(0 bytes\)",
    "text.nii.gz": "not a NIfTI file: it starts with b'these are no",
    "text.nrrd": "not an image of a known format",
    "four.nii.gz": "4-D: the image is 24 x 22 x 20 x 3, one volume was expected",
    "four.mha": "4-D: the image is 24 x 22 x 20 x 3, one volume was expected",
    "flat.nii.gz": "the image is 24 x 22",
    "colour.nrrd": "has 3 values for each voxel, one was expected",
    "nan.nii.gz": r"2 of 10560 voxels are not finite numbers \(NaN\)",
    "infinite.nii.gz": r"1 of 10560 voxels are not finite numbers \(infinite\)",
    "nan.mha": r"2 of 10560 voxels are not finite numbers \(NaN\)",
    "infinite.mha": r"1 of 10560 voxels are not finite numbers \(infinite\)",
    "constant.nii.gz": "constant: every voxel is 7",
    "mask.nii.gz": "looks like a label map: 2 different values, all of them whole numbers from 0 up",
    "speck.nii.gz": "nearly constant: 99 % of the voxels above the background are 1.5",
    "zero_spacing.nii.gz": "the voxel spacing in the header is 0 x 1.5 x 1.5",
    "zero_spacing.mha": "the voxel spacing in the header is 0 x 1.5 x 1.5",
    "zero_spacing.nrrd": "the voxel spacing in the header is 0 x 1.5 x 1.5",
    "vector.nii.gz": "5-D: .* one volume was expected",
    "sheared.nii.gz": "not at right angles",
    "wrong_spacing.nii.gz": r"too large: .* voxels \(D, H, W\) at 1.5 mm, its own spacing is 3e\+03",
    "small.nii.gz": r"too small: 20 x 22 x 12 voxels \(D, H, W\) at 1.5 mm, at least 16 were expected",
    "twin.nii.gz": "duplicate: the same bytes as good_1.nii.gz, which is in the store",
    "twin.nrrd": "duplicate: once prepared, the same volume as good_1.nii.gz",
    "no_data.mhd": "its data file no_data.raw is missing",
    "no_data.nhdr": "its data file no_data.raw is missing",
    "dangling.nii.gz": "a symbolic link to a file that does not exist",
    "itself.nii.gz": "cannot be reached: Too many levels of symbolic links",
    "pipe.nii.gz": "not a regular file",
    "sub/back": "a symbolic link that leads back to a folder above it",
    "missing_slice": r"between \S+\.dcm and \S+\.dcm lie 4.00 mm, usual are 2.00 mm \(1 missing\)",
    "two_in_one": r"slices \S+\.dcm and \S+\.dcm lie at the same place",
    "tilted": r"gantry tilt: the slices are shifted against each other by 14.0 degrees",
    "lonely": "the series has a single slice",
    "strays": r"the series may be incomplete: 2 of the folder's files cannot be read \(empty.dcm and 1 more\)",
    "strays/empty.dcm": r"the file is empty \(0 bytes\)",
    "strays/garbage.dcm": "not a DICOM file in spite of its name",
    "last_empty": "the series may be incomplete: 1 of the folder's files cannot be read",
    "last_empty/1_2_3_16_001.dcm": r"the file is empty \(0 bytes\)",
    "last_damaged": "the series may be incomplete: 1 of the folder's files cannot be read",
    "last_damaged/1_2_3_17_001.dcm": "the DICOM file is truncated or damaged",
    "last_short": "the series may be incomplete: 1 of the folder's files cannot be read",
    "last_short/1_2_3_18_001.dcm": "the DICOM file is truncated or damaged",
    "last_cut": "the series may be incomplete: 1 of the folder's files cannot be read",
    "last_cut/1_2_3_19_001.dcm": "the DICOM file is truncated or damaged",
    "pet": "DICOM modality PT, CT or MR was expected",
    "orphan_label.nii.gz": "a label without its image",
    "short_label.nii.gz": r"label measures 20 x 22 x 23 voxels \(D, H, W\), its image 20 x 22 x 24 \(a label; its",
    "moved_label.nii.gz": r"the label's position or spacing differs from its image's by up to 2.0 voxels",
    "soft_label.nii.gz": "the label holds values that are not whole numbers",
    "negative_label.nii.gz": "the label holds values from -1 to 2",
    "broken_label.nii.gz": "truncated",
}


def write_bad_inputs(raw: Path, write: Callable, write_dicom: Callable, values: Callable) -> None:
    for number in (1, 2):
        write(raw / f"good_{number}.nii.gz", number)
    _write_damaged(raw, write, values)
    _write_strange(raw, write, values)
    ct = (values(3) * 2).astype(np.int16)
    for file in write_dicom(raw / "missing_slice", ct, uid="1.2.3.10")[9:10]:
        file.unlink()
    write_dicom(raw / "two_in_one", ct, uid="1.2.3.11", step_mm=0.0)
    write_dicom(raw / "tilted", ct, uid="1.2.3.12", shift_mm=(0.0, 0.5))
    write_dicom(raw / "lonely", ct[:1], uid="1.2.3.13")
    write_dicom(raw / "pet", ct, uid="1.2.3.14", modality="PT")
    _write_damaged_series(raw, ct, write_dicom)
    (raw / "notes.txt").write_text("not an image")
    label = (values(4) > 500).astype(np.uint8)
    write(raw / "orphan_label.nii.gz", label)
    for number, name in enumerate(("short", "moved", "soft", "negative", "broken"), 30):
        write(raw / f"{name}.nii.gz", number)
    write(raw / "short_label.nii.gz", label[:, :, :-1])
    write(raw / "moved_label.nii.gz", label, origin=(0, 0, 3))
    write(raw / "soft_label.nii.gz", label * 0.5)
    write(raw / "negative_label.nii.gz", label.astype(np.int16) * 3 - 1)
    file = write(raw / "broken_label.nii.gz", label)
    file.write_bytes(file.read_bytes()[:-100])


def _write_damaged_series(raw: Path, ct: np.ndarray, write_dicom: Callable) -> None:
    """Nothing shows in the positions of the other slices where the last one is not listed."""
    write_dicom(raw / "strays", ct, uid="1.2.3.15")
    (raw / "strays/garbage.dcm").write_bytes(b"not DICOM " * 100)
    (raw / "strays/empty.dcm").touch()
    write_dicom(raw / "last_empty", ct, uid="1.2.3.16")[-1].write_bytes(b"")
    file = write_dicom(raw / "last_damaged", ct, uid="1.2.3.17")[-1]
    data = file.read_bytes()
    file.write_bytes(data[:140] + b"\xff" * (len(data) - 140))
    file = write_dicom(raw / "last_short", ct, uid="1.2.3.18")[-1]
    file.write_bytes(file.read_bytes()[:300])
    file = write_dicom(raw / "last_cut", ct, uid="1.2.3.19")[-1]
    file.write_bytes(file.read_bytes()[:-200])


def _write_damaged(raw: Path, write: Callable, values: Callable) -> None:
    for suffix in ("nii.gz", "nii", "nrrd", "mha"):
        file = write(raw / f"truncated.{suffix}", 10)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for suffix in ("nrrd", "mha"):
        packed = raw / f"truncated_packed.{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(values(11)), str(packed), useCompression=True)
        packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    file = write(raw / "damaged.nii.gz", 12)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    for suffix in ("nii.gz", "mha"):
        (raw / f"empty.{suffix}").touch()
    for suffix in ("nii.gz", "nrrd"):
        (raw / f"text.{suffix}").write_text("these are not the voxels you are looking for\n" * 20)
    for suffix in ("mhd", "nhdr"):
        (write(raw / f"no_data.{suffix}", 13).with_name("no_data.raw")).unlink()
    (raw / "dangling.nii.gz").symlink_to(raw / "gone.nii.gz")
    (raw / "itself.nii.gz").symlink_to(raw / "itself.nii.gz")
    os.mkfifo(raw / "pipe.nii.gz")
    (raw / "sub").mkdir()
    (raw / "sub/back").symlink_to(raw)


def _write_strange(raw: Path, write: Callable, values: Callable) -> None:
    for suffix in ("nii.gz", "mha"):
        write(raw / f"four.{suffix}", np.stack([values(number) for number in range(14, 17)]))
    write(raw / "flat.nii.gz", values(17)[0])
    colour = sitk.GetImageFromArray(np.stack([values(18)] * 3, axis=-1), isVector=True)
    sitk.WriteImage(colour, str(raw / "colour.nrrd"))
    sitk.WriteImage(colour, str(raw / "vector.nii.gz"))
    for name, seed, bad in (("nan", 19, [np.nan, np.nan]), ("infinite", 20, [np.inf])):
        for suffix in ("nii.gz", "mha"):
            array = values(seed)
            array[0, 0, : len(bad)] = bad
            write(raw / f"{name}.{suffix}", array)
    write(raw / "constant.nii.gz", np.full((20, 22, 24), 7, np.float32))
    write(raw / "mask.nii.gz", (values(21) > 500).astype(np.uint8))
    write(raw / "speck.nii.gz", (values(21) > 500) * np.float32(1.5))
    _patch_header(write(raw / "zero_spacing.nii.gz", 22), 80, struct.pack("<f", 0.0))
    file = write(raw / "zero_spacing.mha", 23)
    file.write_bytes(file.read_bytes().replace(b"ElementSpacing = 1.5", b"ElementSpacing = 0.0"))
    file = write(raw / "zero_spacing.nrrd", 27)
    file.write_bytes(file.read_bytes().replace(b"(1.5,0,0)", b"(0.0,0,0)"))
    file = write(raw / "sheared.nii.gz", 24)  # sform: one row of the matrix leans over; no qform to fall back to
    _patch_header(file, 252, struct.pack("<hh", 0, 1))
    _patch_header(file, 280, struct.pack("<4f", 1.5, 1.0, 0.0, 0.0))
    write(raw / "wrong_spacing.nii.gz", 25, spacing_mm=(3000, 3000, 3000))
    write(raw / "small.nii.gz", values(26)[:, :, :12])
    shutil.copy(raw / "good_1.nii.gz", raw / "twin.nii.gz")
    write(raw / "twin.nrrd", 1)


def _patch_header(file: Path, offset: int, new: bytes) -> None:
    data = bytearray(gzip.decompress(file.read_bytes()))
    data[offset : offset + len(new)] = new
    file.write_bytes(gzip.compress(bytes(data)))


@pytest.fixture(scope="module")
def bad(
    tmp_path_factory: pytest.TempPathFactory, write: Callable, write_dicom: Callable, values: Callable, run: Callable
) -> tuple[Path, PrepareSummary, str]:
    """(folder with raw/ and store/, summary, what was printed) of one prepare over all bad inputs."""
    folder = tmp_path_factory.mktemp("bad")
    write_bad_inputs(folder / "raw", write, write_dicom, values)
    program = (
        "from voxtrast.engine.data.prepare import prepare; import sys\n"
        "summary = prepare(sys.argv[1], sys.argv[2], workers=2, progress=False)\n"
        "import json, dataclasses; print(json.dumps(dataclasses.asdict(summary)))"
    )
    command = [sys.executable, "-c", program, str(folder / "raw"), str(folder / "store")]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    assert result.returncode == 0, result.stderr
    return folder, PrepareSummary(**json.loads(result.stdout)), result.stderr


@pytest.mark.parametrize("file", sorted(EXPECTED))
def test_bad_input_gets_one_clear_line(file: str, bad: tuple, rejected: Callable) -> None:
    line = rejected(bad[0] / "store")[file]
    assert re.search(EXPECTED[file], line["reason"]), line
    text = json.dumps(line)
    assert len(line["reason"]) < 250, "one line, not a report"
    assert str(bad[0]) not in text, "paths are relative to RAW"
    for noise in ("Traceback", "Exception", "itk::", "ITK ERROR", ".cxx", ".hxx", "0x"):
        assert noise not in text


def test_everything_else_is_prepared_and_the_exit_code_says_so(bad: tuple, rejected: Callable) -> None:
    folder, summary, _ = bad
    assert set(rejected(folder / "store")) == set(EXPECTED)
    store = Store(folder / "store")
    assert [case.id for case in store.cases] == ["good_1", "good_2"]
    store.verify(contents=True)
    assert (summary.prepared, summary.duplicates, summary.rejected) == (2, 2, len(EXPECTED) - 2)
    assert summary.exit_code == 1


def test_readers_warnings_do_not_reach_the_terminal(bad: tuple) -> None:
    assert bad[2] == ""


def test_rerun_changes_nothing_and_a_repaired_file_is_taken_in(
    bad: tuple, tmp_path: Path, run: Callable, write: Callable, rejected: Callable, contents: Callable
) -> None:
    folder = shutil.copytree(bad[0] / "store", tmp_path / "store").parent
    raw = bad[0] / "raw"
    before = contents(folder / "store")
    summary = run(raw, folder / "store")
    assert (summary.prepared, summary.unchanged, summary.exit_code) == (0, 2, 1)
    assert contents(folder / "store") == before
    (raw / "empty.nii.gz").unlink()
    write(raw / "empty.nii.gz", 99)
    try:
        summary = run(raw, folder / "store")
    finally:
        (raw / "empty.nii.gz").write_bytes(b"")
    assert (summary.prepared, summary.unchanged) == (1, 2)
    assert set(rejected(folder / "store")) == set(EXPECTED) - {"empty.nii.gz"}


# The target


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(options): a tmpfs of its own; the test is skipped where mounting is not permitted."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        if not folder.is_mount():
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        else:
            command = ["mount", "-o", f"remount,{options}", str(folder)]
        try:
            result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            pytest.skip("there is no mount command: a full or read-only disk cannot be tried")
        if result.returncode:
            pytest.skip(f"a small file system cannot be mounted here ({result.stderr.strip()}): needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_an_error_and_a_rerun_goes_on(
    tmp_path: Path, mounted: Callable, write: Callable, run: Callable, values: Callable, contents: Callable
) -> None:
    raw = tmp_path / "raw"
    for number in range(8):  # 8 x 220 kB
        write(raw / f"{number}.nii.gz", values(number, (48, 48, 48)))
    store = mounted("size=1m") / "store"
    for _ in range(2):
        with pytest.raises(UserError, match=r"No space left on device .* volumes are in the store and stay: free some"):
            run(raw, store, workers=1)
    stored = {file.name: file.stat().st_mtime_ns for file in (store / "volumes").iterdir()}
    assert 2 <= len(stored) <= 4
    assert all(name.endswith(".npy") and not name.startswith(".") for name in stored), "no temporary file is left"
    with pytest.raises(UserError, match="prepare did not finish"):
        Store(store)
    mounted("size=8m")
    summary = run(raw, store)
    assert summary.exit_code == 0
    assert (summary.prepared, summary.unchanged) == (8 - len(stored), len(stored)), "what was prepared is not redone"
    assert stored.items() <= {file.name: file.stat().st_mtime_ns for file in (store / "volumes").iterdir()}.items()
    run(raw, tmp_path / "roomy")
    assert contents(store) == contents(tmp_path / "roomy")


def test_read_only_target_is_an_error(tmp_path: Path, mounted: Callable, write: Callable, run: Callable) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    folder = mounted("size=1m,ro")
    with pytest.raises(UserError, match=r"cannot write to the store .*mounted/store: Read-only file system: make the"):
        run(tmp_path / "raw", folder / "store")


def test_store_that_turned_read_only_is_an_error(
    tmp_path: Path, mounted: Callable, write: Callable, run: Callable
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    folder = mounted("size=1m")
    run(tmp_path / "raw", folder / "store")
    mounted("ro")
    with pytest.raises(UserError, match="Read-only file system"):
        run(tmp_path / "raw", folder / "store")


def test_target_below_a_file_is_an_error(tmp_path: Path, write: Callable, run: Callable) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    (tmp_path / "file").touch()
    for store in (tmp_path / "file", tmp_path / "file/store"):
        for shard in (None, "1/2"):
            with pytest.raises(UserError, match="cannot write to the store"):
                run(tmp_path / "raw", store, shard=shard)


def _obey_permission_bits() -> None:
    """For root, who may read everything: give that up, in a process about to start another program."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_unreadable_file_and_folder_get_a_line_each(tmp_path: Path, write: Callable, rejected: Callable) -> None:
    for number, name in enumerate(("a", "secret", "locked/b")):
        write(tmp_path / f"raw/{name}.nii.gz", number)
    (tmp_path / "raw/secret.nii.gz").chmod(0)
    (tmp_path / "raw/locked").chmod(0)
    program = (
        "import sys; from voxtrast.engine.data.prepare import prepare\n"
        "print(prepare(sys.argv[1], sys.argv[2], workers=1, progress=False).exit_code)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "raw"), str(tmp_path / "store")]
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, preexec_fn=_obey_permission_bits
    )
    (tmp_path / "raw/locked").chmod(0o755)
    assert result.stdout.strip() == "1", result.stderr
    assert {file: line["reason"] for file, line in rejected(tmp_path / "store").items()} == {
        "locked": "the folder cannot be listed: Permission denied",
        "secret.nii.gz": "cannot be read: Permission denied",
    }


def test_nothing_to_prepare_is_an_error(tmp_path: Path, run: Callable) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run(tmp_path / "nowhere", tmp_path / "store")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/notes.txt").touch()
    with pytest.raises(
        UserError, match=r"no volume found below .*raw \(1 other files\): give a folder with files ending"
    ):
        run(tmp_path / "raw", tmp_path / "store")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spacing_mm": 0.0}, "spacing_mm is 0.0, a positive number"),
        ({"spacing_mm": float("nan")}, "spacing_mm is nan"),
        ({"modality": "pet"}, "modality is 'pet', expected one of auto, ct, mr"),
        ({"dtype": "float64"}, "dtype is 'float64', expected float16 or float32"),
        ({"workers": 0}, "workers is 0"),
        ({"minimum_size_voxels": 0}, "minimum_size_voxels is 0"),
        ({"order": 2}, "order is 2, expected 0, 1 or 3"),
        ({"device": "tpu"}, "device is 'tpu', expected one of cpu, cuda"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0, a positive number"),
        ({"memory_limit_gb": -1.0}, "memory_limit_gb is -1.0, a positive number"),
        ({"shard": "0/4"}, "shard is '0/4', expected i/n with i from 1 to n: for example 1/8"),
        ({"shard": "two"}, "shard is 'two', expected i/n"),
    ],
)
def test_wrong_setting_is_named(settings: dict, words: str, tmp_path: Path, run: Callable) -> None:
    with pytest.raises(UserError, match=words):
        run(tmp_path, tmp_path / "store", **settings)
    assert not (tmp_path / "store").exists()
