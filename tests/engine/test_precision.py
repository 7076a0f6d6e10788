"""float16: a loss scale that changes nothing but the range, and steps that are dropped whole, on every rank alike."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from run_results import assert_same_bits, lines_of, state_of, tensors_of
from stand_in import STAGES, Run, recipe
from torch import Tensor, nn

from voxtrast.engine import gradients, loss_scale
from voxtrast.engine.config import load_config, read_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.errors import UserError
from voxtrast.engine.loss_scale import LossScale
from voxtrast.engine.precision import autocast, spare_small_maps
from voxtrast.engine.ranks import import_deepspeed, start_processes, stop_processes
from voxtrast.engine.runs import build_method, open_cases
from voxtrast.engine.weights import load_weights
from voxtrast.methods import recipe_names

FLOAT16 = "train.autocast=float16"


def test_the_scale_halves_at_each_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale()
    assert scale.scale == 2.0**16
    for _ in range(2):
        scale.update(False)
    assert scale.scale == 2.0**14
    for _ in range(1999):
        scale.update(True)
    scale.update(False)  # begins the count anew
    for _ in range(1999):
        scale.update(True)
    assert (scale.scale, scale.good_steps) == (2.0**13, 1999)
    other = LossScale()
    other.load(scale.state())
    other.update(True)
    assert (other.scale, other.good_steps) == (2.0**14, 0)


def test_gradients_that_overflow_without_a_scale_end_the_run_with_a_remedy() -> None:
    scale = LossScale()
    for _ in range(16):
        scale.update(False)
    assert scale.scale == 1
    with pytest.raises(UserError, match=r"train\.autocast: .* fallen to 1; .*learning_rate.*bfloat16"):
        scale.update(False)


def toy_engine(stage: int, clip: float = 0.5, accumulation: int = 1) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    settings = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation, "gradient_clipping": clip,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    return import_deepspeed().initialize(model=network, optimizer=optimizer, config=settings, dist_init_required=False)[
        0
    ]


def weights_of(engine: Any) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization():
        return [safe_get_full_fp32_param(each).clone() for each in engine.module.parameters()]
    return [each.detach().clone() for each in engine.module.parameters()]


def take(engine: Any, number: int, scale: float, spoil: float = 0.0, rank: int = 0, unwanted: bool = False) -> bool:
    """One step as a learner takes it, unless it is unwanted or not finite; says whether it was taken."""
    generator = torch.Generator().manual_seed(10 * number + rank)
    parts = engine.gradient_accumulation_steps()
    for part in range(parts):
        loss = engine(torch.randn(2, 6, generator=generator)).square().mean()
        gradients.backward(engine, loss + (loss * spoil if part == 0 else 0), scale)
        if part < parts - 1:
            engine.step()
    if not gradients.are_finite(engine) or unwanted:
        gradients.drop(engine)
        return False
    gradients.unscale(engine, scale)
    engine.step()
    return True


def check_stage(stage: int, rank: int, clip: float, accumulation: int) -> None:
    plain, scaled, dropping = (toy_engine(stage, clip, accumulation) for _ in range(3))
    for number in range(4):
        if number in (0, 2):  # before there are moments, and after
            before = weights_of(dropping)
            alone = math.inf if rank == dist.get_world_size() - 1 else 0.0  # the gradients of one rank alone
            assert not take(dropping, 7, 1.0, alone, rank)
            assert not take(dropping, 8, 1.0, rank=rank, unwanted=True)  # finite gradients can be dropped as well
            assert all(torch.equal(one, two) for one, two in zip(weights_of(dropping), before, strict=True))
        assert take(plain, number, 1.0, rank=rank)
        assert take(scaled, number, 2.0 ** (16 - number), rank=rank)
        assert take(dropping, number, 1.0, rank=rank)
        wanted = weights_of(plain)
        for other in (scaled, dropping):
            assert all(torch.equal(one, two) for one, two in zip(weights_of(other), wanted, strict=True))
    assert not torch.equal(wanted[0], before[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("clip", "accumulation"), [(0.05, 1), (0.0, 2)])
def test_a_scale_changes_no_bit_and_a_dropped_step_leaves_no_trace(stage: int, clip: float, accumulation: int) -> None:
    start_processes("cpu")
    check_stage(stage, 0, clip, accumulation)


def check_on_one_of_two(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    deepspeed = import_deepspeed()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for stage in range(4):
        check_stage(stage, rank, clip=0.05, accumulation=1)
    Path(folder, f"rank{rank}").write_text("equal", encoding="utf-8")
    stop_processes()


@pytest.mark.slow
def test_what_one_of_two_ranks_overflows_is_dropped_by_both(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_on_one_of_two, args=(str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text(encoding="utf-8") for rank in range(2)] == ["equal", "equal"]


def test_a_dropped_step_leaves_everything_and_the_run_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, calls = gradients.backward, []

    def spoiled(engine: Any, loss: Tensor, scale: float) -> None:
        calls.append(type(engine.module).__name__)
        spoil = calls[-1] == "StandIn" and calls.count("StandIn") in (1, 5)
        ordinary(engine, loss * math.inf if spoil else loss, scale)

    monkeypatch.setattr(gradients, "backward", spoiled)
    words = (FLOAT16, "method.adversarial_weight=0.1", "train.ema_decay=0.5", "checkpoint.every=1")
    folder = run("run", *words)
    lines = lines_of(folder)
    assert ["dropped" in line for line in lines] == [True, False, False, False, True, False]
    assert [line["loss_scale"] for line in lines] == [2.0**each for each in (15, 15, 15, 15, 14, 14)]
    fresh = build_method(read_config(folder / "config.yaml")).state_dict()
    first = state_of(folder, 1)
    assert all(torch.equal(first.model[name], tensor) for name, tensor in fresh.items())
    assert not first.optimizer
    before, after = state_of(folder, 4), state_of(folder, 5)
    assert_same_bits(after, before)
    assert after.scaler["adversary"] == before.scaler["adversary"]
    last = state_of(folder, 6)
    assert last.model["bank.pushed"].item() == 4 * 4  # nothing of the dropped steps
    assert not torch.equal(last.model["head.0.weight"], after.model["head.0.weight"])


@pytest.mark.parametrize("words", [(), pytest.param(("deepspeed.zero_stage=1",), marks=pytest.mark.slow)], ids=str)
def test_a_float16_run_resumes_with_its_scale_bit_for_bit_and_keeps_float32(
    words: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**28)  # overflows at once
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    words = (FLOAT16, "train.steps=20", "checkpoint.every=16", "train.ema_decay=0.5", "checkpoint.keep=99", *words)
    words = (*words, "method.adversarial_weight=0.1", "validation.every=0")
    whole = run("whole", *words)
    dropped = ["dropped" in line for line in lines_of(whole)]
    assert dropped[0]
    assert not all(dropped[:16])
    state = state_of(whole, 16)
    assert state.scaler["method"]["scale"] < 2.0**28
    assert all(tensor.dtype in (torch.float32, torch.float64, torch.int64) for _, tensor in tensors_of(state))
    lines, wanted = lines_of(whole), state_of(whole, 20)
    for file in (whole / "checkpoints").glob("step-00000020*"):
        file.unlink()
    run("whole", *words)
    assert lines_of(whole) == lines
    assert_same_bits(state_of(whole, 20), wanted)
    assert state_of(whole, 20).scaler == wanted.scaler


def test_float16_is_nearer_to_float32_than_bfloat16_is(run: Run) -> None:
    losses = {
        name: lines_of(run(name, f"train.autocast={name}", "train.steps=3", stages=STAGES))[0]["loss"]
        for name in ("none", "float16", "bfloat16")
    }
    assert 0 < abs(losses["float16"] - losses["none"]) < abs(losses["bfloat16"] - losses["none"])


def test_a_run_goes_on_with_levels_that_run_again_bit_for_bit_and_its_weights_do_not_say_so(run: Run) -> None:
    words = ("train.steps=4", "validation.every=0")
    whole = run("whole", *words)
    lines, wanted, said = lines_of(whole), state_of(whole, 4), load_weights(whole / "weights.safetensors")[1]
    for file in (whole / "checkpoints").glob("step-00000004*"):
        file.unlink()
    run("whole", *words, "backbone.checkpoint_levels=2")
    assert lines_of(whole) == lines
    assert_same_bits(state_of(whole, 4), wanted)
    again = load_weights(whole / "weights.safetensors")[1]
    assert again["backbone"] == said["backbone"]
    assert not {"checkpoint_levels", "channels_last", "compile"} & set(again["backbone"])


@pytest.mark.slow  # compiles
def test_a_compiled_run_learns_what_a_plain_one_does(run: Run) -> None:
    words = ("train.steps=3", "validation.every=0", "optimizer.name=sgd", "train.ema_decay=0.5")
    plain = [line["loss"] for line in lines_of(run("plain", *words))]
    compiled = run("compiled", *words, "backbone.compile=true")
    assert [line["loss"] for line in lines_of(compiled)] == pytest.approx(plain, rel=1e-5)
    assert list(state_of(compiled, 3).model) == list(state_of(run("plain", *words), 3).model)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_two_ranks_share_their_scale_and_drop_the_same_steps_as_one_process(
    stage: int, run: Run, tiny_store: Path, tmp_path: Path
) -> None:
    words = [FLOAT16, f"deepspeed.zero_stage={stage}", "optimizer.name=sgd", "train.ema_decay=0.5"]
    one = run("one", *words, stages=STAGES)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launcher += ["--master_port", str(31500 + os.getpid() % 1000), str(Path(__file__).with_name("stand_in.py"))]
    two = tmp_path / "two"
    command = [*launcher, str(recipe(tmp_path, STAGES)), f"data={tiny_store}", f"output={two}", *words]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    alone, together = lines_of(one), lines_of(two)
    for key in ("loss_scale", "dropped"):
        assert [line.get(key) for line in together] == [line.get(key) for line in alone]
    # Each sample is rounded alike wherever it is, sums over a batch of other parts are not.
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=5e-3)
    assert state_of(two).scaler == state_of(one).scaler


@pytest.mark.slow  # convolutions in float16 are slow on a CPU
@pytest.mark.parametrize("name", [name for name in recipe_names() if name.endswith("-tiny")])
def test_every_method_has_float32_losses_and_finite_gradients_in_float16(name: str, tiny_store: Path) -> None:
    words = [f"data={tiny_store}", "train.global_batch=2", "views.crop=[32,32,32]"]
    config = load_config(name, words)
    torch.manual_seed(0)
    method = build_method(config)
    store, cases, _, _ = open_cases(config)
    with ViewPipeline(store, cases, method.views, seed=0, global_batch=2, threads=1) as views:
        [batch] = next(iter(views))
    with autocast("float16", torch.device("cpu")):
        method.exchange([batch], 0)
        losses = method(batch, 0)
    assert {term: loss.dtype for term, loss in losses.items()} == dict.fromkeys(losses, torch.float32)
    (torch.stack(list(losses.values())).sum() * 2.0**10).backward()
    found = [each.grad for each in method.parameters() if each.grad is not None]
    assert all(each.isfinite().all() for each in found)
    assert any(each.abs().max() > 0 for each in found)


@pytest.mark.parametrize("depth", [2, 4])
def test_weights_of_convolutions_over_few_slices_get_their_gradient_in_bfloat16(depth: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(32, 32, 3, padding=1)
    image = torch.randn(2, 32, depth, 8, 6)
    convolution(image).square().mean().backward()
    wanted = convolution.weight.grad
    assert wanted is not None
    spare_small_maps(convolution)
    for _ in range(20):
        junk = [torch.full((count,), 3e30) for count in (1000, wanted.numel() // 2, wanted.numel())]
        del junk  # so that memory that is not written shows
        convolution.weight.grad = None
        with autocast("bfloat16", torch.device("cpu")):
            convolution(image).float().square().mean().backward()
        assert (convolution.weight.grad - wanted).norm() < 0.02 * wanted.norm()
