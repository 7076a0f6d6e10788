"""Optimizers: what each computes, and that what it keeps goes through a checkpoint."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from run_results import assert_same_bits, lines_of, state_of
from stand_in import Run
from torch import Tensor, nn

from voxtrast.engine import optimizers
from voxtrast.engine.config import OptimizerConfig
from voxtrast.engine.errors import UserError
from voxtrast.engine.lamb import Lamb
from voxtrast.engine.optimizers import build_optimizer, keep, kept_of


def test_lamb_is_the_formula_of_its_paper() -> None:
    torch.manual_seed(0)
    rate, one, two, eps, decay = 0.1, 0.8, 0.95, 1e-6, 0.2
    matrix, vector = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 3), (5,)))
    groups = [{"params": [matrix], "weight_decay": decay}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=rate, betas=(one, two), eps=eps)
    wanted = {each: each.detach().clone() for each in (matrix, vector)}
    gradients: dict[Tensor, list[Tensor]] = {matrix: [], vector: []}
    for taken in range(1, 6):
        for parameter, x in wanted.items():
            parameter.grad = torch.randn_like(parameter)
            seen = [*gradients[parameter], parameter.grad.clone()]
            gradients[parameter] = seen
            m = sum((1 - one) * one ** (taken - 1 - i) * g for i, g in enumerate(seen)) / (1 - one**taken)
            v = sum((1 - two) * two ** (taken - 1 - i) * g**2 for i, g in enumerate(seen)) / (1 - two**taken)
            assert isinstance(m, Tensor)
            r = m / (v**0.5 + eps)
            if parameter is matrix:
                r = r + decay * x
                r = r * x.norm() / r.norm()
            wanted[parameter] = x - rate * r
        optimizer.step()
        for parameter, x in wanted.items():
            torch.testing.assert_close(parameter.detach(), x, rtol=1e-12, atol=1e-12)


def test_lamb_leaves_what_has_no_gradient_and_moves_what_is_zero() -> None:
    untouched, zero = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = Lamb([untouched, zero], lr=0.1, weight_decay=0.1)
    zero.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(untouched, torch.ones(2, 2))
    assert untouched not in optimizer.state
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("words", [("lamb",), ("sgd", "momentum=0"), ("adam",)], ids=" ".join)
def test_a_resume_equals_the_uninterrupted_run_with_any_optimizer(words: tuple[str, ...], run: Run) -> None:
    name, *options = words
    settings = (f"optimizer.name={name}", *(f"optimizer.{each}" for each in options), "train.steps=4")
    settings = (*settings, "validation.every=0", "method.adversarial_weight=0.1", f"adversary_optimizer.name={name}")
    whole = run("whole", *settings)
    lines, wanted = lines_of(whole), state_of(whole, 4)
    for file in (whole / "checkpoints").glob("step-00000004*"):
        file.unlink()
    run("whole", *settings)
    assert lines_of(whole) == lines
    assert_same_bits(state_of(whole, 4), wanted)
    start = state_of(whole, 2).model["head.0.weight"]
    assert not torch.equal(wanted.model["head.0.weight"], start)


class GroupCounting(torch.optim.Optimizer):
    """Counts its steps by group and scales them by the count, as apex's optimizers do; its momentum begins as None."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("momentum", None)
                parameter.sub_(parameter.grad * group["lr"] * group["step"])
                state["seen"] = parameter.grad.clone()


def test_a_count_of_a_group_and_a_momentum_that_has_not_begun_are_kept() -> None:
    optimizer, parameter = counting()
    parameter.grad = torch.ones(2)
    assert kept_of(optimizer, parameter) == {}
    optimizer.step()
    optimizer.step()
    kept = kept_of(optimizer, parameter)
    assert set(kept) == {"seen", optimizers.GROUP_STEP}
    other, resumed = counting()
    resumed.data.copy_(parameter.data)
    keep(other, resumed, kept)
    for each, chosen in ((optimizer, parameter), (other, resumed)):
        chosen.grad = torch.ones(2)
        each.step()
    assert torch.equal(parameter, resumed)
    assert other.param_groups[0]["step"] == 3


def counting() -> tuple[GroupCounting, nn.Parameter]:
    parameter = nn.Parameter(torch.arange(2.0))
    return GroupCounting([parameter], lr=0.1), parameter


def test_counts_come_back_as_the_optimizer_has_them() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    for optimizer, kind in ((Lamb([parameter]), int), (torch.optim.AdamW([parameter], fused=True), Tensor)):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
        kept = kept_of(optimizer, parameter)
        assert all(isinstance(value, Tensor) for value in kept.values())
        keep(optimizer, parameter, kept)
        assert isinstance(optimizer.state[parameter]["step"], kind)
        optimizer.step()


@pytest.mark.parametrize(("name", "own"), [("adamw", 1e-8), ("adam", 1e-8), ("lamb", 1e-6)])
def test_eps_is_the_optimizers_own_unless_it_is_said(name: str, own: float) -> None:
    for eps, wanted in ((0.0, own), (1e-4, 1e-4)):
        made = build_optimizer([{"params": [nn.Parameter(torch.ones(2))]}], OptimizerConfig(name=name, eps=eps))
        assert made.param_groups[0]["eps"] == wanted


def test_apexs_optimizers_are_built_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    apex = ModuleType("apex")
    fake: Any = lambda groups, **options: built.append(options)  # noqa: E731
    apex.optimizers = SimpleNamespace(FusedAdam=fake, FusedLAMB=fake)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    for name in ("apex_fused_adam", "apex_fused_lamb"):
        build_optimizer([], OptimizerConfig(name=name, learning_rate=0.5))
    assert built == [{"lr": 0.5, "betas": (0.9, 0.999)}, {"lr": 0.5, "betas": (0.9, 0.999), "max_grad_norm": 0.0}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, for which it may be built")
def test_deepspeeds_lamb_says_where_it_cannot_be_built() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name: deepspeed_fused_lamb cannot be built here \(.*name=lamb"):
        build_optimizer([{"params": [nn.Parameter(torch.ones(2))]}], OptimizerConfig(name="deepspeed_fused_lamb"))


def test_a_run_that_needs_another_device_is_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    for name, instead in (("deepspeed_fused_lamb", "lamb"), ("apex_fused_adam", "adam")):
        with pytest.raises(UserError, match=f"optimizer.name={name} with device=cpu: .*use optimizer.name={instead},"):
            run("run", f"optimizer.name={name}")
    assert not (tmp_path / "run").exists()
