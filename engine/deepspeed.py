"""DeepSpeed's JSON and engines. What is inside an engine is `learner.py`'s."""

import contextlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..methods import Method
from ..methods.parts.momentum_twin import MomentumTwin
from .config import Config, OptimizerConfig
from .errors import UserError
from .learner import Learner
from .loss_scale import LossScale
from .optimizers import build_optimizer
from .precision import spare_small_maps
from .ranks import Ranks, import_deepspeed

# What the loop, the schedule and the checkpoints rely on; said once, in the typed configuration.
OURS = {
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "set train.accumulation",
    "gradient_clipping": "set optimizer.gradient_clip",
    "zero_optimization.stage": "set deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "set deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload": "set deepspeed.offload_optimizer",
    "torch_autocast": "set train.autocast",
    "fp16": "set train.autocast=float16",
    "bf16": "set train.autocast=bfloat16",
    "optimizer": "set optimizer.name and what stands beside it",
    "scheduler": "set schedule.name and what stands beside it",
}
# What DeepSpeed could do once, and passes over or ends at without naming our key (0.19.8).
_BATCHES = "set train.global_batch and train.accumulation for the ranks there are; a run resumes on any number of them"
GONE = {
    "amp": "set train.autocast=bfloat16",
    "elasticity": _BATCHES,
    "compression_training": "leave it out; compress the network after pretraining",
    "nebula": "leave it out; checkpoints are voxtrast's own (checkpoint.*)",
    "quantize_training": "leave it out; set train.autocast=bfloat16 for less memory",
    "eigenvalue": "leave it out",
    "sparse_attention": "leave it out; choose backbone.architecture",
    "sparse_gradients": "leave it out; no method has sparse gradients",
    "curriculum_learning": "leave it out; use stages",
    "progressive_layer_drop": "leave it out",
    "graph_harvesting": "leave it out",
    "zero_optimization.mics_shard_size": "leave it out",
    "zero_optimization.mics_hierarchical_params_gather": "leave it out",
    "zero_optimization.zeropp_loco_param": "leave it out",
}
# What would change the steps: (key, reason, remedy).
BREAKING = (
    ("zero_optimization.offload_param", "parameters are small here beside what the layers keep for the backward",
     "leave it out; set deepspeed.offload_optimizer=cpu, or train.accumulation for less memory"),
    ("zero_optimization.zero_quantized_weights", "parameters would be rounded", "leave it out"),
    ("zero_optimization.zero_quantized_gradients", "gradients would be rounded", "leave it out"),
    ("zero_optimization.zero_quantized_nontrainable_weights", "parameters would be rounded", "leave it out"),
    ("zero_optimization.zenflow", "parameters would move steps after their gradients", "leave it out"),
    ("zero_optimization.round_robin_gradients", "checkpoints rely on the order of parameters", "leave it out"),
    ("zero_optimization.zero_hpz_partition_size", "its second copy is not put back with the first", "leave it out"),
    ("zero_optimization.ignore_unused_parameters", "a stage may leave parameters unused", "leave it out"),
    ("data_efficiency", "batches and their order are the data plane's", "use stages and sampling.*"),
    ("compile", "the wrapped graph could not be gathered", "leave it out"),
    ("pipeline", "a method is one module", "leave it out"),
    ("tensor_parallel", "a method is one module", "leave it out"),
    ("sequence_parallel_size", "a sample stays on one rank", "leave it out"),
    ("prescale_gradients", "gradients would be scaled otherwise than the losses", "leave it out"),
    ("gradient_predivide_factor", "gradients would be scaled otherwise than the losses", "leave it out"),
)  # fmt: skip
BUCKET = 50_000_000  # elements that are sent at once, 200 MB of float32; DeepSpeed's own default is ten times as much


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
        "zero_optimization": _zero(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload; DeepSpeed's own would be compiled for minutes
        # Left unsaid, ZeRO 1 would also keep and add the gradients of convolutions in bfloat16.
        "torch_autocast": {
            "enabled": config.train.autocast != "none",
            "dtype": "float16" if config.train.autocast == "float16" else "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,  # the engine logs for itself
        # It would wait for the GPU before every forward and in every step, and for what DALI prepares there.
        "timers": {"throughput": {"enabled": False}},
    }
    for source, extra in (
        (f"--deepspeed_config {config.deepspeed.config_file}", _read_json(config.deepspeed.config_file)),
        ("deepspeed.extra", config.deepspeed.extra),
    ):
        _refuse(source, extra)
        settings = _merge(settings, extra)
    return settings


def _zero(config: Config) -> dict[str, Any]:
    chosen = config.deepspeed
    zero: dict[str, Any] = {"stage": chosen.zero_stage}
    if chosen.zero_stage > 0:
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if chosen.offload_optimizer != "none":
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        zero["offload_optimizer"] = {"device": chosen.offload_optimizer, "pin_memory": on_gpu}
    return zero


def _refuse(source: str, extra: dict[str, Any]) -> None:
    """Keys that are said elsewhere, that DeepSpeed dropped, or under which a step would be another."""
    for key, remedy in OURS.items():
        if _holds(extra, key):
            raise UserError(f"{source}: {key} is decided by voxtrast; {remedy}")
    for key, remedy in GONE.items():
        if _holds(extra, key):
            raise UserError(f"{source}: {key} is gone from DeepSpeed {version('deepspeed')}; {remedy}")
    for key, reason, remedy in BREAKING:
        if _holds(extra, key):
            raise UserError(f"{source}: {key} is not offered: {reason}; {remedy}")
    zero = extra.get("zero_optimization")
    if isinstance(zero, dict) and not zero.get("compute_grad_norm", True):
        raise UserError(
            f"{source}: zero_optimization.compute_grad_norm=false leaves no norm to clip by or to judge a step by; "
            f"leave it out"
        )


def wrap(method: Method, config: Config, ranks: Ranks) -> Learner:
    """The method in its DeepSpeed engine. The method's forward must be called through it."""
    method.to(ranks.device)
    if ranks.size > 1 and ranks.device.type == "cuda":
        # Batch norm over all ranks; names and tensors stay, so that a state dict fits on both sides.
        synchronise_batch_norm(method)
    groups = method.parameter_groups(config.optimizer.weight_decay)
    return _wrap(method, groups, config.optimizer, deepspeed_json(config, ranks.size))


def synchronise_batch_norm(method: nn.Module) -> None:
    """Batch norm over all ranks, in place."""
    with contextlib.ExitStack() as stack:
        for module in list(method.modules()):
            if isinstance(module, MomentumTwin):
                stack.enter_context(module.as_parameters())
        nn.SyncBatchNorm.convert_sync_batchnorm(method)


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
    low = settings["torch_autocast"]
    if low["enabled"] and low["dtype"] == "bfloat16" and next(module.parameters()).device.type == "cpu":
        spare_small_maps(module)
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
        content = json.loads(Path(file).read_text(encoding="utf-8"))
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
