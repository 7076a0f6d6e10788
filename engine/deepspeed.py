"""All that is known of DeepSpeed: processes, its JSON, optimizers, and full tensors by name in and out of an engine."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..methods import Method
from .config import Config, OptimizerConfig
from .errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks; the same on each of them."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values


def start_processes(device: str) -> Ranks:
    """Joins the processes that a launcher started, or starts as the only one.

    Args:
        device: auto, cpu or cuda.

    Raises: UserError where cuda was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device; use device=cpu, or check the driver"
        )
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _import_deepspeed()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed looks for it there
    if not on_gpu:
        # DeepSpeed would compile its shared-memory collectives for 40 s at first use; gloo serves as it is.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if size == 1 and not dist.is_initialized():
        # No port to agree on, so any number of single-process runs fit on one machine.
        dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    return Ranks(rank, size, local_rank, chosen)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def deepspeed_json(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run.

    `gradient_clipping` is always written out: left unsaid, DeepSpeed 0.19 clips at 1.0.
    """
    parts = ranks * config.train.accumulation
    if config.train.global_batch % parts:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} samples cannot be dealt evenly to {ranks} ranks "
            f"with train.accumulation={config.train.accumulation}; use a multiple of {parts}"
        )
    settings: dict[str, Any] = {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.global_batch // parts,
        "gradient_accumulation_steps": config.train.accumulation,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.train.autocast == "bfloat16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,  # the engine logs for itself
    }
    file = config.deepspeed.config_file
    if file:
        try:
            settings = _merge(settings, json.loads(Path(file).read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed_config {file}: not a readable JSON file ({error})") from None
    return _merge(settings, config.deepspeed.extra)


def wrap(method: Method, config: Config, ranks: Ranks) -> Any:
    """The DeepSpeed engine around a method. The method's forward must be called through it."""
    deepspeed = _import_deepspeed()
    method.to(ranks.device)
    optimizer = build_optimizer(method.parameter_groups(config.optimizer.weight_decay), config.optimizer)
    settings = deepspeed_json(config, ranks.size)
    engine, *_ = deepspeed.initialize(model=method, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def build_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer by its name; torch's fused forms."""
    rate, betas = config.learning_rate, (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=rate, betas=betas, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, fused=True)
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
    return chosen(groups, lr=config.learning_rate, betas=tuple(config.betas))


def full_optimizer_state(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Optimizer state as full tensors under the parameters' names, the same for every ZeRO stage. Collective."""
    optimizer, named = engine.optimizer, _trained(engine.module)
    if not _partitioned(engine):
        return {
            name: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in optimizer.state[p].items()}
            for name, p in named.items()
            if p in optimizer.state
        }
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = optimizer.optimizer
    state: dict[str, dict[str, Tensor]] = {}
    if not inner.state:
        return state
    _link_optimizer_state(optimizer)
    flat = optimizer.single_partition_of_fp32_groups[0]
    whole = [key for key, value in inner.state[flat].items() if torch.is_tensor(value) and value.shape == flat.shape]
    single = {k: torch.as_tensor(v).cpu().clone() for k, v in inner.state[flat].items() if k not in whole}
    for name, parameter in named.items():
        state[name] = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in whole} | single
    return state


def load_full_state(engine: Any, model: dict[str, Tensor], optimizer_state: dict[str, dict[str, Tensor]]) -> None:
    """Puts full tensors back, whatever the ZeRO stage and the number of ranks that they were saved under."""
    engine.module.load_state_dict(model)
    named = _trained(engine.module)
    if not _partitioned(engine):
        for name, values in optimizer_state.items():
            parameter = named[name]
            engine.optimizer.state[parameter] = {
                key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
                for key, value in values.items()
            }
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = engine.optimizer
    for parameter in named.values():
        safe_set_full_fp32_param(parameter, parameter.detach().float())
    if not optimizer_state:
        return
    first = next(iter(optimizer_state.values()))
    for flat in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {
            key: value.clone() if value.ndim == 0 else torch.zeros_like(flat) for key, value in first.items()
        }
    _link_optimizer_state(zero)
    for name, values in optimizer_state.items():
        for key, value in values.items():
            if value.ndim > 0:
                safe_set_full_optimizer_state(named[name], value.to(named[name].device), key)


def _link_optimizer_state(zero: Any) -> None:
    """Links the parameters to their slices of the optimizer state.

    DeepSpeed does so once, after the first step of the first parameter group: the other groups have no state by then
    and stay without (0.19.8), and so does a state that was loaded before any step.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _partitioned(engine: Any) -> bool:
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _import_deepspeed() -> Any:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError:
        raise UserError("deepspeed is not installed; install voxtrast[engine]") from None
    return deepspeed
