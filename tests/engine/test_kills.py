"""Runs that are killed at random moments, within saves too, and continued until their end.

As a script it is the stand-in's, on a disk so slow that about half of the time a save is under way.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from run_results import assert_same_bits, lines_of, state_of, tensors_of
from stand_in import METHODS, StandIn, recipe

from voxtrast.engine import checkpoint, pretrain
from voxtrast.engine.checkpoint import finished_checkpoints, load_latest

WRITE_SECONDS = 0.006  # of each piece of a checkpoint on the slow disk


def command(store: Path, run: Path, steps: int, ranks: int = 1) -> list[str]:
    words = [f"data={store}", f"output={run}", f"train.steps={steps}", "checkpoint.every=1", "checkpoint.keep=2",
             "validation.every=0", "train.ema_decay=0.5", "method.adversarial_weight=0.1"]  # fmt: skip
    start = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    return [*start, __file__, str(recipe(run.parent)), *words]


def start(words: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as file:
        return subprocess.Popen(
            words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, cwd=Path(__file__).parent
        )


def finish(words: Sequence[str], log: Path) -> None:
    assert start(words, log).wait(timeout=400) == 0, log.read_text()[-3000:]


def lines(run: Path) -> int:
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0


def ranks_of(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes that train: the started one, or those of a launcher."""
    return psutil.Process(process.pid).children() or [psutil.Process(process.pid)]


def kill_at_random(process: "subprocess.Popen[bytes]", run: Path, draws: random.Random, seconds: float) -> bool:
    """Kills a rank up to so many seconds after the first step that this process takes; False where it was over."""
    before, deadline = lines(run), time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        # A resumed run first writes the log anew up to its checkpoint.
        if lines(run) > 0 and (run / "started").exists() and lines(run) != before:
            break
        before = min(before, lines(run)) if (run / "started").exists() else before
        time.sleep(0.01)
    time.sleep(draws.uniform(0, seconds))
    if process.poll() is not None:
        return False
    victim = draws.choice(ranks_of(process))
    victim.send_signal(signal.SIGKILL)
    process.wait(timeout=120)  # a launcher ends the other ranks
    return True


def on_disk(run: Path) -> tuple[str, bool]:
    """What a kill left, in words, and whether it came within a save."""
    folder = run / "checkpoints"
    finished = [step for step, _ in finished_checkpoints(folder)]
    partial = [file.name.split(".")[1] for file in folder.glob(".*.partial")]
    undescribed = [file.stem for file in folder.glob("*.pt") if not file.with_suffix(".json").exists()]
    words = f"whole {finished}"
    words += f", partial {partial}" if partial else ""
    words += f", without description {undescribed}" if undescribed else ""
    return words, bool(partial or undescribed)


def killed_and_continued(words: list[str], run: Path, kills: int, seconds: float, seed: int) -> list[dict[str, object]]:
    draws, done = random.Random(seed), list[dict[str, object]]()
    log = run.parent / "output.txt"
    while len(done) < kills:
        (run / "started").unlink(missing_ok=True)
        process = start(words, log)
        if not kill_at_random(process, run, draws, seconds):
            assert process.returncode == 0, log.read_text()[-3000:]
            pytest.fail(f"the run was over after {len(done)} of {kills} kills; give it more steps")
        disk, within = on_disk(run)
        resumes = load_latest(run / "checkpoints")[0]
        done.append({"kill": len(done) + 1, "lines": lines(run), "within_a_save": within, "on_disk": disk,
                     "resumes_at": resumes.step if resumes else 0})  # fmt: skip
    return done


def report(done: list[dict[str, object]], run: Path, whole: Path, steps: int) -> float:
    """Prints what happened at each kill; returns the largest relative difference of a loss."""
    ours, theirs = (torch.tensor([line["loss"] for line in lines_of(each)]) for each in (run, whole))
    assert len(ours) == len(theirs) == steps
    apart = ((ours - theirs).abs() / theirs.abs()).tolist()
    for index, kill in enumerate(done):
        first = int(str(kill["resumes_at"]))
        last = int(str(done[index + 1]["resumes_at"])) if index + 1 < len(done) else steps
        print(json.dumps(kill | {"difference_until_next": max(apart[first:last], default=0.0)}))
    within = sum(bool(kill["within_a_save"]) for kill in done)
    print(f"{len(done)} kills, {within} within a save, largest relative difference of a loss {max(apart):.3g}")
    return max(apart)


