"""From a checkpoint back to a run, or a refusal that says what does not fit."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Method
from . import checkpoint
from .checkpoint import State
from .config import Config
from .errors import UserError
from .learner import Learner
from .ranks import Ranks
from .versions import changed, versions
from .weights import first_few


def find_state(run: Path, config: Config, ranks: Ranks) -> State | None:
    """The newest whole checkpoint, the same on every rank, or nothing. Collective.

    Raises: UserError where the ranks see different ones, or where it has taken more steps than are asked for.
    """
    state, damaged = checkpoint.load_latest(run / "checkpoints")
    step = state.step if state else 0
    if ranks.mean(torch.tensor(float(step))).item() != step:
        raise UserError(
            f"output: the ranks do not see the same checkpoints in {run}; it must be a folder that all of "
            f"the machines share"
        )
    if ranks.first:
        for line in damaged:
            print(f"skipped: {line}", file=sys.stderr)
        if damaged:
            print(f"continuing from step {step}, {len(damaged)} checkpoint(s) before the newest", file=sys.stderr)
    if state is not None and state.step > config.train.steps:
        raise UserError(
            f"train.steps: {config.train.steps} is less than the {state.step} steps that "
            f"{run} has taken; choose more, or another output"
        )
    return state


def restore(state: State, learner: Learner, critic: Learner | None, method: Method, config: Config) -> None:
    """Puts a checkpoint into the engines. The averages, and what else is the trainer's, are left to the caller.

    Raises: UserError, before anything is changed, where it is of another method or network.
    """
    _refuse_another(state, critic, method, config)
    learner.load_module(state.model)
    learner.load_optimizer_state(state.optimizer)
    if critic is not None and state.adversary:
        critic.load_module(state.adversary)
        critic.load_optimizer_state(state.adversary_optimizer)


def notes(state: State, config: Config) -> list[str]:
    """What a user should know who continues from this checkpoint."""
    lines = []
    if different := changed(state.versions, versions()):
        lines.append(
            f"note: the checkpoint of step {state.step} was written by other versions ({different}); the run goes on, "
            f"its losses may differ from there on in the last digits"
        )
    steps = state.schedule.get("steps", config.train.steps)
    if steps != config.train.steps and config.schedule.name != "constant":
        lines.append(
            f"note: train.steps was {steps} and is {config.train.steps}: from step {state.step + 1} on the learning "
            f"rate follows the schedule of {config.train.steps} steps"
        )
    return lines


def _refuse_another(state: State, critic: Learner | None, method: Method, config: Config) -> None:
    expected = _shapes(method) | ({f"adversary.{k}": v for k, v in _shapes(critic.module).items()} if critic else {})
    found = {name: tuple(tensor.shape) for name, tensor in state.model.items()}
    found |= {f"adversary.{name}": tuple(tensor.shape) for name, tensor in state.adversary.items()}
    if critic is not None and not state.adversary:  # of the first format
        expected = {name: shape for name, shape in expected.items() if not name.startswith("adversary.")}
    backbone: dict[str, Any] = config.backbone.to_dict()
    words = []
    if state.method and state.method != config.method.name:
        words.append(f"method {state.method} where this run has {config.method.name}")
    # Fields that one of the versions does not know show in the tensors, if anywhere.
    different = [key for key in backbone if key in state.backbone and state.backbone[key] != backbone[key]]
    if different:
        words.append(
            first_few([f"backbone.{k} {state.backbone[k]} where this run has {backbone[k]}" for k in different])
        )
    report = compare(expected, found)
    if words or report:
        raise UserError(
            f"output: the checkpoint of step {state.step} is of another run ({'; '.join([*words, *report])}); nothing "
            f"was loaded. Give the settings that it was written with, or another output"
        )


def compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names and shapes side by side: loaded, missing, unexpected, of another shape; nothing where all fit."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    other = [f"{name} {found[name]} for {expected[name]}" for name in both if found[name] != expected[name]]
    if not (missing or unexpected or other):
        return []
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
    return [f"of {len(expected)} tensors {len(both) - len(other)} fit"] + [
        f"{len(names)} {kind}: {first_few(names)}" for kind, names in kinds if names
    ]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """By name; of tensors that are in parts over the ranks, those of the whole."""
    tensors: dict[str, Tensor] = module.state_dict(keep_vars=True)
    return {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
