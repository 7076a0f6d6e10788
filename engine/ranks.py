"""The processes of a run: how they start, what they say to each other, how they end."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError
from .gpus import note_unused_gpus
from .meeting import LOOKS_S, Meeting, meet, minutes, place
from .slurm import from_slurm, of_srun

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them, and the device that it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    meeting: Meeting | None = None  # of more than one rank

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of every rank."""
        return self.meeting.hosts if self.meeting else ("localhost",) * self.size

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

    def on_first_at_length(self, what: str, work: Callable[[], Result]) -> Result:
        """As `on_first`, of work that may take longer than a collective is given: the others wait outside of one.

        Args:
            what: a name that no other such work of the run has.

        Raises: DistError where the first rank goes away meanwhile.
        """
        if self.meeting is None:
            return self.on_first(work)
        store = dist.PrefixStore("at length", self.meeting.store)

        def work_and_say() -> Result:
            try:
                return work()
            finally:
                store.set(what, "done")

        while not self.first and not store.check([what]):
            time.sleep(LOOKS_S)
        return self.on_first(work_and_say)

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
        sums = torch.stack([_digest(tensor) for tensor in state.values()])
        first = sums.to(self.device, copy=True)
        dist.broadcast(first, 0)
        different = self.sum((sums.to(self.device) != first).any(1).double())
        names = [name for name, ranks in zip(state, different.tolist(), strict=True) if ranks > 0]
        if names:
            raise UserError(
                f"the ranks hold different parameters ({len(names)} of {len(state)} tensors, first {names[0]}); "
                f"nothing was saved. Check the machines, then run the same command again: it continues from the last "
                f"checkpoint"
            )


def _digest(tensor: Tensor) -> Tensor:
    """Of all bits, and of their order: two numbers, int64, that wrap around."""
    content = tensor.detach().reshape(-1).view(torch.uint8)
    padded = torch.zeros(-(-len(content) // 8) * 8, dtype=torch.uint8, device=content.device)
    padded[: len(content)] = content
    words = padded.view(torch.int64)
    weights = torch.arange(1, 2 * len(words), 2, device=words.device)  # odd: no change of a word is lost
    return torch.stack([words.sum(), (words * weights).sum()])


def start_processes(
    device: str,
    timeout_minutes: float = 30.0,
    facts: Callable[[int, str], dict[str, str]] | None = None,
    check: Callable[[Meeting, int], None] | None = None,
) -> Ranks:
    """Joins the processes that a launcher started, or starts as the only one.

    Args:
        device: auto, cpu or cuda.
        timeout_minutes: for all ranks to come, and of every collective.
        facts: what a rank says of itself to the others, from the number of ranks and the kind of its device.
        check: is given the facts of all ranks, and this rank, before they communicate; raises UserError.

    Raises: UserError where cuda was asked for and there is none, and where the ranks do not come together.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device; use device=cpu, or check the driver"
        )
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(from_slurm(os.environ))
    if on_gpu and torch.cuda.device_count() == 1 and of_srun(os.environ):
        os.environ["LOCAL_RANK"] = "0"  # srun shows each task its own GPU
    here = place(os.environ)
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed looks for it there
    if device == "auto" and not on_gpu and local_rank == 0:
        note_unused_gpus()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}: torch sees {torch.cuda.device_count()} GPU(s) here; start one rank for each"
        )
    deepspeed = import_deepspeed()
    if not on_gpu:
        # DeepSpeed would compile its shared-memory collectives for 40 s at first use; gloo serves as it is.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    chosen = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    meeting = None
    if not dist.is_initialized():
        backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=timeout_minutes)
        _take_as_default(timeout)
        if here.size == 1:
            # No port to agree on, so any number of single-process runs fit on one machine.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            meeting = meet(here, facts(here.size, chosen.type) if facts else {}, timeout.total_seconds())
            if check:
                check(meeting, here.rank)
            _join(backend, meeting, here.rank, timeout)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return Ranks(here.rank, here.size, local_rank, chosen, meeting)


def _take_as_default(timeout: timedelta) -> None:
    """DeepSpeed makes groups of its own, without saying a timeout: torch takes these then."""
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    torch.distributed.distributed_c10d.default_pg_nccl_timeout = timeout


def _join(backend: str, meeting: Meeting, rank: int, timeout: timedelta) -> None:
    store = dist.PrefixStore("group", meeting.store)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=len(meeting.hosts), timeout=timeout)
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{backend}: the ranks on {', '.join(sorted(set(meeting.hosts)))} met, but cannot reach each other within "
            f"{minutes(timeout.total_seconds())} ({first_line}); set "
            f"{'GLOO_SOCKET_IFNAME' if backend == 'gloo' else 'NCCL_SOCKET_IFNAME'} to the network interface that "
            f"joins them, and open its ports"
        ) from None


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
