"""Deaths: of a worker, of the whole run, by an interrupt. The store ends up as if nothing had happened."""

import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from voxtrast.engine.data import preparation, workers
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError

DIE = (
    "import os, signal; from voxtrast.engine.data import workers, conversion\n"
    "def perform(job):\n"
    "    if job['task'] == 'convert' and job['id'] == 'fatal': os.kill(os.getpid(), signal.SIGKILL)\n"
    "    if job['task'] == 'convert' and job['id'] == 'once' and not os.path.exists(MARK):\n"
    "        open(MARK, 'w').close(); os.kill(os.getpid(), signal.SIGKILL)\n"
    "    return conversion.perform(job)\n"
    "workers.serve(perform)\n"
)


def test_worker_that_dies_costs_its_file_and_nothing_else(
    tmp_path: Path, write: Callable, run: Callable, rejected: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("a", "b", "fatal", "once", "z")):
        write(tmp_path / f"raw/{name}.nii.gz", number)
    monkeypatch.setattr(workers, "PROGRAM", f"MARK = {str(tmp_path / 'mark')!r}\n{DIE}")
    summary = run(tmp_path / "raw", tmp_path / "store", workers=2)
    assert (summary.prepared, summary.rejected, summary.exit_code) == (4, 1, 1)
    line = rejected(tmp_path / "store")["fatal.nii.gz"]
    assert line["reason"] == "the process that read it was ended by SIGKILL, twice"
    assert "memory" in line["remedy"]
    monkeypatch.undo()
    assert run(tmp_path / "raw", tmp_path / "store").exit_code == 0, "the next run tries it again"


def test_a_volume_that_takes_too_long_is_given_up_and_the_rest_goes_on(
    tmp_path: Path, write: Callable, run: Callable, rejected: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("a", "slow", "z")):
        write(tmp_path / f"raw/{name}.nii.gz", number)
    program = (
        "import time; from voxtrast.engine.data import workers, conversion\n"
        "def perform(job):\n"
        "    if job['task'] == 'convert' and job['id'] == 'slow': time.sleep(600)\n"
        "    return conversion.perform(job)\n"
        "workers.serve(perform)\n"
    )
    monkeypatch.setattr(workers, "PROGRAM", program)
    summary = run(tmp_path / "raw", tmp_path / "store", timeout_s=2.0)
    assert (summary.prepared, summary.rejected) == (2, 1)
    line = rejected(tmp_path / "store")["slow.nii.gz"]
    assert line["reason"] == "took longer than 2 s and was given up"
    assert "larger timeout_s" in line["remedy"]


@pytest.mark.parametrize("timeout_s", [1e7, math.inf])
def test_a_time_out_may_be_long_and_none(timeout_s: float, tmp_path: Path, write: Callable, run: Callable) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    assert run(tmp_path / "raw", tmp_path / "store", timeout_s=timeout_s).prepared == 1


def test_a_wait_of_several_polls_ends_with_the_reply_or_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LONGEST_POLL_S", 0.01)
    there, here = os.pipe()
    began = time.monotonic()
    assert not workers._readable(there, 0.1)
    assert time.monotonic() - began >= 0.1
    for timeout_s in (60.0, math.inf, None):
        timer = threading.Timer(0.1, os.write, (here, b"x"))
        timer.start()
        assert workers._readable(there, timeout_s)
        timer.join()
        os.read(there, 1)
    os.close(there)
    os.close(here)


def test_what_a_disk_may_forget_is_tried_again_and_bad_files_are_not(
    tmp_path: Path, write: Callable, run: Callable, rejected: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"flaky": "EIO", "stale": "ESTALE", "denied": "EACCES", "broken": "EIO"}
    for number, name in enumerate((*names, "good")):
        write(tmp_path / f"raw/{name}.nii.gz", number)
    program = (
        "import errno, os; from voxtrast.engine.data import workers, conversion\n"
        f"names, tries = {names!r}, {str(tmp_path / 'tries')!r}\n"
        "read = conversion.read_volume\n"
        "def fail(files, dicom):\n"
        "    name = files[0].name.removesuffix('.nii.gz')\n"
        "    with open(tries, 'a') as stream: stream.write(name + ' ')\n"
        "    count = open(tries).read().split().count(name)\n"
        "    if name in names and (count == 1 or name == 'broken'):\n"
        "        number = getattr(errno, names[name])\n"
        "        raise OSError(number, os.strerror(number))\n"
        "    return read(files, dicom)\n"
        "conversion.read_volume = fail\n"
        "workers.serve(conversion.perform)\n"
    )
    monkeypatch.setattr(workers, "PROGRAM", program)
    summary = run(tmp_path / "raw", tmp_path / "store")
    assert (summary.prepared, summary.rejected) == (3, 2)
    assert {file: line["reason"] for file, line in rejected(tmp_path / "store").items()} == {
        "broken.nii.gz": "cannot be read: Input/output error",
        "denied.nii.gz": "cannot be read: Permission denied",
    }
    tries = (tmp_path / "tries").read_text(encoding="utf-8").split()
    assert {name: tries.count(name) for name in (*names, "good")} == {
        "flaky": 2, "stale": 2, "denied": 1, "broken": 2, "good": 1,
    }  # fmt: skip


