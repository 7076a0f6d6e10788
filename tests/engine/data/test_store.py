"""What a store promises its readers: the right array, read-only, and no word of trust where a file changed."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from voxtrast.engine.data import store as store_module
from voxtrast.engine.data.prepare import check
from voxtrast.engine.data.store import Case, Store
from voxtrast.engine.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, write: Callable, run: Callable, values: Callable) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(3):
        write(folder / f"raw/images/case{number}.nii.gz", number)
    write(folder / "raw/labels/case1.nii.gz", (values(1) > 500).astype(np.uint8) * 3)
    run(folder / "raw", folder / "store")
    return folder / "store"


def test_the_page_about_prepare_explains_every_field_of_the_index() -> None:
    page = (Path(__file__).parents[3] / "docs/prepare.md").read_text(encoding="utf-8")
    table = page.partition("| field of a line of index.jsonl |")[2].partition("\n\n")[0]
    explained = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.lstrip("| ").split(" | ")[0])
    }
    assert explained == {field.name for field in fields(Case)}


@pytest.fixture
def store(prepared: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copytree(prepared, tmp_path / "store"))


def test_cases_are_sorted_and_arrays_are_read_only_memory_maps(store: Path) -> None:
    opened = Store(store)
    assert [case.id for case in opened.cases] == ["case0", "case1", "case2"]
    volume = opened.volume(opened.cases[0])
    assert isinstance(volume, np.memmap)
    assert volume.shape == opened.cases[0].shape == (20, 22, 24)
    assert volume.dtype == np.float16
    with pytest.raises(ValueError, match="read-only"):
        volume[0, 0, 0] = 1
    assert opened.settings["spacing_mm"] == 1.5


def test_a_file_is_opened_once_so_that_it_may_vanish_after_its_check(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store(store)
    case, read_header = opened.cases[0], store_module._read_header
    expected = np.array(opened.volume(case))

    def header_then_unlink(stream: BinaryIO, *expected: Any) -> Any:
        header = read_header(stream, *expected)
        (store / "volumes" / f"{case.id}.npy").unlink()
        return header

    monkeypatch.setattr(store_module, "_read_header", header_then_unlink)
    np.testing.assert_array_equal(opened.volume(case), expected)


def test_a_header_that_another_program_wrote_is_read_by_many_threads_at_once(store: Path) -> None:
    opened = Store(store)
    file = store / "volumes" / f"{opened.cases[0].id}.npy"
    expected = np.array(opened.volume(opened.cases[0]))
    header = file.read_bytes()[:128].replace(b"'descr': '<f2', ", b"").replace(b"{", b"{'descr':'<f2',")
    file.write_bytes(header[:127].ljust(127) + b"\n" + expected.tobytes())
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: np.array(opened.volume(opened.cases[0])), range(200)))
    assert all(np.array_equal(each, expected) for each in found)


def test_a_line_of_the_index_survives_the_round_trip(store: Path) -> None:
    for case, line in zip(
        Store(store).cases, (store / "index.jsonl").read_text(encoding="utf-8").splitlines(), strict=True
    ):
        assert Case.from_line(line) == case
        assert case.as_line() == line


def test_index_describes_the_stored_volume(store: Path) -> None:
    opened = Store(store)
    for case in opened.cases:
        stored = np.array(opened.volume(case), np.float32)
        assert case.intensity["background"] == stored.min()
        assert case.intensity["low"] == pytest.approx(np.percentile(stored, 0.5))
        assert case.intensity["high"] == pytest.approx(np.percentile(stored, 99.5))
        assert case.intensity["mean"] == pytest.approx(stored.mean(), abs=1e-5)
        assert case.intensity["std"] == pytest.approx(stored.std(), rel=1e-5)


def test_label_lies_on_the_volumes_grid_and_its_absence_is_said(store: Path) -> None:
    opened = Store(store)
    label = opened.label(opened.cases[1])
    assert label.dtype == np.uint8
    assert label.shape == opened.cases[1].shape
    assert opened.cases[1].label_classes == (3,)
    with pytest.raises(UserError, match=r"case0 .* has no label"):
        opened.label(opened.cases[0])


def test_untouched_store_verifies(store: Path) -> None:
    Store(store).verify(contents=False)
    Store(store).verify(contents=True)


@pytest.mark.parametrize("folder", ["volumes", "labels"])
def test_changed_byte_is_found_by_contents_and_named(store: Path, folder: str) -> None:
    file = store / folder / "case1.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    Store(store).verify(contents=False)
    with pytest.raises(UserError, match=rf"{folder}/case1\.npy changed since the index was written .* prepare"):
        Store(store).verify(contents=True)


def test_missing_short_and_long_files_are_found_by_size(store: Path) -> None:
    file = store / "volumes/case2.npy"
    data = file.read_bytes()
    for content, words in ((data[:-1], "bytes, its header asks"), (data + b"x", "bytes, its header"), (b"", "be read")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"case2\.npy .*{words}"):
            Store(store).verify(contents=False)
        with pytest.raises(UserError, match=r"case2\.npy"):
            Store(store).volume(Store(store).cases[2])
    file.unlink()
    with pytest.raises(UserError, match=r"case2\.npy is missing"):
        Store(store).verify(contents=False)


def test_array_of_other_shape_or_type_is_refused(store: Path) -> None:
    np.save(store / "volumes/case0.npy", np.zeros((20, 22, 25), np.float16))
    with pytest.raises(UserError, match=r"holds float16 \(20, 22, 25\), the index says float16 \(20, 22, 24\)"):
        Store(store).verify(contents=False)


def test_what_is_no_store_or_not_finished_is_said(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a store"):
        Store(tmp_path / "nowhere")
    (store / "index.jsonl").unlink()
    with pytest.raises(UserError, match="prepare did not finish"):
        Store(store)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": "x", "colour": "red"}', '{"foreground": [[1, 2]]}'])
def test_broken_line_of_the_index_is_named(store: Path, line: str) -> None:
    with open(store / "index.jsonl", "a", encoding="utf-8") as index:
        index.write(line + "\n")
    with pytest.raises(UserError, match=r"index\.jsonl, line 4, cannot be read"):
        Store(store)


def test_store_of_a_later_format_is_refused(store: Path) -> None:
    settings = json.loads((store / "store.json").read_text(encoding="utf-8"))
    (store / "store.json").write_text(json.dumps({**settings, "format": 2}))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        Store(store)


def test_check_names_every_file_that_is_not_as_the_index_says(tmp_path: Path, write: Callable, run: Callable) -> None:
    for number in range(5):
        write(tmp_path / f"raw/{number}.nii.gz", number)
    write(tmp_path / "raw/4_label.nii.gz", np.ones((20, 22, 24), np.uint8))
    run(tmp_path / "raw", tmp_path / "store")
    assert check(tmp_path / "store", progress=False) == []
    volumes = tmp_path / "store/volumes"
    (volumes / "0.npy").unlink()
    with open(volumes / "1.npy", "r+b") as stream:  # one bit
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    with open(volumes / "2.npy", "r+b") as stream:
        stream.truncate(1000)
    np.save(tmp_path / "store/labels/4.npy", np.ones((3, 3, 3), np.uint8))
    problems = check(tmp_path / "store", progress=False)
    expected = [r"0.npy is missing", r"1.npy changed since .* \(sha256 \w{12}, index \w{12}\)", r"2.npy has 1000 bytes"]
    for line, words in zip(problems, [*expected, r"labels/4.npy holds uint8 \(3, 3, 3\)"], strict=True):
        assert re.search(words, line)
        assert "run the same `voxtrast prepare` again" in line
    for name in ("volumes/1.npy", "volumes/2.npy", "labels/4.npy"):
        (tmp_path / "store" / name).unlink()
    run(tmp_path / "raw", tmp_path / "store")
    assert check(tmp_path / "store", progress=False) == [], "the remedy helps"
