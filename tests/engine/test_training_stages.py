"""Stages: what changes at a boundary, what a plain loop would do, and that a resume anywhere changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_results import assert_close, assert_same_bits, lines_of, plain_loop, state_of
from stand_in import STAGES, Critic, Run, recipe

from voxtrast.engine.checkpoint import load_checkpoint
from voxtrast.engine.config import differences, load_config, read_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import file_sha256
from voxtrast.engine.deepspeed import deepspeed_json
from voxtrast.engine.errors import UserError
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import load_weights

STILL = "stages: [{name: a}, {name: b, learning_rate: 1.0e-30, start: START, terms: {restorative: 1}}]"


@pytest.mark.parametrize("stops", [(2, 4, 5), pytest.param((1, 3), marks=pytest.mark.slow)], ids=str)
def test_a_resume_in_any_stage_or_on_a_boundary_equals_the_uninterrupted_run(
    stops: tuple[int, ...], run: Run, tmp_path: Path
) -> None:
    words = ("checkpoint.every=1", "train.ema_decay=0.5")
    whole = run("whole", *words, stages=STAGES)
    assert "adversary/accuracy" in lines_of(whole)[-1]
    assert "monitor/embedding_std" in lines_of(whole)[-1]
    for taken in stops:
        resumed = tmp_path / f"from{taken}"
        shutil.copytree(whole, resumed)
        for file in (resumed / "checkpoints").iterdir():
            if int(file.stem.removeprefix("step-")) > taken:
                file.unlink()
        run(resumed.name, *words, stages=STAGES)
        assert lines_of(resumed) == lines_of(whole), taken
        assert lines_of(resumed, "validation") == lines_of(whole, "validation"), taken
        assert_same_bits(state_of(resumed), state_of(whole))


@pytest.mark.parametrize(
    "words",
    [
        ("deepspeed.zero_stage=0",),
        ("deepspeed.zero_stage=1",),
        ("deepspeed.zero_stage=1", "optimizer.name=sgd", "train.accumulation=2"),
        pytest.param(("backbone.dimensions=2", "views.crop=[16,16]"), marks=pytest.mark.slow),
        pytest.param(("optimizer.name=sgd", "train.accumulation=4"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_stages_are_those_of_a_plain_loop_and_what_no_loss_reaches_stays(
    words: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    folder = run("run", "schedule.warmup_steps=1", *words, stages=STAGES)
    config = read_config(folder / "config.yaml")
    method, losses = plain_loop(config)
    assert_close(folder, method, losses)
    start, first = build_method(config).state_dict(), state_of(folder, 2).model
    decoder = [name for name in start if name.startswith(("backbone.network.decoder.stages", "restore"))]
    assert decoder
    assert all(torch.equal(first[name], start[name]) for name in decoder)  # neither decayed nor moved in stage D
    head = [name for name in start if name.startswith("head")]
    before, after = state_of(folder, 4).model, state_of(folder, 6).model
    assert all(torch.equal(before[name], after[name]) for name in head)  # not by earlier moments in stage A either
    assert not all(torch.equal(before[name], after[name]) for name in decoder)


def test_the_log_says_the_stage_its_rate_and_its_batch(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("run", stages=STAGES)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["stage"] for line in lines] == ["D", "D", "R", "R", "A", "A"]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.005, 0.003, 0.0015, 0.01, 0.005])
    assert [sum(key.startswith("loss/") for key in line) for line in lines] == [1, 1, 2, 2, 2, 2]
    assert all(("adversary/real" in line) == (line["stage"] == "A") for line in lines)
    said = capsys.readouterr().err
    assert "step 1: stage 'D' (1 of 3), 2 steps of 8 samples, learning rate 0.01, terms discriminative;" in said
    assert "step 5: stage 'A' (3 of 3), 2 steps of 4 samples" in said
    assert "optimizer: kept" in said
    plain = run("plain", "train.steps=1")
    assert "stage" not in lines_of(plain)[0]
    assert "stage '" not in capsys.readouterr().err


def test_a_stage_that_starts_initially_forgets_all_that_came_before(run: Run) -> None:
    folder = run("run", stages=STILL.replace("START", "initial"))
    start = build_method(read_config(folder / "config.yaml"))
    state, before = state_of(folder), state_of(folder, 3 - 1)
    for name, _ in start.named_parameters():
        if not name.startswith("twin."):
            torch.testing.assert_close(state.model[name], start.state_dict()[name], rtol=0, atol=1e-25)
    assert not torch.equal(before.model["head.0.weight"], start.state_dict()["head.0.weight"])
    assert state.model["bank.pushed"].item() == 3 * 4  # the keys of the second stage's three steps


def test_a_stage_that_starts_from_a_file_takes_its_tensors_alone(run: Run, tmp_path: Path) -> None:
    other = run("other", "seed=7", "train.steps=2")
    words = ("train.ema_decay=0.5", "checkpoint.every=1")
    folder = run("run", *words, stages=STILL.replace("START", str(other)))
    tensors, _ = load_weights(other / "weights.safetensors")
    state, before = state_of(folder), state_of(folder, 3)
    for name, tensor in tensors.items():
        assert torch.equal(state.model[f"backbone.network.{name}"], tensor)
    assert torch.equal(state.model["head.0.weight"], before.model["head.0.weight"])
    averaged, _ = load_weights(folder / "weights.safetensors")  # the average began anew from the file's
    assert all(torch.equal(averaged[name], tensor) for name, tensor in tensors.items())


def test_tensors_from_a_file_count_as_trained_also_after_a_resume(run: Run) -> None:
    other = run("other", "train.steps=1")
    stages, words = STILL.replace("START", str(other)), ("method.decoder=frozen", "checkpoint.every=1")
    words += ("method.restorative_weight=0",)
    stages = stages.replace("restorative", "discriminative")
    folder = run("run", *words, stages=stages)
    assert load_weights(folder / "weights.safetensors")[1]["untrained"] == []
    for file in (folder / "checkpoints").glob("step-00000006*"):
        file.unlink()
    shutil.rmtree(other)
    run("run", *words, stages=stages)
    assert load_weights(folder / "weights.safetensors")[1]["untrained"] == []


@pytest.mark.parametrize("what", ["missing", "wider"])
def test_a_file_to_start_from_is_looked_at_before_the_first_step(what: str, run: Run, tmp_path: Path) -> None:
    if what == "wider":
        run("wider", "train.steps=1", "backbone.features=[4,12]")
    with pytest.raises(UserError, match=r"stages\[1\]\.start: .*(no such weights|shape).*start from previous or init"):
        run("run", stages=STILL.replace("START", str(tmp_path / what)))
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ("stages: [{name: a, term: {restorative: 1}}]", r"'stages\[0\]\.term' is unknown; did you mean 'terms'"),
        ("stages: [{share: 2, name: a}, {shar: 1}]", r"'stages\[1\]\.shar' is unknown; did you mean 'share'"),
        ("stages: {name: a}", "stages: expected a list"),
        ("stages: [3]", "stages: expected a list"),
        ("stages: null", "stages: expected a list"),
        ("stages: [{name: a, share: 0}]", r"stages\[0\]\.share: expected a finite number, more than 0"),
        ("stages: [{name: a, global_batch: 0}]", r"stages\[0\]\.global_batch"),
        ("stages: [{name: a, learning_rate: -1}]", r"stages\[0\]\.learning_rate"),
        ("stages: [{name: a}, {name: a}]", "same name"),
        ("stages: [{name: a, terms: {restore: 1}}]", r"stages\[0\]\.terms: 'restore' is no term.*restorative"),
        ("stages: [{name: a, terms: {restorative: -1}}]", r"stages\[0\]\.terms\.restorative: .*got -1"),
        ("stages: [{name: a, share: 100}, {name: b}]", r"stages\[1\]\.share: .* none of train.steps=6"),
    ],
)
def test_a_wrong_stage_is_refused_by_its_name(stages: str, named: str, stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        build_method(load_config(str(recipe(tmp_path, stages))))


def test_a_batch_of_a_stage_that_cannot_be_dealt_is_refused(stand_in: None, tmp_path: Path) -> None:
    config = load_config(str(recipe(tmp_path, STAGES)), ["train.accumulation=2"])
    assert deepspeed_json(config, ranks=2)["gradient_accumulation_steps"] == 2
    config.stages[1].global_batch = 6
    with pytest.raises(UserError, match=r"stages\[1\]\.global_batch: 6 samples .* 2 ranks .* multiple of 4"):
        deepspeed_json(config, ranks=2)


def test_the_steps_of_a_run_with_stages_may_not_change(stand_in: None, tmp_path: Path) -> None:
    for stages, expected in (
        (STAGES, ["train.steps: 6 -> 9, which would move the boundaries of the stages"]),
        ("", []),
    ):
        file = str(recipe(tmp_path, stages))
        assert differences(load_config(file), load_config(file, ["train.steps=9"])) == expected


def test_looking_at_the_held_aside_changes_nothing(run: Run) -> None:
    looking = run("looking", "validation.every=1", stages=STAGES)
    blind = run("blind", "validation.every=0", stages=STAGES)
    assert len(lines_of(looking, "validation")) == 7
    assert lines_of(looking) == lines_of(blind)
    assert_same_bits(state_of(looking), state_of(blind))


def test_the_adversary_moves_in_its_stage_alone(run: Run) -> None:
    folder = run("run", stages=STAGES)
    start = Critic(3).state_dict()
    before, after = state_of(folder, 4), state_of(folder, 6)
    assert set(before.adversary) == set(start)
    assert not before.adversary_optimizer
    assert all(not torch.equal(after.adversary[name], before.adversary[name]) for name in start)
    fresh = build_method(read_config(folder / "config.yaml")).adversary
    assert fresh is not None
    assert all(torch.equal(before.adversary[name], tensor) for name, tensor in fresh.state_dict().items())
    assert not any(name.startswith("adversary") for name in after.model)


def test_an_adversary_that_is_switched_off_and_on_reproduces(run: Run) -> None:
    off = run("off", "method.adversarial_weight=0", "train.steps=3")
    on = run("on", "method.adversarial_weight=0.1", "train.steps=3")
    again = run("again", "method.adversarial_weight=0.1", "train.steps=3")
    assert_same_bits(state_of(on, 3), state_of(again, 3))
    assert lines_of(on) == lines_of(again)
    assert not any("adversary/real" in line for line in lines_of(off))
    assert not state_of(off, 3).adversary_optimizer
    assert lines_of(on)[-1]["loss"] != lines_of(off)[-1]["loss"]


def test_a_checkpoint_of_the_first_format_is_read(run: Run) -> None:
    folder = run("run", "train.steps=2", "checkpoint.keep=1")
    [path] = (folder / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    old = {key: content[key] for key in ("step", "model", "optimizer", "average")}
    torch.save({"format": 1, **old}, path)
    description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    path.with_suffix(".json").write_text(json.dumps(description | {"sha256": file_sha256(path)}))
    state = load_checkpoint(path)
    assert (state.step, state.adversary, state.loaded) == (2, {}, [])


def test_a_volume_lost_at_a_boundary_costs_no_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = ViewPipeline.__next__

    def lost(views: ViewPipeline) -> Any:
        if views.split == "train" and views._step == 2 and not lost_once:
            lost_once.append(2)
            raise UserError("volume lost")
        return ordinary(views)

    lost_once: list[int] = []
    monkeypatch.setattr(ViewPipeline, "__next__", lost)
    with pytest.raises(UserError, match="volume lost"):
        run("run", "checkpoint.every=100", stages=STAGES)
    assert [file.name for file in (tmp_path / "run" / "checkpoints").glob("*.pt")] == ["step-00000002.pt"]
    run("run", "checkpoint.every=100", stages=STAGES)
    assert_same_bits(state_of(tmp_path / "run"), state_of(run("whole", stages=STAGES)))


def test_the_gradient_penalty_is_refused_under_more_than_zero_1(stand_in: None, tmp_path: Path) -> None:
    words = ["method.adversary=wgan_gp", "deepspeed.zero_stage=2"]
    with pytest.raises(
        UserError, match=r"method\.adversary=wgan_gp with .* penalty needs .* deepspeed\.zero_stage to 0 or 1"
    ):
        load_config(str(recipe(tmp_path)), words)


def test_a_warning_is_said_and_stands_in_its_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("run", "method.warn=true", "train.steps=3")
    lines = lines_of(folder)
    assert ["warning" in line for line in lines] == [False, True, False]
    wanted = f"a loss of {lines[1]['loss']:.3g}; lower it"
    assert lines[1]["warning"] == wanted
    assert f"warning: step 2: {wanted}" in capsys.readouterr().err
