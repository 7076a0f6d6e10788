"""ZeRO 0 to 3 and offload compute what one process computes: steps, what follows them, what a run continues from."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from many_runs import run_pool
from run_results import assert_close, assert_same_bits, forget_after, lines_of, plain_loop, state_of, tensors_of
from small_recipes import COMMON, CUT, METHOD, OPTIMIZER, STAGE, apart, differences
from stand_in import STAGES, Run, StandIn, recipe
from torch import nn

from voxtrast.engine.checkpoint import State
from voxtrast.engine.config import load_config, read_config
from voxtrast.engine.deepspeed import deepspeed_json, synchronise_batch_norm
from voxtrast.engine.errors import UserError
from voxtrast.engine.weights import load_weights
from voxtrast.methods import METHODS, recipe_names
from voxtrast.methods.parts.momentum_twin import MomentumTwin

OFFLOAD = "deepspeed.offload_optimizer=cpu"
# Adam would make full steps of gradients that are rounding alone.
SGD = ("optimizer.name=sgd", "schedule.warmup_steps=1")


CLIP = ("optimizer.gradient_clip=0.05", "optimizer.learning_rate=0.5")  # steps long enough to show a wrong norm


@pytest.mark.parametrize(
    "words",
    [
        (*STAGE[3], *CLIP, "train.accumulation=2"),
        (*STAGE[2], OFFLOAD, *CLIP),
        pytest.param((*STAGE[2], "train.accumulation=2"), marks=pytest.mark.slow),
        pytest.param((*STAGE[3], OFFLOAD), marks=pytest.mark.slow),
        pytest.param((*STAGE[0], *CLIP), marks=pytest.mark.slow),
        pytest.param((*STAGE[1], *CLIP, OFFLOAD), marks=pytest.mark.slow),
        pytest.param((*STAGE[2], *CLIP, OFFLOAD, "train.accumulation=2"), marks=pytest.mark.slow),
        pytest.param((*STAGE[3], *CLIP, OFFLOAD, "train.accumulation=2"), marks=pytest.mark.slow),
        pytest.param(("deepspeed.zero_stage=3",), marks=pytest.mark.slow),  # small parameters stay whole
    ],
    ids=" ".join,
)
def test_one_rank_under_zero_is_a_plain_loop_with_what_no_loss_reaches_left_alone(
    words: tuple[str, ...], run: Run
) -> None:
    folder = run("run", *SGD, *words, stages=STAGES)
    assert_close(folder, *plain_loop(read_config(folder / "config.yaml")))


def test_a_run_goes_on_under_any_other_stage(run: Run, tmp_path: Path) -> None:
    words = ("checkpoint.every=1", "train.ema_decay=0.5")
    whole = run("whole", *words, *STAGE[0], stages=STAGES)
    changing = tmp_path / "changing"
    shutil.copytree(whole, changing)
    for taken, stage in ((1, 3), (3, 1), (4, 2), (5, 0)):
        forget_after(changing, taken)
        run("changing", *words, *STAGE[stage], stages=STAGES)
        assert_nearly_same(state_of(changing), state_of(whole), 1e-6)
    assert lines_of(changing)[-1]["loss"] == pytest.approx(lines_of(whole)[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_goes_on_under_its_own_stage_bit_for_bit(stage: int, run: Run, tmp_path: Path) -> None:
    words = ("checkpoint.every=1", "train.ema_decay=0.5", OFFLOAD, *STAGE[stage])
    whole = run("whole", *words, stages=STAGES)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    forget_after(resumed, 4)
    run("resumed", *words, stages=STAGES)
    assert lines_of(resumed) == lines_of(whole)
    assert_same_bits(state_of(resumed), state_of(whole))


@pytest.mark.parametrize("start", ["other", pytest.param("initial", marks=pytest.mark.slow)])
def test_a_stage_of_a_training_begins_under_zero_3_as_without_it(start: str, run: Run, tmp_path: Path) -> None:
    if start == "other":
        run("other", "seed=7", "train.steps=1")
    where = "initial" if start == "initial" else str(tmp_path / "other")
    stages = f"stages: [{{name: a}}, {{name: b, start: {where}, fresh_optimizer: false}}]"
    words = (*SGD, "train.ema_decay=0.5", "method.adversarial_weight=0.1", "train.steps=4")
    plain, cut = run("plain", *words, *STAGE[0], stages=stages), run("cut", *words, *STAGE[3], stages=stages)
    assert_nearly_same(state_of(cut, 4), state_of(plain, 4), 1e-6)
    (ours, about), (theirs, _) = (load_weights(each / "weights.safetensors") for each in (cut, plain))
    assert about["untrained"] == []
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


RANKS = (
    (*STAGE[2], OFFLOAD, "train.accumulation=2", "train.ema_decay=0.5"),
    (*STAGE[3], f"{CUT[:-1]}40", "train.ema_decay=0.5"),  # biases and norms whole, the others in parts
)


def test_two_ranks_under_zero_2_and_3_give_bank_twin_critic_average_and_losses_of_one_process(
    tiny_store: Path, run: Run, tmp_path: Path
) -> None:
    file = str(recipe(tmp_path, STAGES))
    folders = [tmp_path / f"ranks{index}" for index in range(len(RANKS))]
    ends = run_pool(
        2,
        [(file, f"data={tiny_store}", f"output={folder}", *SGD, *words)
         for folder, words in zip(folders, RANKS, strict=True)],
        tmp_path / "pool",
    )  # fmt: skip
    assert ends == ["", ""]
    alone = run("alone", *SGD, "train.ema_decay=0.5", stages=STAGES)
    for folder in folders:
        assert_close(folder, *plain_loop(read_config(folder / "config.yaml")))
        assert_nearly_same(state_of(folder), state_of(alone), 1e-5)


@pytest.mark.slow
def test_a_run_goes_on_over_changes_of_stage_and_ranks(tiny_store: Path, run: Run, tmp_path: Path) -> None:
    words = (*SGD, "checkpoint.every=1", "train.ema_decay=0.5")
    whole = run("whole", *words, *STAGE[0], stages=STAGES)
    changing, file = tmp_path / "changing", str(recipe(tmp_path, STAGES))
    for hop, (taken, ranks, stage) in enumerate(((0, 2, 0), (1, 1, 3), (2, 2, 1), (3, 1, 2), (4, 2, 3), (5, 4, 0))):
        if taken:
            forget_after(changing, taken)
        settings = (f"data={tiny_store}", f"output={changing}", *words, *STAGE[stage])
        assert run_pool(ranks, [(file, *settings)], tmp_path / f"pool{hop}") == [""]
        assert_nearly_same(state_of(changing), state_of(whole), 1e-5)
    again = tmp_path / "again"  # where ranks and stage stay, to the last bit
    for stage in (2, 3):
        settings = (f"data={tiny_store}", *words, *STAGE[stage])
        shutil.rmtree(again, ignore_errors=True)
        run_pool(2, [(file, f"output={again}", *settings)], tmp_path / "pool")
        resumed = tmp_path / f"resumed{stage}"
        shutil.copytree(again, resumed)
        forget_after(resumed, 3)
        run_pool(2, [(file, f"output={resumed}", *settings)], tmp_path / "pool")
        assert lines_of(resumed) == lines_of(again)
        assert_same_bits(state_of(resumed), state_of(again))


def assert_nearly_same(one: State, other: State, tolerance: float) -> None:
    first, second = dict(tensors_of(one)), dict(tensors_of(other))
    names = {name for name in first if not name.startswith(("optimizer", "adversary_optimizer"))}
    assert names == {name for name in second if not name.startswith(("optimizer", "adversary_optimizer"))}
    different = {name: apart(first[name], second[name]) for name in names}
    assert max(different.values()) < tolerance, max(different.items(), key=lambda item: item[1])


HEADING = (
    f"{'method':8}{'optimizer':10}{'ranks':>6}{'ZeRO':>6}{'losses':>10}{'parameters':>12}{'of the way':>12}  tensor"
)


@pytest.mark.slow
def test_table_of_ranks_stages_and_methods(tiny_store: Path, tmp_path: Path) -> None:
    """With -s it is printed: how far ten steps are from those of one process under ZeRO 0.

    Largest relative difference of the losses; of all parameters, |a - b| / |b|; the same as a share of the way that
    they went, |a - b| / |b - start|, which a gradient that lacks a part would show at once; and of the tensor that is
    furthest for itself. With the usual eps Adam takes full steps of gradients that are rounding alone (biases before a
    norm), and the next losses see them: it is shown beside and not judged.
    """
    cells = {}
    for ranks in (1, 2, 4):
        runs = {
            (method, optimizer, ranks, stage): (*METHOD[method], *COMMON, *OPTIMIZER[optimizer], *STAGE[stage])
            for method in METHOD for optimizer in OPTIMIZER for stage in range(4)
        }  # fmt: skip
        folders = {cell: tmp_path / "-".join(map(str, cell)) for cell in runs}
        plan = [(*words, f"data={tiny_store}", f"output={folders[cell]}") for cell, words in runs.items()]
        assert run_pool(ranks, plan, tmp_path / f"pool{ranks}", timeout=3000) == [""] * len(plan)
        for cell, folder in folders.items():
            reference = tmp_path / "-".join(map(str, (*cell[:2], 1, 0)))
            cells[cell] = differences(folder, reference)
    print(f"\n{HEADING}")
    for (method, optimizer, ranks, stage), (losses, parameters, way, furthest, name) in sorted(cells.items()):
        found = f"{losses:10.1e}{parameters:12.1e}{way:12.1e}{furthest:9.1e} {name}"
        print(f"{method:8}{optimizer:10}{ranks:6}{stage:6}{found}")
    for cell, (losses, parameters, way, _, _) in cells.items():
        # COVER's warps have kinks: a point that rounding takes into the next cell of the grid changes a gradient by
        # more than rounding, and Adam's first steps are as long for a small gradient as for a large one.
        if cell[1] == "sgd" or (cell[1] == "eps" and cell[0] != "cover"):
            assert losses < 1e-5, cell
            assert parameters < 1e-5, cell
            assert way < 1e-2, cell  # where rounding takes a point into the next cell of a grid, a gradient jumps


@pytest.mark.slow
def test_every_small_recipe_as_it_stands_takes_the_same_steps_under_every_stage(
    tiny_store: Path, tmp_path: Path
) -> None:
    """On two ranks; in four steps every stage of dira-tiny has its turn."""
    words = ("train.steps=4", "train.global_batch=4", "train.ema_decay=0.5", "optimizer.name=sgd",
             "optimizer.gradient_clip=1", "adversary_optimizer.name=sgd", "loader.threads=1", "validation.every=2",
             "validation.fraction=0.34", "validation.batches=1", "schedule.warmup_steps=0", "checkpoint.every=100",
             "device=cpu")  # fmt: skip
    recipes = [name for name in recipe_names() if name.endswith("-tiny")]
    folders = {(name, stage): tmp_path / f"{name}{stage}" for name in recipes for stage in (0, 2, 3)}
    plan = [
        (name, f"data={tiny_store}", f"output={folder}", *words, *STAGE[stage])
        for (name, stage), folder in folders.items()
    ]
    assert run_pool(2, plan, tmp_path / "pool", timeout=1800) == [""] * len(plan)
    for (name, stage), folder in folders.items():
        losses, parameters, way, *furthest = differences(folder, folders[name, 0])
        print(f"{name:12}{stage:3}{losses:10.1e}{parameters:10.1e}{way:10.1e}", *furthest)
        assert losses < 1e-5, (name, stage)
        assert parameters < 1e-5, (name, stage)
        assert way < 1e-2, (name, stage, furthest)


def test_batch_norm_of_a_twin_is_synchronised_as_well() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    both = nn.ModuleDict({"network": network, "twin": MomentumTwin(network, 0.9)})
    before = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    synchronise_batch_norm(both)
    assert sum(isinstance(each, nn.SyncBatchNorm) for each in both.modules()) == 2
    assert not list(both["twin"].parameters())
    after = both.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.fixture
def known() -> Iterator[None]:
    METHODS["stand_in"] = StandIn
    yield
    del METHODS["stand_in"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["deepspeed.zero_stage=4"], r"deepspeed\.zero_stage: 4 is not one of 0, 1, 2, 3"),
        (
            ["deepspeed.offload_optimizer=cpu"],
            r"deepspeed\.offload_optimizer=cpu with .* set deepspeed\.zero_stage to 1, 2 or",
        ),
        (["deepspeed.offload_optimizer=nvme", "deepspeed.zero_stage=2"], "'nvme' is not one of none, cpu"),
        (["deepspeed.extra.amp.enabled=true"], r"extra: amp is gone from DeepSpeed .*; set train\.autocast=bfloat16"),
        (["deepspeed.extra.elasticity.enabled=true"], r"elasticity is gone .*; set train\.global_batch"),
        (["deepspeed.extra.compression_training={}"], "compression_training is gone"),
        (["deepspeed.extra.nebula.enabled=true"], "nebula is gone"),
        (["deepspeed.extra.zero_optimization.mics_shard_size=2"], r"zero_optimization\.mics_shard_size is gone"),
        (["deepspeed.extra.optimizer.type=OneBitAdam"], r"optimizer is decided by voxtrast; set optimizer\.name"),
        (["deepspeed.extra.zero_optimization.offload_optimizer.device=cpu"], r"set deepspeed\.offload_optimizer"),
        (["deepspeed.config_file=FOLDER/nebula.json"], r"--deepspeed_config .*nebula\.json: nebula is gone"),
        (["deepspeed.extra.zero_optimization.compute_grad_norm=false"], "compute_grad_norm=false leaves no norm"),
        (["deepspeed.extra.zero_optimization.zero_quantized_weights=true"], "not offered: parameters would be rounded"),
        (
            ["method.adversary=wgan_gp", "deepspeed.zero_stage=3"],
            "wgan_gp with .* penalty needs gradients of gradients",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(
    words: list[str], named: str, known: None, tmp_path: Path
) -> None:
    (tmp_path / "nebula.json").write_text('{"nebula": {"enabled": true}}')
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    with pytest.raises(UserError, match=named):
        deepspeed_json(load_config(str(recipe(tmp_path)), words), ranks=1)


def test_an_optimizer_on_the_cpu_is_torchs_own(known: None, tmp_path: Path) -> None:
    settings = deepspeed_json(load_config(str(recipe(tmp_path)), [*STAGE[3], OFFLOAD, "device=cpu"]), ranks=2)
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert settings["zero_force_ds_cpu_optimizer"] is False
    assert math.isclose(settings["gradient_clipping"], 0.0)
