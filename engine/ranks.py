"""The processes of a run: how they start, what they say to each other, how they end."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

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

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, in their order. For small things that are rarely said."""
        found: list[Any] = [value]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, value)
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
    deepspeed = import_deepspeed()
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


def import_deepspeed() -> Any:
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError:
        raise UserError("deepspeed is not installed; install voxtrast[engine]") from None
    return deepspeed
