"""What a run does about losses that are not finite or leap, data that stalls, a full disk, and a limit of time."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from run_results import assert_same_bits, lines_of, plain_loop, state_of, tensors_of
from stand_in import STAGES, Run, StandIn, recipe
from torch import Tensor

from voxtrast.engine.checkpoint import finished_checkpoints, load_latest
from voxtrast.engine.config import GuardsConfig, load_config, read_config
from voxtrast.engine.data.pipeline import OpenVolumes, ViewPipeline
from voxtrast.engine.errors import UserError
from voxtrast.engine.guards import Guards, StalledError, Verdict
from voxtrast.engine.ranks import Ranks
from voxtrast.engine.signals import TO_BE_CONTINUED, Interrupted
from voxtrast.methods import Batch

EVERY_STEP = ("checkpoint.every=1", "train.ema_decay=0.5")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Any:
    """spoil(3, 4) puts a NaN into the last part of the batches of steps 3 and 4 (from 1)."""
    ordinary, steps = ViewPipeline.__next__, set[int]()

    def spoiled(views: ViewPipeline) -> list[Batch]:
        batches = ordinary(views)
        if views.split == "train" and views._step in steps:
            batches[-1]["one"] = batches[-1]["one"].clone()
            batches[-1]["one"][-1, 0, 3, 3, 3] = float("nan")
        return batches

    monkeypatch.setattr(ViewPipeline, "__next__", spoiled)
    return steps.update


@pytest.mark.parametrize(
    "words",
    [
        ("deepspeed.zero_stage=0", "method.batch_norm=true"),
        ("deepspeed.zero_stage=1", "train.accumulation=2"),
        pytest.param(("deepspeed.zero_stage=0", "train.accumulation=2"), marks=pytest.mark.slow),
        pytest.param(("deepspeed.zero_stage=1", "optimizer.name=sgd"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(words: tuple[str, ...], run: Run, spoil: Any) -> None:
    spoil([1, 4, 6])
    folder = run("run", *EVERY_STEP, *words, stages=STAGES)
    for bad in (4, 6):  # of stages R and A: the second has the adversary's step
        assert_same_bits(state_of(folder, bad), state_of(folder, bad - 1))
    before, after = dict(tensors_of(state_of(folder, 4))), dict(tensors_of(state_of(folder, 5)))
    moved = {name.split()[0] for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert moved == {"model", "average", "optimizer", "adversary", "adversary_optimizer"}
    lines = lines_of(folder)
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2, 2, 3]
    assert [line["loss"] is None for line in lines] == [True, False, False, True, False, True]
    assert "not finite: loss, loss/discriminative, loss/restorative" in lines[3]["warning"]
    assert "loss/restorative, loss/adversarial, adversary/fake" in lines[5]["warning"]
    assert "warning" not in lines[1]
    state = state_of(folder)
    assert all(tensor.isfinite().all() for _, tensor in tensors_of(state))
    if "method.batch_norm=true" not in words:
        method, losses = plain_loop(read_config(folder / "config.yaml"), without=(0, 3, 5))
        assert [line["loss"] for line in lines if line["loss"] is not None] == pytest.approx(losses, rel=1e-5)
        for name, tensor in method.state_dict().items():
            torch.testing.assert_close(state.model[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_gradients_that_are_not_finite_are_seen_behind_a_finite_loss(
    stage: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = StandIn.forward

    def steep(method: StandIn, batch: Batch, step: int) -> dict[str, Tensor]:
        losses = ordinary(method, batch, step)
        if step == 1 and method.training:
            losses["restorative"] = losses["restorative"] + (0 * method.restore.weight.sum()).sqrt()
        return losses

    monkeypatch.setattr(StandIn, "forward", steep)
    folder = run("run", *EVERY_STEP, "train.steps=3", f"deepspeed.zero_stage={stage}")
    assert lines_of(folder)[1]["loss"] is not None
    assert "not finite: gradients;" in lines_of(folder)[1]["warning"]
    assert_same_bits(state_of(folder, 2), state_of(folder, 1))
    assert not torch.equal(state_of(folder, 3).model["head.0.weight"], state_of(folder, 2).model["head.0.weight"])


def test_too_many_such_steps_in_a_row_end_the_run_with_what_one_needs_to_look_at(
    run: Run, spoil: Any, tmp_path: Path
) -> None:
    spoil([1, 3, 4, 5])
    with pytest.raises(
        UserError, match=r"step 5: not finite: loss, .*gradients, for 3 steps in a row .*dumped"
    ) as found:
        run("run", "checkpoint.every=1")
    folder = tmp_path / "run"
    dump = torch.load(folder / "failed-step-5.pt", weights_only=True)
    assert dump["batches"][0]["one"].isnan().sum() == 1
    assert all(case in str(found.value) for case in dump["batches"][0]["case"])
    assert (dump["step"], dump["losses"]["loss"] != dump["losses"]["loss"]) == (5, True)
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 3, 4, 5]
    state, damaged = load_latest(folder / "checkpoints")
    assert state is not None
    assert (state.step, damaged, state.guards["in_a_row"]) == (4, [], 2)
    run("run", "checkpoint.every=1", "guards.skip_steps=4")
    assert lines_of(folder)[-1]["skipped"] == 4


def test_a_loss_that_leaps_is_said_with_its_cases(tmp_path: Path) -> None:
    guards = Guards(GuardsConfig(spike_factor=10), tmp_path, Ranks(0, 1, 0, torch.device("cpu")), [])
    batches = [{"case": ["a", "b"]}]
    said = [guards.warning(1 + 0.01 * (step % 5), Verdict(), batches) for step in range(40)]
    assert said == [None] * 40
    assert guards.warning(1.1, Verdict(), batches) is None
    leap = guards.warning(3.0, Verdict(), batches)
    assert leap is not None
    assert "the loss 3 is 198 median deviations above 1.02, the median of the last 41; the batch is of a, b" in leap
    again = Guards(GuardsConfig(spike_factor=10), tmp_path, Ranks(0, 1, 0, torch.device("cpu")), [])
    again.load_state(guards.state())
    assert again.warning(3.0, Verdict(), batches) is not None
    again.begin_stage()
    assert again.warning(3.0, Verdict(), batches) is None
    off = Guards(GuardsConfig(spike_factor=0), tmp_path, Ranks(0, 1, 0, torch.device("cpu")), [])
    assert [off.warning(each, Verdict(), batches) for each in [1.0] * 40 + [1e9]] == [None] * 41


def test_data_that_stalls_ends_the_run_with_its_steps_saved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole", "train.steps=12")
    ordinary, stuck, opened = OpenVolumes.open, threading.Event(), []

    def hanging(volumes: OpenVolumes, case: Any) -> Any:
        opened.append(case.id)
        if len(opened) == 40:  # of 4 a step, some steps ahead
            stuck.wait(60)
        return ordinary(volumes, case)

    monkeypatch.setattr(OpenVolumes, "open", hanging)
    words = ("train.steps=12", "checkpoint.every=100", "validation.every=0")
    with pytest.raises(StalledError, match=r"step \d+: no batch for 1 s .*waiting for volumes to be opened:") as found:
        run("run", *words, "guards.data_timeout_seconds=1")
    assert opened[39] in str(found.value)
    stuck.set()
    [(step, _)] = finished_checkpoints(tmp_path / "run" / "checkpoints")
    assert step == len(lines_of(tmp_path / "run")) > 0
    monkeypatch.undo()
    # `undo` has taken the method's name away, too.
    from voxtrast.methods import METHODS

    monkeypatch.setitem(METHODS, "stand_in", StandIn)
    run("run", *words)
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert_same_bits(state_of(tmp_path / "run", 12), state_of(whole, 12))


HANGING = """
import sys, threading
from stand_in import METHODS, StandIn
from voxtrast.engine import pretrain
from voxtrast.engine.data.pipeline import OpenVolumes
ordinary, opened = OpenVolumes.open, []
def hanging(volumes, case):
    opened.append(case)
    if len(opened) > 24:
        threading.Event().wait()
    return ordinary(volumes, case)
