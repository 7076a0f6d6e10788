"""Slices of a job array: whatever the number of shards, the merge leaves the bytes of a run without them."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from voxtrast.engine.data import sharding
from voxtrast.engine.data.preparation import Preparation
from voxtrast.engine.data.prepare import PrepareSummary, check, merge, prepare
from voxtrast.engine.data.sharding import Shard
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError


def run_shards(raw: Path, store: Path, count: int, *, numbers: tuple[int, ...] = (), **settings: object) -> None:
    for number in numbers or range(count, 0, -1):  # in any order
        prepare(raw, store, workers=1, progress=False, shard=f"{number}/{count}", **settings)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, write: Callable, write_dicom: Callable, values: Callable) -> Path:
    """Labels, a series, bad files, and of one volume: twice the same bytes, and twice another format."""
    raw = tmp_path_factory.mktemp("shards") / "raw"
    for number in range(6):
        write(raw / f"{number}.nii.gz", number)
    write(raw / "3_label.nii.gz", np.ones((20, 22, 24), np.uint8))
    for name in ("a", "m", "z"):
        shutil.copy(raw / "0.nii.gz", raw / f"{name}_twin.nii.gz")
        write(raw / f"{name}.mha", 1)
    write_dicom(raw / "series", values(7).astype(np.int16))
    write_dicom(raw / "lonely", values(8)[:1].astype(np.int16), uid="1.2.9")
    (raw / "empty.nii.gz").touch()
    for name in ("bad", "bad_twin"):  # the same bytes, and both are refused
        write(raw / f"{name}.nii.gz", np.full((20, 22, 24), 7, np.float32))
    write(raw / "soft.nii.gz", 9)
    write(raw / "soft_label.nii.gz", np.full((20, 22, 24), 0.5, np.float32))
    write(raw / "orphan_label.nii.gz", np.ones((20, 22, 24), np.uint8))
    return raw


@pytest.fixture(scope="module")
def whole(raw: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable) -> tuple[Path, PrepareSummary]:
    """The store of a run without shards, and its summary."""
    store = tmp_path_factory.mktemp("whole") / "store"
    return store, run(raw, store)


@pytest.fixture(scope="module")
def two_shards(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("parted") / "store"
    run_shards(raw, store, 2)
    return store


@pytest.fixture
def parted(two_shards: Path, tmp_path: Path) -> Path:
    """A store of two shards that have ended, to be merged or spoilt."""
    return shutil.copytree(two_shards, tmp_path / "store")


def test_merged_shards_are_the_bytes_of_one_run(
    whole: tuple[Path, PrepareSummary], parted: Path, contents: Callable
) -> None:
    merged = merge(parted, progress=False)
    assert contents(parted) == contents(whole[0])
    assert not (parted / "shards").exists()
    assert merged.duplicates == 6
    for name in ("prepared", "rejected", "duplicates", "other_files", "bytes", "modalities"):
        assert getattr(merged, name) == getattr(whole[1], name), name


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_number_of_shards_does_not_matter(
    count: int, raw: Path, whole: tuple[Path, PrepareSummary], tmp_path: Path, contents: Callable
) -> None:
    run_shards(raw, tmp_path / "store", count)
    merge(tmp_path / "store", progress=False)
    assert contents(tmp_path / "store") == contents(whole[0])


def test_each_source_belongs_to_one_shard() -> None:
    names = [f"patient{number}/scan.nii.gz" for number in range(1000)]
    for count in (1, 2, 7):
        owners = [[shard for shard in range(1, count + 1) if Shard(shard, count).has(name)] for name in names]
        assert all(len(each) == 1 for each in owners)
        sizes = np.bincount([each[0] for each in owners])[1:]
        assert sizes.min() > 0.7 * len(names) / count


@pytest.mark.slow
def test_a_store_is_brought_up_to_date_in_shards(
    raw: Path, tmp_path: Path, write: Callable, run: Callable, contents: Callable
) -> None:
    own = shutil.copytree(raw, tmp_path / "raw")
    run(own, tmp_path / "store")
    write(own / "1.nii.gz", 21)  # changed: and the three .mha are no longer its twins
    (own / "2.nii.gz").unlink()
    write(own / "new.nii.gz", 22)
    run_shards(own, tmp_path / "store", 2)
    assert Store(tmp_path / "store").verify(contents=True) is None, "until the merge the old store can be read"
    indices = [
        part.read_text(encoding="utf-8").splitlines() for part in (tmp_path / "store/shards").glob("*/index.jsonl")
    ]
    done = {json.loads(line)["id"] for lines in indices for line in lines}
    assert {"1", "new"} <= done
    assert not done & {"3", "4", "5", "series"}, "what is there is not done again"
    summary = merge(tmp_path / "store", progress=False)
    assert (summary.prepared, summary.dropped) == (3, 1)
    run(own, tmp_path / "anew")
    assert contents(tmp_path / "store") == contents(tmp_path / "anew")


def test_a_merge_that_is_killed_half_way_is_done_by_the_next(
    whole: tuple[Path, PrepareSummary], parted: Path, contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = sharding.RecordedPool._move
    for moves in range(0, 7, 2):
        store = shutil.copytree(parted, parted.with_name(f"store{moves}"))
        left = [moves]

        def die(self: object, *what: object, left: list[int] = left) -> None:
            move(self, *what)  # the file is moved, and the journal does not know
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1

        monkeypatch.setattr(sharding.RecordedPool, "_move", die)
        with pytest.raises(KeyboardInterrupt):
            merge(store, progress=False)
        monkeypatch.undo()
        merge(store, progress=False)
        assert contents(store) == contents(whole[0])
        assert check(store, progress=False) == []


def test_a_merge_waits_for_every_shard(parted: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        merge(tmp_path / "nothing", progress=False)
    (parted / "shards/2-of-2/part.jsonl").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards have not ended \(2/2\): run them"):
        merge(parted, progress=False)


def test_a_shard_at_work_is_neither_started_again_nor_merged(
    raw: Path, whole: tuple[Path, PrepareSummary], parted: Path, contents: Callable
) -> None:
    before = contents(parted)
    with open(parted / "shards/2-of-2/.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for start in (lambda: run_shards(raw, parted, 2, numbers=(2,)), lambda: merge(parted, progress=False)):
            with pytest.raises(UserError, match=r"another prepare is at work on .*shards/2-of-2: wait for it to end"):
                start()
            assert contents(parted) == before
    merge(parted, progress=False)
    assert contents(parted) == contents(whole[0])


def test_a_shard_that_is_started_again_is_not_done_until_it_ends(
    raw: Path, parted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object) -> None:
        assert not (parted / "shards/2-of-2/part.jsonl").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Preparation, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_shards(raw, parted, 2, numbers=(2,))
    with pytest.raises(UserError, match=r"1 of 2 shards have not ended \(2/2\)"):
        merge(parted, progress=False)


def test_shards_of_different_minds_are_not_merged(raw: Path, parted: Path) -> None:
    settings, part = parted / "shards/2-of-2/store.json", parted / "shards/2-of-2/part.jsonl"
    right = settings.read_text(encoding="utf-8"), part.read_text(encoding="utf-8")
    settings.write_text(right[0].replace("1.5", "1.4"))
    with pytest.raises(UserError, match="shards 1 and 2 differ in spacing_mm"):
        merge(parted, progress=False)
    settings.unlink()
    with pytest.raises(UserError, match="2-of-2 has lost its settings: run shard 2/2 again, then merge"):
        merge(parted, progress=False)
    settings.write_text(right[0])
    header, _, lines = right[1].partition("\n")
    other = json.dumps({**json.loads(header), "found": 19, "listing_sha256": "0" * 64})
    part.write_text(f"{other}\n{lines}")
    with pytest.raises(UserError, match="shard 1 saw 18 volumes, shard 2 saw 19, or others: RAW changed meanwhile"):
        merge(parted, progress=False)
    part.write_text("half a li")
    with pytest.raises(UserError, match=r"part.jsonl cannot be read .*: run that shard again"):
        merge(parted, progress=False)
    part.write_text(right[1])
    with pytest.raises(UserError, match=r"holds 1-of-2, not a shard of 3: merge them first .* or delete"):
        run_shards(raw, parted, 3, numbers=(1,))
    with pytest.raises(UserError, match="holds shards that are not merged"):
        prepare(raw, parted, progress=False)
    with pytest.raises(UserError, match="is not a store"):
        check(parted, progress=False)
    merge(parted, progress=False)
    with pytest.raises(UserError, match=r"was prepared with spacing_mm 1.5 \(now 1.4\)"):
        run_shards(raw, parted, 2, spacing_mm=1.4)


def test_a_shard_takes_note_of_other_files_than_its_own(
    raw: Path, parted: Path, tmp_path: Path, write: Callable
) -> None:
    """What all shards must agree on is all that there is, not what falls to them."""
    own = shutil.copytree(raw, tmp_path / "raw")
    write(own / "late.nii.gz", 33)
    owner = next(number for number in (1, 2) if sharding.Shard(number, 2).has("late.nii.gz"))
    run_shards(own, parted, 2, numbers=(3 - owner,))
    with pytest.raises(UserError, match="RAW changed meanwhile"):
        merge(parted, progress=False)


def test_a_volume_lost_from_a_shard_is_noticed(parted: Path) -> None:
    next(parted.glob("shards/*/volumes/4.npy")).unlink()
    with pytest.raises(UserError, match=r"volumes/4.npy is missing"):
        merge(parted, progress=False)
