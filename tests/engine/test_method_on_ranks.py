"""A method with a bank, a twin, an exchange and an adversary on two ranks, and what is refused before that."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_results import assert_close, assert_same_bits, plain_loop, state_of
from stand_in import STAGES, StandIn, recipe
from torch import nn

from voxtrast.engine.checks import check_method
from voxtrast.engine.config import load_config, read_config
from voxtrast.engine.data.store import Case, Store
from voxtrast.engine.deepspeed import synchronise_batch_norm
from voxtrast.engine.errors import UserError
from voxtrast.engine.ranks import Ranks
from voxtrast.engine.runs import build_method


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("deepspeed.zero_stage=0", "train.accumulation=2"), ("deepspeed.zero_stage=1", "train.ema_decay=0.5")]
)
def test_two_ranks_and_their_micro_batches_give_bank_twin_critic_and_losses_of_one_process(
    words: tuple[str, ...], stand_in: None, tiny_store: Path, tmp_path: Path
) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launcher += ["--master_port", str(30500 + os.getpid() % 1000), str(Path(__file__).with_name("stand_in.py"))]
    run = tmp_path / "run"
    # Adam would make full steps of gradients that are rounding alone.
    settings = [f"data={tiny_store}", f"output={run}", "optimizer.name=sgd", *words]
    command = [*launcher, str(recipe(tmp_path, STAGES)), *settings]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert_close(run, *plain_loop(read_config(run / "config.yaml")))


def refuse(words: list[str], tmp_path: Path, size: int = 1, device: str = "cpu", cases: Any = ()) -> None:
    config = load_config(str(recipe(tmp_path)), words)
    check_method(build_method(config), config, Ranks(0, size, 0, torch.device(device)), cases or [CASE])


CASE = Case.__new__(Case)
object.__setattr__(CASE, "shape", (40, 40, 40))


@pytest.mark.parametrize(
    ("words", "size", "device", "named"),
    [
        (["method.least_batch=5"], 1, "cpu", "method.least_batch: 5 .* use train.global_batch=5"),
        (["stages=[{name: a, global_batch: 8}, {name: b, global_batch: 2}]", "method.least_batch=3"], 1, "cpu",
         "least_batch: 3 is more than the 2"),
        (["views.crop=[48,16,16]"], 1, "cpu", "views.crop: 48 is more than the smallest volume"),
        (["backbone.norm=batch"], 2, "cpu", r"backbone\.norm: batch norm \(backbone.*SyncBatchNorm.*norm=instance"),
        (["backbone.norm=batch", "train.accumulation=2"], 1, "cpu", r"backbone\.norm: .*2 micro.*accumulation=1"),
        (["method.batch_norm=true", "train.accumulation=2"], 1, "cpu", r"stand_in: batch norm \(head.1\).*tion=1"),
        (["method.batch_norm=true"], 2, "cpu", r"stand_in: batch norm \(head.1\).*use a single process"),
        (["backbone.norm=batch"], 4, "cuda", r"2 samples on each rank; use backbone.norm=instance, or .*batch=8"),
        (["backbone.norm=batch", "train.global_batch=1"], 1, "cpu", "at least 2 samples"),
    ],
)  # fmt: skip
def test_a_batch_that_the_method_cannot_learn_from_is_refused(
    words: list[str], size: int, device: str, named: str, stand_in: None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        refuse(words, tmp_path, size, device)


def test_the_batch_of_every_stage_is_judged(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    monkeypatch.setattr(StandIn, "check_training", lambda _, batch, parts: judged.append((batch, parts)))
    stages = "stages=[{name: a}, {name: b, global_batch: 4}, {name: c, global_batch: 16}]"
    refuse([stages, "train.global_batch=32"], tmp_path, 2)
    assert judged == [(4, 2), (16, 2), (32, 2)]


def test_what_fits_is_not_refused(stand_in: None, tmp_path: Path, tiny_store: Path) -> None:
    refuse(["backbone.norm=batch"], tmp_path, 2, "cuda", Store(tiny_store).cases)
    refuse(["method.batch_norm=true"], tmp_path)
    refuse(["train.accumulation=4"], tmp_path, 2, "cpu")


def test_batch_norm_over_ranks_keeps_names_and_tensors(stand_in: None, tmp_path: Path) -> None:
    config = load_config(str(recipe(tmp_path)), ["backbone.norm=batch", "method.batch_norm=true"])
    method = build_method(config)
    assert isinstance(method, StandIn)
    before, trained = method.state_dict(), {id(p) for group in method.parameter_groups(0) for p in group["params"]}
    synchronise_batch_norm(method)
    kinds = {type(module) for module in method.modules()}
    assert nn.SyncBatchNorm in kinds
    assert not kinds & {nn.BatchNorm1d, nn.BatchNorm3d}
    after = method.state_dict()
    assert list(after) == list(before)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert {id(p) for group in method.parameter_groups(0) for p in group["params"]} == trained


@pytest.mark.parametrize("norm", ["backbone.norm=batch", "method.batch_norm=true"])
def test_a_resumed_run_with_batch_norm_is_the_uninterrupted_one(norm: str, run: Any, tmp_path: Path) -> None:
    whole = run("whole", norm, "schedule.name=constant", "train.steps=3")
    run("parts", norm, "schedule.name=constant", "train.steps=2")
    parts = run("parts", norm, "schedule.name=constant", "train.steps=3")
    assert_same_bits(state_of(whole, 3), state_of(parts, 3))