def test_a_run_killed_within_a_save_equals_the_uninterrupted_run(tiny_store: Path, tmp_path: Path) -> None:
    """Twice: in the middle of the file, and between the file and its description."""
    (tmp_path / "a").mkdir()
    words, run = command(tiny_store, tmp_path / "a" / "run", 6), tmp_path / "a" / "run"
    for moment in ("step-00000003.pt", "step-00000005.json"):
        os.environ["KILLED_WITHIN"] = moment
        try:
            process = start(words, tmp_path / "output.txt")
            assert process.wait(timeout=200) == -signal.SIGKILL, (tmp_path / "output.txt").read_text()[-3000:]
        finally:
            del os.environ["KILLED_WITHIN"]
        assert on_disk(run)[1]
        newest, damaged = load_latest(run / "checkpoints")
        assert newest is not None
        assert (newest.step, damaged) == (2 if moment.endswith("pt") else 4, [])
    finish(words, tmp_path / "output.txt")
    (tmp_path / "b").mkdir()
    finish(command(tiny_store, tmp_path / "b" / "run", 6), tmp_path / "output.txt")
    assert lines_of(run) == lines_of(tmp_path / "b" / "run")
    assert_same_bits(state_of(run), state_of(tmp_path / "b" / "run"))
    assert not list((run / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_change_no_bit(tiny_store: Path, tmp_path: Path) -> None:
    steps = 120
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run, whole = tmp_path / "a" / "run", tmp_path / "b" / "run"
    words = command(tiny_store, run, steps)
    done = killed_and_continued(words, run, kills=20, seconds=1.2, seed=7)
    finish(words, tmp_path / "output.txt")
    finish(command(tiny_store, whole, steps), tmp_path / "output.txt")
    assert report(done, run, whole, steps) == 0
    assert lines_of(run) == lines_of(whole)
    assert_same_bits(state_of(run, steps), state_of(whole, steps))
    assert sum(bool(kill["within_a_save"]) for kill in done) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_of_two_killed_at_random_moments_changes_nothing(tiny_store: Path, tmp_path: Path) -> None:
    steps = 40
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run, whole = tmp_path / "a" / "run", tmp_path / "b" / "run"
    words = command(tiny_store, run, steps, ranks=2)
    done = killed_and_continued(words, run, kills=4, seconds=1.2, seed=11)
    finish(words, tmp_path / "output.txt")
    finish(command(tiny_store, whole, steps, ranks=2), tmp_path / "output.txt")
    assert report(done, run, whole, steps) <= 1e-6
    ours, theirs = dict(tensors_of(state_of(run, steps))), dict(tensors_of(state_of(whole, steps)))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def main() -> int:
    """The stand-in's run on the slow disk, or killed by itself within the save that KILLED_WITHIN names."""
    ordinary, ordinary_replace, chosen = checkpoint._Hashing.write, os.replace, os.environ.get("KILLED_WITHIN", "")
    ordinary_monitor = pretrain.Trainer._preflight

    def slow(file: checkpoint._Hashing, content: bytes) -> int:
        time.sleep(WRITE_SECONDS)
        written = ordinary(file, content)
        if chosen and file.size > 1000 and Path(str(file.file.name)).name.startswith(f".{chosen}"):
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def replace(source: Path, target: Path) -> None:
        if chosen.endswith(".json") and Path(target).name == chosen:
            os.kill(os.getpid(), signal.SIGKILL)
        ordinary_replace(source, target)

    def preflight(trainer: pretrain.Trainer, *arguments: object) -> None:
        ordinary_monitor(trainer, *arguments)  # type: ignore[arg-type]
        (trainer.run / "started").touch()

    checkpoint._Hashing.write = slow  # type: ignore[method-assign,assignment]
    pretrain.Trainer._preflight = preflight  # type: ignore[method-assign,assignment]
    os.replace = replace  # type: ignore[assignment]
    METHODS["stand_in"] = StandIn
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
