"""What is refused before training because the method, the batch and the ranks do not go together."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..methods import Method
from ..methods.backbone import find_architecture
from ..methods.backbones.running import check_compiler
from .config import Config
from .data.store import Case
from .errors import UserError
from .ranks import Ranks


def check_method(method: Method, config: Config, ranks: Ranks, cases: Sequence[Case]) -> None:
    """Raises UserError naming the setting that is wrong."""
    batches = {stage.global_batch or config.train.global_batch for stage in method.schedule.stages}
    parts = ranks.size * config.train.accumulation
    try:
        for global_batch in sorted(batches):
            method.check_training(global_batch, parts)
        method.check_volumes([case.shape for case in cases])
        if config.backbone.compile:
            check_compiler(ranks.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_batch_norm(method, config, ranks, min(batches) // parts)


def _check_batch_norm(method: nn.Module, config: Config, ranks: Ranks, samples: int) -> None:
    """Batch norm takes its statistics from one forward: it must see the global batch, and more than one sample."""
    found = next((name for name, module in method.named_modules() if isinstance(module, _BatchNorm)), None)
    if found is None:
        return
    accumulation = config.train.accumulation
    other = ""
    if config.backbone.norm == "batch":
        choice = "instance" in find_architecture(config.backbone.architecture).norms
        other = "backbone.norm=instance, or " if choice else "backbone.architecture=residual_unet, or "
    reason = None
    if accumulation > 1:
        reason = f"sees one of {accumulation} micro-batches at a time", f"{other}train.accumulation=1"
    elif ranks.size > 1 and ranks.device.type != "cuda":
        reason = "takes its statistics from all ranks on GPUs alone (SyncBatchNorm)", f"{other}a single process"
    elif samples < 2:
        more = f"train.global_batch={2 * ranks.size} or more (and global_batch of each stage)"
        reason = "needs at least 2 samples on each rank", f"{other}{more}"
    if reason is not None:
        named = "backbone.norm: batch norm" if config.backbone.norm == "batch" else f"{config.method.name}: batch norm"
        raise UserError(f"{named} ({found}) {reason[0]}; use {reason[1]}")
