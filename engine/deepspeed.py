"""DeepSpeed's JSON and engines. What is inside an engine is `learner.py`'s."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..methods import Method
from .config import Config, OptimizerConfig
from .errors import UserError
from .learner import Learner
from .loss_scale import LossScale
from .optimizers import build_optimizer
from .ranks import Ranks, import_deepspeed

# What the loop, the schedule and the checkpoints rely on; said once, in the typed configuration.
OURS = {
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "set train.accumulation",
    "gradient_clipping": "set optimizer.gradient_clip",
    "zero_optimization.stage": "set deepspeed.zero_stage",
    "torch_autocast": "set train.autocast",
    "fp16": "set train.autocast=float16",
    "bf16": "set train.autocast=bfloat16",
    "optimizer": "set optimizer.name and what stands beside it",
    "scheduler": "set schedule.name and what stands beside it",
}


def deepspeed_json(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run.

    `gradient_clipping` is always written out: left unsaid, DeepSpeed 0.19 clips at 1.0.
    """
    parts = ranks * config.train.accumulation
    batches = {f"stages[{i}].global_batch": stage.global_batch for i, stage in enumerate(config.stages)}
    for name, batch in ({"train.global_batch": config.train.global_batch} | batches).items():
        if batch is not None and batch % parts:
            raise UserError(
                f"{name}: {batch} samples cannot be dealt evenly to {ranks} ranks "
                f"with train.accumulation={config.train.accumulation}; use a multiple of {parts}"
            )
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // parts,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        # Left unsaid, ZeRO 1 would also keep and add the gradients of convolutions in bfloat16.
        "torch_autocast": {
            "enabled": config.train.autocast != "none",
            "dtype": "float16" if config.train.autocast == "float16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,  # the engine logs for itself
    }
    for source, extra in (
        (f"--deepspeed_config {config.deepspeed.config_file}", _read_json(config.deepspeed.config_file)),
        ("deepspeed.extra", config.deepspeed.extra),
    ):
        for key, remedy in OURS.items():
            if _holds(extra, key):
                raise UserError(f"{source}: {key} is decided by voxtrast; {remedy}")
        settings = _merge(settings, extra)
    return settings


def wrap(method: Method, config: Config, ranks: Ranks) -> Learner:
    """The method in its DeepSpeed engine. The method's forward must be called through it."""
    method.to(ranks.device)
    if ranks.size > 1 and ranks.device.type == "cuda":
        # Batch norm over all ranks; names and tensors stay, so that a state dict fits on both sides.
        nn.SyncBatchNorm.convert_sync_batchnorm(method)
    groups = method.parameter_groups(config.optimizer.weight_decay)
    return _wrap(method, groups, config.optimizer, deepspeed_json(config, ranks.size))


def wrap_adversary(method: Method, config: Config, ranks: Ranks) -> Learner | None:
    """The method's adversary in an engine of its own, for its own steps."""
    if method.adversary is None:
        return None
    chosen = config.adversary_optimizer
    adversary = method.adversary.to(ranks.device)
    groups = [{"params": list(adversary.parameters()), "weight_decay": chosen.weight_decay}]
    settings = deepspeed_json(config, ranks.size) | {"gradient_clipping": chosen.gradient_clip}
    return _wrap(adversary, groups, chosen, settings)


def _wrap(module: nn.Module, groups: list[dict[str, Any]], chosen: OptimizerConfig, settings: Any) -> Learner:
    optimizer = build_optimizer(groups, chosen)
    engine, *_ = import_deepspeed().initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    # Its own loss scaling is for each rank and group alone (see loss_scale.py); ZeRO has it in every run of a process
    # that has ever used float16.
    engine.torch_autocast_z0_gradscaler = None
    if engine.zero_optimization():
        engine.optimizer.torch_autocast_gradscaler = None
    return Learner(engine, LossScale() if settings["torch_autocast"]["dtype"] == "float16" else None)


def _read_json(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config {file}: not a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {file}: expected a JSON object, found {type(content).__name__}")
    return content


def _holds(settings: dict[str, Any], dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    if first not in settings:
        return False
    return not rest or (isinstance(settings[first], dict) and _holds(settings[first], rest))


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
