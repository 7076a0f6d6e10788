"""Processes, DeepSpeed's JSON, engines and optimizers. What is inside an engine is `learner.py`'s."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..methods import Method
from .config import Config, OptimizerConfig
from .errors import UserError
from .learner import Learner

# What the loop, the schedule and the checkpoints rely on; said once, in the typed configuration.
OURS = {
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.global_batch and train.accumulation",
    "gradient_accumulation_steps": "set train.accumulation",
    "gradient_clipping": "set optimizer.gradient_clip",
    "zero_optimization.stage": "set deepspeed.zero_stage",
    "torch_autocast": "set train.autocast",
    "fp16": "set train.autocast=bfloat16",
    "bf16": "set train.autocast=bfloat16",
    "optimizer": "set optimizer.name and what stands beside it",
    "scheduler": "set schedule.name and what stands beside it",
}


Result = TypeVar("Result")


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
        values = values.to(self.device)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Does the work on the first rank and gives every rank its result; where it fails, every rank ends."""
        error: Exception | None = None
        result: list[Any] = [None]
        if self.first:
            try:
                result = [work()]
            except Exception as caught:
                error = caught
        if self.sum(torch.tensor(float(error is not None))).item() > 0:
            raise error or UserError("stopped, because the first rank could not go on")
        if self.size > 1:
            dist.broadcast_object_list(result, 0)
        found: Result = result[0]
        return found

    def check_equal(self, module: nn.Module) -> None:
        """Refuses to go on where the ranks hold different parameters or buffers; to the last bit, and collective.

        They should never differ. A faulty machine, or an operator that is not the same everywhere, makes them drift
        apart without a word, and what is then saved is the first rank's alone.
        """
        if self.size == 1:
            return
        state = module.state_dict()
        sums = torch.stack([t.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for t in state.values()])
        first = sums.to(self.device, copy=True)
        dist.broadcast(first, 0)
        different = self.sum((sums.to(self.device) != first).double())
        names = [name for name, ranks in zip(state, different.tolist(), strict=True) if ranks > 0]
        if names:
            raise UserError(
                f"the ranks hold different parameters ({len(names)} of {len(state)} tensors, first {names[0]}); "
                f"nothing was saved. Check the machines, then run the same command again: it continues from the last "
                f"checkpoint"
            )


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
            "enabled": config.train.autocast == "bfloat16",
            "dtype": "bfloat16",
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
    engine, *_ = _import_deepspeed().initialize(
        model=module, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return Learner(engine)


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
    # FusedLAMB would clip at 1.0 for itself; clipping is the engine's.
    own_clipping = {"max_grad_norm": 0.0} if config.name == "apex_fused_lamb" else {}
    return chosen(groups, lr=config.learning_rate, betas=tuple(config.betas), **own_clipping)


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


def _import_deepspeed() -> Any:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError:
        raise UserError("deepspeed is not installed; install voxtrast[engine]") from None
    return deepspeed
