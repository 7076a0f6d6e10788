"""What a benchmark runs on, and how fast that multiplies, takes exponentials and copies."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from voxtrast.engine.versions import commit
from voxtrast.kernels.stream_copy import stream_copy

from .place import CPU, Place

PACKAGES = ("triton", "monai", "lightly", "pytorch-metric-learning", "pykeops", "inf-cl")


@dataclass(frozen=True)
class Rates:
    flops: float  # a second, by torch's own matrix product
    exponentials: float  # a second: by torch's own in the cache of a CPU, in the registers of a GPU
    bandwidth: float  # bytes a second, read and written, by a copy that no cache holds
    side_by_side: bool = False  # a GPU has units for each; the cores of a CPU do one after the other

    def limit(self, flops: float, exponentials: float, moved_bytes: float = 0.0) -> float:
        """Seconds that the work takes at these rates, where memory is fetched while the processor computes."""
        parts = (flops / self.flops, exponentials / self.exponentials)
        computing = max(parts) if self.side_by_side else sum(parts)
        return max(computing, moved_bytes / self.bandwidth)


def measure_rates(place: Place = CPU) -> Rates:
    if place.on_gpu:
        return _rates_of_gpu(place)
    matrix, numbers = torch.randn(2048, 2048).to(place.dtype), -torch.rand(65536)
    target = torch.empty_like(numbers)
    product = min(place.seconds_of(lambda: matrix @ matrix) for _ in range(5))

    def exponentials() -> None:
        for _ in range(100):
            torch.exp(numbers, out=target)

    taken = min(place.seconds_of(exponentials) for _ in range(5))
    source = torch.ones(2**24)  # with its copy four times 32 MB of cache
    copy = torch.empty_like(source)
    copied = min(place.seconds_of(lambda: copy.copy_(source)) for _ in range(7))
    return Rates(2 * 2048**3 / product, 100 * numbers.numel() / taken, 2 * 4 * source.numel() / copied)


def _rates_of_gpu(place: Place) -> Rates:
    from .exponential_rate import BLOCK, ROUNDS, run_chain

    matrix = place.randn(8192, 8192, requires_grad=False)
    product = min(place.seconds_of(lambda: matrix @ matrix) for _ in range(12))
    blocks = 32 * torch.cuda.get_device_properties(place.device).multi_processor_count
    target = torch.empty(blocks * BLOCK, device=place.device)
    taken = min(place.seconds_of(lambda: run_chain(target)) for _ in range(12))
    source = torch.ones(2**27, device=place.device)
    copied = min(place.seconds_of(lambda: stream_copy(source)) for _ in range(12))
    rates = 2 * 8192**3 / product, ROUNDS * target.numel() / taken, 2 * 4 * source.numel() / copied
    return Rates(*rates, side_by_side=True)


def machine(place: Place = CPU, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Args: packages: whose versions are of interest, besides ours and torch's."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **(_gpu(place) if place.on_gpu else _processor()),
        "load": os.getloadavg()[0],
        "versions": _versions(("voxtrast", "torch", *packages)),
    }


def _processor() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text(encoding="utf-8").splitlines()
            if "model name" in line
        ]
        processor = names[0] if names else processor
    return {
        "device": f"{processor}, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpu(place: Place) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(place.device)
    driver = None
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (
            subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
            .stdout.partition("\n")[0]
            .strip()
            or None
        )
    return {
        "device": about.name,
        "capability": f"sm_{about.major}{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gb": round(about.total_memory / 1e9, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def results_file(output: Path, device: str) -> Path:
    """The file itself, or one named for the device where a folder is given (anything without a suffix)."""
    if output.suffix and not output.is_dir():
        return output
    return output / (re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")