OpenVolumes.open = hanging
METHODS["stand_in"] = StandIn
sys.exit(pretrain.main())
"""


SPOILED = """
import os, sys
from stand_in import METHODS, StandIn
from voxtrast.engine import pretrain
from voxtrast.engine.data.pipeline import ViewPipeline
ordinary = ViewPipeline.__next__
def spoiled(views):
    batches = ordinary(views)
    if views.split == "train" and views._step in STEPS and os.environ["RANK"] == "1":
        batches[-1]["one_clean"] = batches[-1]["one_clean"].clone()
        batches[-1]["one_clean"][-1, 0, 3, 3, 3] = float("nan")
    return batches
ViewPipeline.__next__ = spoiled
METHODS["stand_in"] = StandIn
sys.exit(pretrain.main())
"""


def on_two_ranks(script: Path, words: list[str]) -> "subprocess.CompletedProcess[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free.getsockname()[1]}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, str(script), *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_what_one_rank_finds_not_finite_no_rank_takes(
    stage: int, run: Run, spoil: Any, tiny_store: Path, tmp_path: Path
) -> None:
    words = ["checkpoint.every=1", "optimizer.name=sgd", f"deepspeed.zero_stage={stage}"]
    spoil([2, 4, 5])
    alone = run("alone", *words)
    script, together = tmp_path / "spoiled.py", tmp_path / "together"
    script.write_text(f"STEPS = [2, 4, 5]{SPOILED}")
    common = [str(recipe(tmp_path)), f"data={tiny_store}", f"output={together}", *words]
    done = on_two_ranks(script, common)
    assert done.returncode == 0, done.stderr
    assert [line["skipped"] for line in lines_of(together)] == [0, 1, 1, 2, 3, 3]
    assert_same_bits(state_of(together, 5), state_of(together, 3))
    ours, theirs = state_of(together).model, state_of(alone).model
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    script.write_text(f"STEPS = [7, 8, 9]{SPOILED}")
    done = on_two_ranks(script, [*common, "train.steps=12"])
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 2, done.stderr
    for line in errors:
        assert "step 9: not finite: loss, loss/restorative, grad" in line
        assert "The batch is of rank 1: " in line
    assert [file.name for file in together.glob("failed*")] == ["failed-step-9-rank-1.pt"]
    assert torch.load(together / "failed-step-9-rank-1.pt", weights_only=True)["batches"][0]["one_clean"].isnan().any()
    assert "engine/trainer.py" not in done.stderr  # the launcher's own traceback does not count


@pytest.mark.slow
def test_two_ranks_out_of_time_save_after_the_same_step(tiny_store: Path, tmp_path: Path) -> None:
    words = [str(recipe(tmp_path)), f"data={tiny_store}", f"output={tmp_path / 'run'}", "train.max_minutes=0.00001"]
    done = on_two_ranks(Path(__file__).parent / "stand_in.py", words)
    assert done.stderr.count("stopped by train.max_minutes=1e-05 after step 1; the same command continues") == 2
    assert "exitcode  : 75" in done.stderr
    assert [step for step, _ in finished_checkpoints(tmp_path / "run" / "checkpoints")] == [1]


@pytest.mark.slow
def test_a_process_ends_although_its_readers_hang_for_ever(tiny_store: Path, tmp_path: Path) -> None:
    words = [str(recipe(tmp_path)), f"data={tiny_store}", f"output={tmp_path / 'run'}", "train.steps=20"]
    command = [sys.executable, "-c", HANGING, *words, "guards.data_timeout_seconds=2"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", cwd=Path(__file__).parent, timeout=120
    )
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "guards.data_timeout_seconds" in line
    assert "Traceback" not in done.stderr


def test_a_run_out_of_time_saves_and_is_continued_to_the_same_end(run: Run, tmp_path: Path) -> None:
    words = ("checkpoint.every=100", "train.steps=3")
    whole = run("whole", *words)
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped by train.max_minutes=1e-06 after step {step};") as found:
            run("run", *words, "train.max_minutes=0.000001")
        assert found.value.exit_code == TO_BE_CONTINUED == 75
        assert [saved for saved, _ in finished_checkpoints(tmp_path / "run" / "checkpoints")][-1] == step
    run("run", *words, "train.max_minutes=0.000001")  # the last step is the end
    assert lines_of(tmp_path / "run") == lines_of(whole)
    assert_same_bits(state_of(tmp_path / "run", 3), state_of(whole, 3))


def test_a_disk_that_is_nearly_full_stops_the_run_before_the_save(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    ordinary = shutil.disk_usage
    usage = namedtuple("usage", "total used free")

    def nearly_full(path: Any) -> Any:
        if not (folder / "step-00000002.json").exists():
            return ordinary(path)
        size = (folder / "step-00000002.pt").stat().st_size
        return usage(10**9, 10**9 - size, size)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(UserError, match=r"MB are free for .* nothing of step 4 was written, .* that of step 2\. Free"):
        run("run", "checkpoint.every=2")
    assert sorted(file.name for file in folder.iterdir()) == ["step-00000002.json", "step-00000002.pt"]
    monkeypatch.setattr(shutil, "disk_usage", ordinary)
    run("run", "checkpoint.every=2")
    assert_same_bits(state_of(tmp_path / "run"), state_of(run("whole")))


def test_a_folder_that_vanishes_is_one_clear_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = ViewPipeline.__next__

    def removing(views: ViewPipeline) -> Any:
        if views.split == "train" and views._step == 3:
            (tmp_path / "run").rename(tmp_path / "elsewhere")  # at once, whatever is being written into it
        return ordinary(views)

    monkeypatch.setattr(ViewPipeline, "__next__", removing)
    with pytest.raises(UserError, match=r"output: .*run has vanished .* bring it back"):
        run("run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("guards.skip_steps=0", "guards.skip_steps: expected a finite number, more than 0"),
        ("guards.spike_factor=-1", "guards.spike_factor: expected a finite number, 0 or more"),
        ("guards.data_timeout_seconds=-1", "guards.data_timeout_seconds"),
        ("train.max_minutes=-1", "train.max_minutes"),
        ("guards.spike_faktor=1", "did you mean 'guards.spike_factor'"),
    ],
)
def test_a_wrong_setting_is_named(word: str, named: str, stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        load_config(str(recipe(tmp_path)), [word])


def test_the_log_is_json_that_others_read(run: Run, spoil: Any) -> None:
    spoil([2])
    folder = run("run", "train.steps=3")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
