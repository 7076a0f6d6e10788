"""Processors, GPUs, free memory, and the shared memory that ranks on one machine talk through."""

import os
import platform
import shutil
import socket
from collections.abc import Iterator

import psutil
import torch

from ..gpus import REMEDY, unused_gpus
from .finding import GOOD, NOTE, Finding

LEAST_MEMORY_GB, LEAST_SHARED_GB = 2.0, 1.0


def check_devices() -> Iterator[Finding]:
    cores, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{socket.gethostname()}: {platform.machine()}, {allowed} of {cores} cores, {capability}"
    yield Finding("devices", "processor", GOOD, detail)
    yield from _gpus()
    memory = psutil.virtual_memory()
    free, total = memory.available / 1e9, memory.total / 1e9
    yield _amount("free memory", free, total, LEAST_MEMORY_GB, "end other programs, or lower train.global_batch")
    shared = shutil.disk_usage("/dev/shm")
    yield _amount(
        "shared memory", shared.free / 1e9, shared.total / 1e9, LEAST_SHARED_GB,
        "NCCL needs it between GPUs of one machine: docker run --shm-size=8g, or --ipc=host",
    )  # fmt: skip


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        found = unused_gpus()
        detail = f"{found or f'none that torch sees; torch is built for {built}'}; runs go to the CPU with gloo"
        yield Finding("devices", "GPU", NOTE if found else GOOD, detail, REMEDY if found else "")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        detail = f"{about.name}, compute capability {about.major}.{about.minor}, {memory}"
        yield Finding("devices", f"GPU {index}", GOOD, detail)


def _amount(name: str, free: float, total: float, least: float, remedy: str) -> Finding:
    detail = f"{free:.1f} of {total:.1f} GB"
    return Finding("devices", name, GOOD, detail) if free >= least else Finding("devices", name, NOTE, detail, remedy)
