"""Optimizers by their names, and what each keeps of a parameter from step to step."""

from typing import Any

import torch
from torch import Tensor

from .config import OptimizerConfig
from .errors import UserError
from .lamb import Lamb

GROUP_STEP = "group_step"  # the count of steps of an optimizer that keeps it for a whole group, as apex's do


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer by its name; torch's fused forms.

    Raises: UserError where it belongs to a package that is not installed or cannot be used here.
    """
    rate = config.learning_rate
    adaptive: dict[str, Any] = {"lr": rate, "betas": (config.betas[0], config.betas[1])}
    if config.eps:
        adaptive["eps"] = config.eps
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **adaptive, fused=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, **adaptive, fused=True)
    if config.name == "sgd":
        # Not fused: that fails where a parameter is reached for the first time later than others.
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, foreach=True)
    if config.name == "lamb":
        return Lamb(groups, **adaptive)
    if config.name == "deepspeed_fused_lamb":
        return _deepspeed_lamb(groups, adaptive)
    return _apex_optimizer(groups, config.name, adaptive)


def kept_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of one parameter, as tensors of its own on the CPU; empty before its first step."""
    kept = {
        key: torch.as_tensor(value).detach().cpu().clone()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # a momentum that has not begun
    }
    group = _group_of(optimizer, parameter)
    return kept | {GROUP_STEP: torch.as_tensor(group["step"]).cpu().clone()} if kept and "step" in group else kept


def keep(optimizer: torch.optim.Optimizer, parameter: Tensor, kept: dict[str, Tensor]) -> None:
    """Puts back what `kept_of` gave."""
    counts = getattr(optimizer, "counts_in_integers", ())
    optimizer.state[parameter] = {
        key: int(value) if key in counts else value.to(parameter.device, copy=True)
        for key, value in kept.items()
        if key != GROUP_STEP
    }
    if GROUP_STEP in kept:
        group, step = _group_of(optimizer, parameter), kept[GROUP_STEP]
        group["step"] = step.to(parameter.device, copy=True) if torch.is_tensor(group.get("step")) else int(step)


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(each is parameter for each in group["params"]):
            return group
    return {}


def _deepspeed_lamb(groups: list[dict[str, Any]], adaptive: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from deepspeed.ops.lamb import FusedLamb

        # Its clamp of the layers' factors (0.01 to 10) is DeepSpeed's; clipping is the engine's.
        optimizer: Any = FusedLamb(groups, **adaptive, max_grad_norm=0.0)
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"optimizer.name: deepspeed_fused_lamb cannot be built here ({said}); it needs a GPU and nvcc of the "
            f"version that torch was built with. Use optimizer.name=lamb"
        ) from None
    optimizer.counts_in_integers = ("step",)
    found: torch.optim.Optimizer = optimizer
    return found


def _apex_optimizer(groups: list[dict[str, Any]], name: str, adaptive: dict[str, Any]) -> torch.optim.Optimizer:
    # PyPI's `apex` is another project, so the attribute is looked for and not the package alone.
    try:
        from apex import optimizers  # type: ignore[import-not-found]

        chosen = {"apex_fused_adam": optimizers.FusedAdam, "apex_fused_lamb": optimizers.FusedLAMB}[name]
    except (ImportError, AttributeError):
        raise UserError(
            f"optimizer.name: {name} needs NVIDIA's apex built from its source (the `apex` on PyPI is "
            f"another project); use optimizer.name=adamw, torch's fused form"
        ) from None
    # FusedLAMB would clip at 1.0 for itself; clipping is the engine's.
    own_clipping = {"max_grad_norm": 0.0} if name == "apex_fused_lamb" else {}
    return chosen(groups, **adaptive, **own_clipping)
