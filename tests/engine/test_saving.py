"""Saves that are written while training goes on, what stays of them, and what a run continues from."""

import errno
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from run_results import assert_same_bits, lines_of, state_of
from stand_in import Run, recipe

from voxtrast.engine import checkpoint, resuming
from voxtrast.engine.checkpoint import State, finished_checkpoints, load_checkpoint, load_latest, save_checkpoint
from voxtrast.engine.config import CheckpointConfig, load_config
from voxtrast.engine.data.store import file_sha256
from voxtrast.engine.errors import UserError
from voxtrast.engine.monitor import Monitor
from voxtrast.engine.pretrain import pretrain
from voxtrast.engine.saving import Saver
from voxtrast.engine.trainer import Trainer
from voxtrast.engine.versions import changed, versions
from voxtrast.engine.weights import load_weights
from voxtrast.methods import recipe_names

ABOUT = {"format": 1, "backbone": {}}


def small_state(step: int, **fields: Any) -> State:
    tensor = torch.full((3, 4), float(step))
    return State(step, {"a": tensor, "b": tensor}, {"a": {"exp_avg": tensor.clone()}}, {}, **fields)


def described(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"step-{step:08d}.json").read_text(encoding="utf-8"))
    return found


def rewrite(path: Path, **fields: Any) -> None:
    """Changes fields of a checkpoint; None takes one away."""
    content = torch.load(path, weights_only=True) | fields
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    path.with_suffix(".json").write_text(json.dumps(about | {"sha256": file_sha256(path)}))


def test_training_goes_on_while_a_save_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train.ema_decay=0.5", "validation.every=0")
    whole = run("whole", *words)
    ordinary, ordinary_step = checkpoint._Hashing.write, Trainer.step
    taken, far_enough, in_time = [0], threading.Event(), []

    def slow(file: Any, content: Any) -> int:
        # The save of step 2 is only finished once step 4 was taken; that of step 4 waits for it.
        in_time.append(far_enough.wait(30))
        return ordinary(file, content)

    def counting(trainer: Trainer, *arguments: Any) -> Any:
        found = ordinary_step(trainer, *arguments)
        taken[0] += 1
        if taken[0] == 4:
            assert not finished_checkpoints(trainer.run / "checkpoints")
            far_enough.set()
        return found

    monkeypatch.setattr(checkpoint._Hashing, "write", slow)
    monkeypatch.setattr(Trainer, "step", counting)
    slowed = run("slowed", *words)
    assert in_time
    assert all(in_time)
    assert [step for step, _ in finished_checkpoints(slowed / "checkpoints")] == [2, 4, 6]
    for step in (2, 4, 6):  # of its own step, although training had gone on
        assert_same_bits(state_of(slowed, step), state_of(whole, step))
    assert lines_of(slowed) == lines_of(whole)