def test_workers_that_cannot_start_are_reported_and_not_blamed_on_files(
    tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    monkeypatch.setattr(workers, "PROGRAM", "raise ImportError('no SimpleITK')")
    with pytest.raises(UserError, match="ImportError: no SimpleITK: repair the installation"):
        run(tmp_path / "raw", tmp_path / "store")


def _start(raw: Path, store: Path) -> subprocess.Popen[bytes]:
    program = (
        "import signal, sys\n"
        # A test run in the background of a shell hands down an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from voxtrast.engine.data.prepare import prepare\n"
        "prepare(*sys.argv[1:], workers=2)\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(raw), str(store)], stderr=subprocess.DEVNULL)


def _children(process: int) -> list[int]:
    listing = Path(f"/proc/{process}/task")
    return [
        int(child) for task in listing.iterdir() for child in (task / "children").read_text(encoding="utf-8").split()
    ]


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill_and_resume(tmp_path: Path, kills: int, write: Callable, run: Callable, contents: Callable) -> None:
    """Kill prepare at random moments, at least once with volumes half-way; the end must be as if nothing had been."""
    raw = tmp_path / "raw"
    for number in range(16):
        values = ndimage.zoom(np.random.default_rng(number).normal(size=(8, 8, 8)), 8, order=1).astype(np.float32)
        write(raw / f"images/{number:02d}.nii.gz", values, (1.0, 1.0, 1.0))
        write(raw / f"labels/{number:02d}.nii.gz", (values > 0).astype(np.uint8), (1.0, 1.0, 1.0))
    (raw / "images/bad.nii.gz").touch()
    run(raw, tmp_path / "whole", workers=2)
    expected = contents(tmp_path / "whole")
    draw, halfway = random.Random(0), 0
    for attempt in range(kills):
        store = tmp_path / f"store{attempt}"
        process = _start(raw, store)
        journal, least = store / "journal.jsonl", draw.randrange(1, 14)
        until = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= least) and time.monotonic() < until:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        children = _children(process.pid) if process.poll() is None else []
        process.kill()
        process.wait()
        halfway += not (store / "index.jsonl").exists()
        until = time.monotonic() + 5
        while any(map(_is_alive, children)) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(map(_is_alive, children)), "workers die with their parent"
        summary = run(raw, store, workers=2)
        assert (summary.prepared + summary.unchanged, summary.rejected) == (16, 1)
        assert contents(store) == expected
    assert halfway > 0, "no kill came before the end: make the volumes larger"


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_equal_bytes(
    tmp_path: Path, write: Callable, run: Callable, contents: Callable
) -> None:
    _kill_and_resume(tmp_path, 2, write, run, contents)


@pytest.mark.slow
def test_killed_twenty_times_it_resumes_to_equal_bytes(
    tmp_path: Path, write: Callable, run: Callable, contents: Callable
) -> None:
    _kill_and_resume(tmp_path, 20, write, run, contents)


def test_killed_while_it_updates_a_source_it_leaves_no_index_of_the_old_one(
    tmp_path: Path, write: Callable, run: Callable, contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the new volume is in place and nothing else is: nobody may read it by the old line."""
    raw, store = tmp_path / "raw", tmp_path / "store"
    for number in range(3):
        write(raw / f"{number}.nii.gz", number)
    run(raw, store)
    old = (raw / "1.nii.gz").read_bytes()
    write(raw / "1.nii.gz", 11)

    def end(journal: object, line: str) -> None:
        raise KeyboardInterrupt

    for content in ((raw / "1.nii.gz").read_bytes(), old):  # the next run finds the new source, or the old one again
        monkeypatch.setattr(preparation._Journal, "append", end)
        with pytest.raises(KeyboardInterrupt):
            run(raw, store)
        monkeypatch.undo()
        assert (store / "volumes/1.npy").exists()
        with pytest.raises(UserError, match="prepare did not finish"):
            Store(store)
        (raw / "1.nii.gz").write_bytes(content)
        summary = run(raw, store)
        assert (summary.prepared, summary.unchanged, summary.exit_code) == (1, 2, 0)
        Store(store).verify(contents=True)
        run(raw, tmp_path / f"anew{content == old}")
        assert contents(store) == contents(tmp_path / f"anew{content == old}")
        write(raw / "1.nii.gz", 12)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path, write: Callable, run: Callable, contents: Callable) -> None:
    """Half a temporary file, half a line in the journal, a volume that no line speaks of."""
    raw, store = tmp_path / "raw", tmp_path / "store"
    for number in range(2):
        write(raw / f"{number}.nii.gz", number)
    run(raw, store)
    expected = contents(store)
    (store / "volumes/.0.npy.123.tmp").write_bytes(b"half")
    (store / ".index.jsonl.123.tmp").write_bytes(b"half")
    (store / "volumes/gone.npy").write_bytes(b"whole")
    lines = (store / "index.jsonl").read_text(encoding="utf-8").splitlines()
    (store / "journal.jsonl").write_text(f"{lines[0]}\n{lines[1][:70]}")
    (store / "index.jsonl").unlink()
    summary = run(raw, store)
    assert (summary.prepared, summary.unchanged) == (1, 1)
    assert contents(store) == expected


def test_interrupt_ends_the_workers_and_keeps_what_is_done(
    tmp_path: Path, write: Callable, run: Callable, values: Callable
) -> None:
    for number in range(12):
        write(tmp_path / f"raw/{number}.nii.gz", values(number, (70, 70, 70)), (1.0, 1.0, 1.0))
    process = _start(tmp_path / "raw", tmp_path / "store")
    journal = tmp_path / "store/journal.jsonl"
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert run(tmp_path / "raw", tmp_path / "store").unchanged >= 1
