"""Runs that are killed at random moments, within saves too, and continued until their end.

As a script it is the stand-in's, on a disk so slow that much of the time a save is under way.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from rank_processes import free_port
from run_results import assert_same_bits, lines_of, state_of, tensors_of
from stand_in import METHODS, StandIn, recipe

from voxtrast.engine import checkpoint, pretrain
from voxtrast.engine.checkpoint import finished_checkpoints, load_latest
from voxtrast.engine.config import load_config
from voxtrast.engine.monitor import Monitor
from voxtrast.engine.trainer import Trainer
from voxtrast.methods import Batch

PRELOADED = ["stand_in", "deepspeed", "torch.utils.tensorboard", "rich.progress", "voxtrast.engine.data.pipeline"]
WRITE_SECONDS = 1e-4  # of each of the 800 pieces of a checkpoint on the slow disk


class Forked:
    """A process of its own that has nothing to import any more; used as a Popen."""

    def __init__(self, words: list[str], log: Path, killed_within: str = "") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=_forked, args=(words, log, killed_within))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode


class Launched(subprocess.Popen[bytes]):
    """Two ranks under torchrun."""

    def __init__(self, words: list[str], log: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", __file__]
        with log.open("ab") as file:
            super().__init__(
                [sys.executable, *launcher, *words],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=file,
                cwd=Path(__file__).parent,
            )


Started = Forked | Launched


def _forked(words: list[str], log: Path, killed_within: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(main(words, killed_within))


def settings(store: Path, run: Path, steps: int) -> list[str]:
    run.parent.mkdir(exist_ok=True)
    return [str(recipe(run.parent)), f"data={store}", f"output={run}", f"train.steps={steps}", "checkpoint.every=1",
            "checkpoint.keep=2", "validation.every=0", "train.ema_decay=0.5",
            "method.adversarial_weight=0.1"]  # fmt: skip


def finish(process: Started, log: Path) -> None:
    assert process.wait(timeout=400) == 0, log.read_text(encoding="utf-8")[-3000:]


def lines(run: Path) -> int:
    return (run / "log.jsonl").read_text(encoding="utf-8").count("\n") if (run / "log.jsonl").exists() else 0


def ranks_of(process: Started) -> list[psutil.Process]:
    """The processes that train: the started one, or those of a launcher."""
    own = psutil.Process(process.pid)
    return own.children() if isinstance(process, Launched) else [own]


def kill_at_random(process: Started, run: Path, draws: random.Random, seconds: float) -> bool:
    """Kills a rank up to so many seconds after this process has begun its steps; False where it was over."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not (run / "started").exists():
        time.sleep(0.01)
    time.sleep(draws.uniform(0, seconds))
    if process.poll() is not None:
        return False
    draws.choice(ranks_of(process)).send_signal(signal.SIGKILL)
    process.wait(timeout=120)  # a launcher ends the other ranks
    return True


def unfinished(run: Path) -> set[str]:
    """Files of saves that were cut off: partial ones, and whole ones without their description."""
    folder = run / "checkpoints"
    undescribed = (file for file in folder.glob("*.pt") if not file.with_suffix(".json").exists())
    return {file.name for file in (*folder.glob(".*.partial"), *undescribed)}


def killed_and_continued(
    begin: Callable[[], Started], run: Path, log: Path, kills: int, seconds: float, seed: int
) -> list[dict[str, object]]:
    draws, done = random.Random(seed), list[dict[str, object]]()
    while len(done) < kills:
        (run / "started").unlink(missing_ok=True)
        left_before = unfinished(run)
        process, began = begin(), time.monotonic()
        if not kill_at_random(process, run, draws, seconds):
            pytest.fail(
                f"over after {len(done)} of {kills} kills: {process.poll()}, {log.read_text(encoding='utf-8')[-3000:]}"
            )
        cut_off = unfinished(run) - left_before
        resumes = load_latest(run / "checkpoints")[0]
        done.append({"kill": len(done) + 1, "after_seconds": round(time.monotonic() - began, 2),
                     "steps_in_log": lines(run),
                     "within_a_save": bool(cut_off), "cut_off": sorted(cut_off),
                     "whole": [step for step, _ in finished_checkpoints(run / "checkpoints")],
                     "resumes_at": resumes.step if resumes else 0})  # fmt: skip
    finish(begin(), log)
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


@pytest.mark.parametrize(
    ("moment", "before"), [("step-00000003.pt", 2), pytest.param("step-00000005.json", 4, marks=pytest.mark.slow)]
)
def test_a_run_killed_within_a_save_equals_the_uninterrupted_run(
    moment: str, before: int, stand_in: None, tiny_store: Path, tmp_path: Path
) -> None:
    """In the middle of the file, and between the file and its description."""
    run, whole, log = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "output.txt"
    process = Forked(settings(tiny_store, run, 6), log, moment)
    assert process.wait(timeout=200) == -signal.SIGKILL, log.read_text(encoding="utf-8")[-3000:]
    assert any(moment.split(".")[0] in name for name in unfinished(run))
    newest, damaged = load_latest(run / "checkpoints")
    assert newest is not None
    assert (newest.step, damaged) == (before, [])
    for folder in (run, whole):
        file, *words = settings(tiny_store, folder, 6)
        pretrain.pretrain(load_config(file, words))
    assert lines_of(run) == lines_of(whole)
    assert_same_bits(state_of(run), state_of(whole))
    assert not list((run / "checkpoints").glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_change_no_bit(tiny_store: Path, tmp_path: Path) -> None:
    steps, run, whole, log = 150, tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "output.txt"
    words = settings(tiny_store, run, steps)
    done = killed_and_continued(lambda: Forked(words, log), run, log, kills=20, seconds=1.5, seed=7)
    finish(Forked(settings(tiny_store, whole, steps), log), log)
    assert report(done, run, whole, steps) == 0
    assert lines_of(run) == lines_of(whole)
    assert_same_bits(state_of(run, steps), state_of(whole, steps))
    assert sum(bool(kill["within_a_save"]) for kill in done) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_rank_of_two_killed_at_random_moments_changes_nothing(tiny_store: Path, tmp_path: Path) -> None:
    steps, run, whole, log = 40, tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "output.txt"
    words = settings(tiny_store, run, steps)
    done = killed_and_continued(lambda: Launched(words, log), run, log, kills=4, seconds=1.2, seed=11)
    finish(Launched(settings(tiny_store, whole, steps), log), log)
    assert report(done, run, whole, steps) <= 1e-6
    ours, theirs = dict(tensors_of(state_of(run, steps))), dict(tensors_of(state_of(whole, steps)))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def main(words: list[str], killed_within: str = "") -> int:
    """The stand-in's run on the slow disk; killed by itself within the save of the file that is named."""
    write, rename, preflight = checkpoint._Hashing.write, os.replace, Trainer._preflight

    def slow(file: checkpoint._Hashing, content: bytes) -> int:
        time.sleep(WRITE_SECONDS)
        written = write(file, content)
        if file.size > 1000 and Path(str(file.file.name)).name.startswith(f".{killed_within}."):
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def renamed(source: Path, target: Path) -> None:
        if Path(target).name == killed_within:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    def started(trainer: Trainer, batches: list[Batch], monitor: Monitor) -> None:
        preflight(trainer, batches, monitor)
        (trainer.run / "started").touch()

    checkpoint._Hashing.write = slow  # type: ignore[method-assign,assignment]
    os.replace = renamed  # type: ignore[assignment]
    Trainer._preflight = started  # type: ignore[method-assign]
    METHODS["stand_in"] = StandIn
    return pretrain.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