def test_the_log_says_how_long_a_save_held_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = checkpoint._write_hashed

    def slow(partial: Path, content: Any) -> tuple[int, str]:
        time.sleep(0.7)
        return ordinary(partial, content)

    monkeypatch.setattr(checkpoint, "_write_hashed", slow)
    folder = run("run", "train.steps=4", "checkpoint.every=2", "validation.every=0")
    held = [
        json.loads(line)["save_seconds"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [each > 0 for each in held] == [False, False, True, False]
    assert held[2] < 0.7


def test_a_new_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most, ordinary = [0], [0], save_checkpoint

    def counted(*arguments: Any, **options: Any) -> Path:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.05)
        path = ordinary(*arguments, **options)
        under_way[0] -= 1
        return path

    monkeypatch.setattr(checkpoint, "save_checkpoint", counted)
    with Saver(tmp_path, CheckpointConfig(keep=2)) as saver:
        for step in range(1, 5):
            saver.save(small_state(step), {"a": torch.ones(2)}, ABOUT | {"step": step}, None)
    assert most == [1]
    assert [step for step, _ in finished_checkpoints(tmp_path / "checkpoints")] == [3, 4]
    assert load_weights(tmp_path / "weights.safetensors")[1]["step"] == 4


@pytest.mark.parametrize("last", [False, True])
def test_what_goes_wrong_in_a_save_is_raised_by_the_next_or_at_the_end(
    last: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary, bad = os.replace, f"step-{6 if last else 2:08d}.pt"

    def read_only(source: Any, target: Any) -> None:
        if Path(target).name == bad:
            raise OSError(errno.EROFS, "Read-only file system")
        ordinary(source, target)

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(UserError, match=f"{bad}: cannot be written .*Read-only file system"):
        run("run", "validation.every=0")
    assert len(lines_of(tmp_path / "run")) == (6 if last else 4)
    assert [step for step, _ in finished_checkpoints(tmp_path / "run" / "checkpoints")] == ([2, 4] if last else [])
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.partial"))


def test_what_goes_wrong_in_a_save_is_told_where_another_error_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> Path:
        raise UserError("no space left")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)

    def run() -> None:
        with Saver(tmp_path, CheckpointConfig()) as saver:
            saver.save(small_state(1), {"a": torch.ones(2)}, ABOUT | {"step": 1}, None)
            raise RuntimeError("of a step")

    with pytest.raises(RuntimeError, match="of a step"):
        run()
    assert capsys.readouterr().err == "the last save failed as well: no space left\n"


def test_what_a_killed_process_left_of_its_weights_goes(tmp_path: Path) -> None:
    left, others = tmp_path / ".weights.safetensors.123.partial", tmp_path / "weights.safetensors"
    for file in (left, others):
        file.touch()
    with Saver(tmp_path, CheckpointConfig()):
        assert not left.exists()
        assert others.exists()


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    folder, losses = tmp_path / "checkpoints", [3.0, 1.0, None, 2.0, float("nan"), 1.0, 4.0]
    best = []
    with Saver(tmp_path, CheckpointConfig(keep=2, keep_best=True)) as saver:
        for step, loss in enumerate(losses, 1):
            saver.save(small_state(step), {"a": torch.ones(2)}, ABOUT | {"step": step}, loss)
            saver.finish()
            best.append(described(folder, step)["best"])
        assert best == [1, 2, 2, 2, 2, 6, 6]  # of two equal ones the newer
        assert [step for step, _ in finished_checkpoints(folder)] == [6, 7]
        assert load_weights(tmp_path / "weights.safetensors")[1]["step"] == 7
        assert load_weights(tmp_path / "weights-best.safetensors")[1]["step"] == 6
        for step in (8, 9):
            saver.save(small_state(step), {"a": torch.ones(2)}, ABOUT | {"step": step}, 5.0)
        saver.finish()
        assert [step for step, _ in finished_checkpoints(folder)] == [6, 8, 9]
        # The losses of another stage are of other terms.
        saver.save(small_state(10, schedule={"stage": 1}), {"a": torch.ones(2)}, ABOUT | {"step": 10}, 7.0)
        saver.finish()
        assert described(folder, 10)["best"] == 10
        assert [step for step, _ in finished_checkpoints(folder)] == [9, 10]
    save_checkpoint(folder, small_state(11, schedule={"stage": 1}), keep=1)
    assert [step for step, _ in finished_checkpoints(folder)] == [11]


def test_a_run_keeps_the_weights_of_its_best_look_at_what_is_held_aside(run: Run) -> None:
    folder = run("run", "checkpoint.every=1", "validation.every=1", "checkpoint.keep=1")
    looks = {line["step"]: line["loss"] for line in lines_of(folder, "validation") if line["step"]}
    best = min(looks, key=lambda step: (looks[step], -step))
    assert load_weights(folder / "weights-best.safetensors")[1]["step"] == best
    assert load_weights(folder / "weights.safetensors")[1]["step"] == 6
    assert {step for step, _ in finished_checkpoints(folder / "checkpoints")} == {best, 6}
    newest = described(folder / "checkpoints", 6)
    assert (newest["best"], newest["held_aside"]) == (best, pytest.approx(looks[6], rel=1e-12))
    (folder / "weights.safetensors").unlink()
    run("run", "checkpoint.every=1", "validation.every=1", "checkpoint.keep=1")  # nothing to do but that
    assert load_weights(folder / "weights.safetensors")[1]["step"] == 6
    run("never", "checkpoint.keep_best=false", "train.steps=1")
    assert not (folder.parent / "never" / "weights-best.safetensors").exists()


def test_a_checkpoint_says_what_it_is_of(run: Run) -> None:
    folder = run("run", "train.steps=2", "optimizer.learning_rate=0.5", "schedule.name=constant")
    state = state_of(folder, 2)
    assert (state.method, state.backbone["features"], state.versions) == ("stand_in", [4, 8], versions())
    assert set(state.versions) == {"voxtrast", "torch", "deepspeed", "numpy", "nvidia-dali", "python"}
    assert state.versions["nvidia-dali"][0].isdigit()
    assert state.versions["torch"] == torch.__version__
    assert state.schedule == {"held_aside_batches": 1, "steps": 2, "stage": 0, "stage_first": 0,
                              "stage_name": state.schedule["stage_name"],
                              "stage_last": 2, "learning_rate": 0.5}  # fmt: skip
    about = described(folder / "checkpoints", 2)
    assert (about["format"], about["method"]) == (3, "stand_in")
    assert about["bytes"] == (folder / "checkpoints" / "step-00000002.pt").stat().st_size


def test_other_versions_and_another_length_are_said_in_a_line_each(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("run", "train.steps=2", "checkpoint.keep=1")
    assert "note: the checkpoint" not in capsys.readouterr().err
    path = folder / "checkpoints" / "step-00000002.pt"
    rewrite(path, versions=versions() | {"torch": "2.0.0", "gone": "1"})
    run("run", "train.steps=3")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert f"other versions (torch 2.0.0 -> {torch.__version__}, gone 1 -> none)" in said[0]
    assert "train.steps was 2 and is 3: from step 3 on" in said[1]
    assert changed({}, versions()) == ""


@pytest.mark.slow
def test_a_checkpoint_of_the_second_format_is_continued_to_the_same_end(run: Run, tmp_path: Path) -> None:
    whole = run("whole")
    shutil.copytree(whole, tmp_path / "run")
    for step in (4, 6):
        for suffix in (".pt", ".json"):
            (tmp_path / "run" / "checkpoints" / f"step-{step:08d}{suffix}").unlink()
    newer = {"method": None, "backbone": None, "schedule": None, "guards": None, "versions": None}
    rewrite(tmp_path / "run" / "checkpoints" / "step-00000002.pt", format=2, **newer)
    run("run")
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert_same_bits(state_of(tmp_path / "run"), state_of(whole))


def test_a_newer_format_is_refused_and_stays(run: Run, tmp_path: Path) -> None:
    folder = run("run", "train.steps=4") / "checkpoints"
    path = folder / "step-00000004.pt"
    rewrite(path, format=4, marvels={})
    with pytest.raises(UserError, match=r"step-00000004.pt: has format 4, and this version of voxtrast reads 1, 2, 3;"):
        run("run", "train.steps=6")
    assert path.exists()


def test_a_checkpoint_of_another_network_is_told_tensor_by_tensor(run: Run, tmp_path: Path) -> None:
    wide = run("wide", "train.steps=2", "backbone.features=[4,12]")
    (tmp_path / "run").mkdir()
    shutil.copytree(wide / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError) as found:
        run("run")
    said = str(found.value)
    assert "\n" not in said
    assert "step 2 is of another run (backbone.features [4, 12] where this run has [4, 8]; of " in said
    assert "of another shape: " in said
    assert "(12,) for (8,)" in said
    path = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    model = torch.load(path, weights_only=True)["model"]
    gone = next(iter(model))
    rewrite(path, method="cover", model={"queue": torch.ones(3)} | {k: v for k, v in model.items() if k != gone})
    with pytest.raises(UserError, match=f"method cover where .* 1 missing: {gone}; 1 unexpected: queue; .* for "):
        run("run")


def test_the_report_of_a_comparison_counts_every_kind() -> None:
    expected, found = {"a": (1,), "b": (2,), "c": (3,)}, {"a": (1,), "b": (9,), "d": (4,)}
    assert resuming.compare(expected, found) == [
        "of 3 tensors 1 fit", "1 missing: c", "1 unexpected: d", "1 of another shape: b (9,) for (2,)"
    ]  # fmt: skip
    assert resuming.compare(expected, expected) == []


def test_a_damaged_newest_falls_back_loudly_and_to_the_same_end(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole = run("whole")
    shutil.copytree(whole, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000006.pt").write_bytes(b"cut")
    (folder / ".step-00000006.pt.7.partial").write_bytes(b"left by a kill")
    (folder / "step-00000004.json").write_text('{"step": 4')
    run("run")
    said = capsys.readouterr().err
    assert "skipped: " in said
    assert "step-00000006.pt: its content does not match" in said
    assert "continuing from step 2, 2 checkpoint(s) before the newest" in said
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert_same_bits(state_of(tmp_path / "run"), state_of(whole))
    assert load_latest(folder)[1] == []


@pytest.mark.parametrize(
    "name", ["stand_in"] + [pytest.param(each, marks=pytest.mark.slow) for each in recipe_names() if "tiny" in each]
)
def test_nothing_in_a_run_draws_from_the_processs_own_generators(
    name: str, stand_in: None, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a resume would have to bring their states back on every rank."""
    ordinary, before, after = Monitor.__enter__, [], []

    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())  # noqa: NPY002

    monkeypatch.setattr(Monitor, "__enter__", lambda monitor: before.append(states()) or ordinary(monitor))
    monkeypatch.setattr(Saver, "finish", lambda saver: after.append(states()))
    adversary = ("method.adversarial_weight=0.1",) if name == "stand_in" else ()
    words = [f"data={tiny_store}", f"output={tmp_path / 'run'}", "train.steps=4", "checkpoint.every=100", *adversary]
    few = ["validation.fraction=0.34", "loader.threads=1", "device=cpu"]
    pretrain(load_config(str(recipe(tmp_path)) if name == "stand_in" else name, [*words, *few]))
    assert len(before) == 1
    assert before[0] == after[-1]


def test_a_wrong_number_to_keep_is_named(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep: expected a finite number, more than 0, got 0"):
        load_config(str(recipe(tmp_path)), ["checkpoint.keep=0"])


def test_the_checksum_taken_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, small_state(3), keep=1)
    assert described(tmp_path, 3)["sha256"] == file_sha256(path)
    assert load_checkpoint(path).step == 3
