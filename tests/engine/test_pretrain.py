"""Runs through the front door: resume, signals, ranks, and what a user gets to read when something is wrong."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtrast.engine import pretrain as entry
from voxtrast.engine.checkpoint import finished_checkpoints, load_checkpoint
from voxtrast.engine.config import ScheduleConfig, load_config, read_config
from voxtrast.engine.deepspeed import deepspeed_json
from voxtrast.engine.errors import UserError
from voxtrast.engine.rates import rate_factor
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import load_weights

SETTINGS = [
    "backbone.features=[8,16,16]", "backbone.encoder_blocks=[1]", "backbone.decoder_blocks=[1]", "method.units=[2,1,1]",
    "method.radius=1", "views.crop=[16,16,16]", "views.affine.translation_voxels=1", "views.affine.rotation_degrees=5",
    "method.max_unreachable=1", "train.global_batch=4", "optimizer.learning_rate=0.001", "schedule.warmup_steps=0",
    "validation.every=15", "validation.batches=1", "loader.threads=1", "train.threads=1", "device=cpu",
]  # fmt: skip


def command(store: Path, run: Path, *words: str, launcher: tuple[str, ...] = ()) -> list[str]:
    start = launcher or (sys.executable, "-m", "voxtrast.engine.pretrain")
    return [*start, "cover-tiny", f"data={store}", f"output={run}", *SETTINGS, *words]


def pretrain(store: Path, run: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(store, run, *words, launcher=launcher),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """As `pretrain`, in this process: for runs that are refused or short."""
    monkeypatch.setattr(entry, "stop_processes", lambda: None)  # the next run goes on with the group
    threads = torch.get_num_threads()

    def start(store: Path, run: Path, *words: str) -> subprocess.CompletedProcess[str]:
        arguments = command(store, run, *words)[3:]
        return subprocess.CompletedProcess(arguments, entry.main(arguments), "", capsys.readouterr().err)

    yield start
    torch.set_num_threads(threads)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def newest_model(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(finished_checkpoints(run / "checkpoints")[-1][1]).model


def two_ranks() -> tuple[str, ...]:
    launcher = Path(sys.executable).parent / "deepspeed"
    return (str(launcher), "--num_accelerators", "2", "--master_port", str(29500 + os.getpid() % 1000),
            "--module", "voxtrast.engine.pretrain")  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = pretrain(tiny_store, run, "train.steps=30", "checkpoint.every=3")
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_what_the_documentation_says(uninterrupted: Path) -> None:
    assert {path.name for path in uninterrupted.iterdir()} >= {"config.yaml", "log.jsonl", "checkpoints",
                                                              "weights.safetensors", "tensorboard"}  # fmt: skip
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    wanted = {"loss/vector", "loss/consistency", "learning_rate", "samples_per_second", "data_wait", "memory_mb",
              "monitor/displacement_error", "monitor/zero_error", "monitor/unreachable_fraction"}  # fmt: skip
    assert set(lines[0]) >= wanted
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/vector"] + lines[0]["loss/consistency"], rel=1e-6)
    held = [json.loads(line) for line in (uninterrupted / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in held] == [0, 15, 30]
    assert set(held[0]) >= {"loss", "vector", "consistency", "displacement_error", "zero_error"}
    tensors, description = load_weights(uninterrupted / "weights.safetensors")
    assert description["method"] == "cover"
    assert description["step"] == 30
    model = newest_model(uninterrupted)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model[f"backbone.network.{name}"])


@pytest.mark.slow  # test_kills has kills within a save for everybody
def test_killed_at_any_moment_and_resumed_the_losses_are_the_same_bit_for_bit(
    uninterrupted: Path, tiny_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = command(tiny_store, run, "train.steps=30", "checkpoint.every=3")
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "log.jsonl").exists() and len(losses(run)) >= 5:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 0.1')  # what a kill within a write leaves
    done = pretrain(tiny_store, run, "train.steps=30", "checkpoint.every=3")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(uninterrupted)
    resumed, whole = newest_model(run), newest_model(uninterrupted)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_says_so_and_continues_later(
    number: signal.Signals, uninterrupted: Path, tiny_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = command(tiny_store, run, "train.steps=30", "checkpoint.every=100")
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((run / "log.jsonl").exists() and losses(run)):
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert f"stopped by {number.name} after step" in stderr
    assert "Traceback" not in stderr
    saved = finished_checkpoints(run / "checkpoints")
    assert [step for step, _ in saved] == [len(losses(run))]
    done = pretrain(tiny_store, run, "train.steps=30", "checkpoint.every=100")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(uninterrupted)


def assert_same_training(run: Path, reference: Path) -> None:
    """The same losses, and weights apart by less than a hundredth of the way that they went.

    Not closer: where rounding takes a point into the next cell or a voxel to the other side of a leaky ReLU, a gradient
    jumps, and Adam makes full steps of gradients that are rounding alone. A rank or a moment that is left out is far
    outside of both.
    """
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)
    start = dict(build_method(read_config(reference / "config.yaml")).named_parameters())
    ours, theirs = newest_model(run), newest_model(reference)
    apart = torch.stack([(ours[name] - theirs[name]).norm() for name in start]).norm()
    way = torch.stack([(theirs[name] - start[name].detach()).norm() for name in start]).norm()
    assert apart < 1e-2 * way


@pytest.mark.slow  # test_zero_stages has two ranks for everybody
@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_equal_one_process(stage: int, tiny_store: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert pretrain(tiny_store, alone, "train.steps=5").returncode == 0
    done = pretrain(tiny_store, together, "train.steps=5", f"deepspeed.zero_stage={stage}", launcher=two_ranks())
    assert done.returncode == 0, done.stderr
    assert_same_training(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_of_two_ranks_continues_on_one_and_back(stage: int, tiny_store: Path, tmp_path: Path) -> None:
    words = ("schedule.name=constant", f"deepspeed.zero_stage={stage}")  # a cosine would be that of a shortened run
    changing, constant = tmp_path / "changing", tmp_path / "constant"
    for steps, launcher in ((2, two_ranks()), (4, ()), (6, two_ranks())):
        process = pretrain(tiny_store, changing, f"train.steps={steps}", *words, launcher=launcher)
        assert process.returncode == 0, process.stderr
    assert pretrain(tiny_store, constant, "train.steps=6", "schedule.name=constant").returncode == 0
    assert_same_training(changing, constant)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("train.accumulation=2",), ("train.accumulation=4",)])
def test_accumulation_equals_the_whole_batch(words: tuple[str, ...], tiny_store: Path, tmp_path: Path) -> None:
    assert pretrain(tiny_store, tmp_path / "whole", "train.steps=5").returncode == 0
    assert pretrain(tiny_store, tmp_path / "parts", "train.steps=5", *words).returncode == 0
    assert_same_training(tmp_path / "parts", tmp_path / "whole")


def test_the_moving_average_is_what_is_exported(tiny_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = pretrain(tiny_store, run, "train.steps=2", "train.ema_decay=0.5", "train.autocast=bfloat16")
    assert done.returncode == 0, done.stderr
    state = load_checkpoint(finished_checkpoints(run / "checkpoints")[-1][1])
    tensors, _ = load_weights(run / "weights.safetensors")
    name = "decoder.stages.1.convs.0.conv.weight"
    assert torch.equal(tensors[name], state.average[f"backbone.network.{name}"])
    assert not torch.equal(tensors[name], state.model[f"backbone.network.{name}"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("data=nowhere",), "nowhere"),
        (("views.crop=[128,128,128]",), "crop"),
        (("method.max_unreachable=0.001", "views.affine.translation_voxels=20", "views.crop=[32,32,32]"), "reach"),
        (("optimizer.name=apex_fused_adam",), "apex"),
        (("deepspeed.extra.gradient_accumulation_steps=2",), "train.accumulation"),
        (("train.global_batch=3", "train.accumulation=2"), "multiple of 2"),
        pytest.param(("device=cuda",), "CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
    ],
)
def test_a_mistake_is_one_clear_line(
    words: tuple[str, ...], named: str, here: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    done = here(tiny_store, tmp_path / "run", "train.steps=1", *words)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, done.stderr
    assert named in errors[0]
    assert "Traceback" not in done.stderr


def test_a_folder_with_another_run_is_refused_until_it_is_the_same_run(
    uninterrupted: Path, here: Callable[..., Any], tiny_store: Path
) -> None:
    for words, named in ((("seed=5",), "seed: 0 -> 5"), (("resume=never",), "resume")):
        done = here(tiny_store, uninterrupted, "train.steps=30", "checkpoint.every=3", *words)
        assert done.returncode == 2
        assert named in done.stderr
    (uninterrupted / "weights.safetensors").unlink()
    done = here(tiny_store, uninterrupted, "train.steps=30", "checkpoint.every=3")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert load_weights(uninterrupted / "weights.safetensors")[1]["step"] == 30


def test_a_run_refused_before_its_first_checkpoint_begins_again_with_other_settings(
    here: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refused = here(tiny_store, run, "train.steps=1", "views.affine.translation_voxels=60", "method.max_unreachable=0")
    assert refused.returncode == 2
    assert (run / "config.yaml").exists()
    assert here(tiny_store, run, "train.steps=1").returncode == 0


@pytest.mark.parametrize("on_error", ["raise", "substitute"])
def test_a_volume_that_changed_is_found_by_its_checksum(
    on_error: str, here: Callable[..., Any], tiny_store: Path, tmp_path: Path
) -> None:
    volume = sorted((tiny_store / "volumes").iterdir())[2]
    content = volume.read_bytes()
    try:
        volume.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = here(tiny_store, tmp_path / "run", "train.steps=1", f"loader.on_error={on_error}")
    finally:
        volume.write_bytes(content)
    assert done.returncode == (2 if on_error == "raise" else 0), done.stderr
    assert volume.name in done.stderr
    assert done.stderr.count("left out:") == (on_error == "substitute")
    assert "Traceback" not in done.stderr


def test_deepspeeds_json_always_says_how_gradients_are_clipped(tmp_path: Path) -> None:
    words = ["data=store", "output=run", "train.global_batch=8", "train.accumulation=2"]
    settings = deepspeed_json(load_config("cover-tiny", [*words, "optimizer.gradient_clip=0"]), ranks=2)
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_micro_batch_size_per_gpu"] == 2
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "steps_per_print": 7}')
    words += [f"deepspeed.config_file={file}", "deepspeed.extra.steps_per_print=9"]
    merged = deepspeed_json(load_config("cover-tiny", words), ranks=1)
    assert merged["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 1000}
    assert merged["steps_per_print"] == 9
    with pytest.raises(UserError, match="multiple of 6"):
        deepspeed_json(load_config("cover-tiny", words), ranks=3)


def test_the_schedule_warms_up_and_falls_to_its_end() -> None:
    cosine = ScheduleConfig("cosine", warmup_steps=10, final_fraction=0.1)
    factors = [rate_factor(cosine, step, 110) for step in range(111)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert rate_factor(ScheduleConfig("constant", warmup_steps=0), 5, 10) == 1.0
