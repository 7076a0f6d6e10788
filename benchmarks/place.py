"""Where a benchmark runs: the device, the type of its inputs, and how time and memory are read there."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Cannot(Exception):
    """Why a provider is left out."""


@dataclass(frozen=True)
class Place:
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def randn(self, *sizes: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(sizes, device=self.device).to(self.dtype).requires_grad_(requires_grad)

    def check_holds(self, numbers: int, what: str) -> None:
        """Raises: Cannot where a provider's largest array, of which it holds several, is too large for the machine."""
        largest = torch.cuda.get_device_properties(self.device).total_memory // 4 if self.on_gpu else LARGEST_BYTES
        if 4 * numbers > largest:
            raise Cannot(f"holds {what}, {4 * numbers / 1e9:.0f} GB, several times")

    def seconds_of(self, work: Callable[[], Any]) -> float:
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(self.device)
            return start.elapsed_time(end) / 1e3
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def peak_beyond_mb(self, work: Callable[[], Any]) -> float:
        """What is held at most during some work beyond what is held before: by torch's allocator on a GPU, else by this
        process (Linux alone)."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            work()
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - allocated) / 2**20
        _return_free_memory()  # what a step before this one has freed would serve this one unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
        before = _status_kb("VmRSS")
        work()
        return (_status_kb("VmHWM") - before) / 1024


CPU = Place(torch.device("cpu"), torch.float32)
LARGEST_BYTES = 1_600_000_000  # on a CPU: a matrix of 20,000 x 20,000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_place(device: str | None, dtype: str | None) -> Place:
    """The GPU and bfloat16 where there is one and nothing else is asked for, else the CPU and float32.

    Raises: ValueError where a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no CUDA device")
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return Place(torch.device("cpu"), DTYPES[dtype or "float32"])
    return Place(torch.device("cuda", torch.cuda.current_device()), DTYPES[dtype or "bfloat16"])


def _return_free_memory() -> None:
    with contextlib.suppress(AttributeError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
