"""Optimizers by their names."""

from typing import Any

import torch

from .config import OptimizerConfig
from .errors import UserError


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer by its name; torch's fused forms."""
    rate, betas = config.learning_rate, (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=betas, fused=True)
    if config.name == "sgd":
        # Not fused: that fails where a parameter is reached for the first time later than others.
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, foreach=True)
    return _apex_optimizer(groups, config)


def _apex_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    # PyPI's `apex` is another project, so the attribute is looked for and not the package alone.
    try:
        from apex import optimizers  # type: ignore[import-not-found]

        chosen = {"apex_fused_adam": optimizers.FusedAdam, "apex_fused_lamb": optimizers.FusedLAMB}[config.name]
    except (ImportError, AttributeError):
        raise UserError(
            f"optimizer.name: {config.name} needs NVIDIA's apex built from its source (the `apex` on PyPI is "
            f"another project); use optimizer.name=adamw, torch's fused form"
        ) from None
    # FusedLAMB would clip at 1.0 for itself; clipping is the engine's.
    own_clipping = {"max_grad_norm": 0.0} if config.name == "apex_fused_lamb" else {}
    return chosen(groups, lr=config.learning_rate, betas=tuple(config.betas), **own_clipping)
