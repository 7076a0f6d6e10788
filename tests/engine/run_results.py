"""What a run left, compared with another run bit by bit and with a plain loop."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtrast.engine.checkpoint import State, load_checkpoint
from voxtrast.engine.config import Config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.rates import rate_factor
from voxtrast.engine.runs import build_method, open_cases
from voxtrast.methods import Method

TIMES = ("samples_per_second", "data_wait", "memory_mb", "save_seconds")


def state_of(run: Path, step: int = 6) -> State:
    return load_checkpoint(run / "checkpoints" / f"step-{step:08d}.pt")


def lines_of(run: Path, name: str = "log") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensors_of(state: State) -> Iterator[tuple[str, Tensor]]:
    for part in ("model", "average", "adversary"):
        yield from ((f"{part} {name}", tensor) for name, tensor in getattr(state, part).items())
    for part in ("optimizer", "adversary_optimizer"):
        for name, values in getattr(state, part).items():
            yield from ((f"{part} {name} {key}", tensor) for key, tensor in values.items())


def assert_same_bits(one: State, other: State) -> None:
    first, second = dict(tensors_of(one)), dict(tensors_of(other))
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name].nan_to_num(9.9), second[name].nan_to_num(9.9))]
    assert not different


def plain_loop(config: Config, without: Sequence[int] = ()) -> tuple[Method, list[float]]:
    """What the stages stand for, with torch alone; steps (from 0) may be left out."""
    torch.manual_seed(config.seed)
    method = build_method(config)
    store, cases, _, _ = open_cases(config)
    chosen = config.adversary_optimizer
    critic = torch.optim.Adam(
        method.adversary.parameters(), lr=chosen.learning_rate, betas=tuple(chosen.betas), weight_decay=0
    )
    losses = []
    for moment in method.schedule.moments:
        stage = moment.stage
        if stage.fresh_optimizer or moment.first == 0:
            groups = method.parameter_groups(config.optimizer.weight_decay)
            kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer.name]
            optimizer = kind(groups, lr=1.0, **({"momentum": 0.9} if config.optimizer.name == "sgd" else {}))
        batch_size = stage.global_batch or config.train.global_batch
        options = {"seed": config.seed, "global_batch": batch_size, "start_step": moment.first, "threads": 1}
        with ViewPipeline(store, cases, method.views, **options) as views:
            for step in range(moment.first, moment.last):
                [batch] = next(views)
                if step in without:
                    continue
                factor = rate_factor(config.schedule, step - moment.first, moment.last - moment.first)
                for group in optimizer.param_groups:
                    group["lr"] = (stage.learning_rate or config.optimizer.learning_rate) * factor
                method.exchange([batch], step)
                total = torch.stack(list(method(batch, step).values())).sum()
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                if config.optimizer.gradient_clip:
                    torch.nn.utils.clip_grad_norm_(method.parameters(), config.optimizer.gradient_clip)
                optimizer.step()
                if "adversarial" in method.weights(step):
                    critic.zero_grad(set_to_none=True)
                    torch.stack(list(method.adversary(*method.adversary_inputs(batch)).values())).sum().backward()
                    critic.step()
                method.after_step(step)
                losses.append(total.item())
    return method, losses


def forget_after(run: Path, step: int) -> None:
    """As if the run had been killed before its next checkpoint."""
    for file in (run / "checkpoints").iterdir():
        if int(file.stem.removeprefix("step-")) > step:
            file.unlink()


def assert_close(run: Path, method: Method, losses: list[float]) -> None:
    state = state_of(run)
    assert [line["loss"] for line in lines_of(run)] == pytest.approx(losses, rel=1e-5)
    for found, wanted in ((state.model, method.state_dict()), (state.adversary, method.adversary.state_dict())):
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: name + m)
