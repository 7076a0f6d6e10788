"""Block sizes of the kernels: a table for each architecture (configurations.json), and its measuring.

A table file named by VOXTRAST_TUNE is read before ours. What it lacks is measured at first use on a problem of 2048
vectors or more, which takes minutes, and written to it. Without that variable nothing is ever measured.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing

TABLE = Path(__file__).with_name("configurations.json")
TUNE = "VOXTRAST_TUNE"
WORTH_MEASURING = 2048  # vectors: in smaller problems many candidates are the same


@dataclass(frozen=True)
class Configuration:
    own: int  # vectors of the block that a program keeps
    other: int  # vectors of the blocks that pass by, at most as many
    warps: int
    stages: int  # of the software pipeline
    registers: int | None  # of a thread, at most; None: as many as the compiler likes
    resident: int  # programs that a multiprocessor holds at once

    @property
    def launch(self) -> dict[str, Any]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    def shrunk(self, count: int) -> "Configuration":
        """For problems of few vectors."""
        most = max(16, triton.next_power_of_2(count))
        own, other = min(self.own, most), min(self.other, most)
        if (own, other) == (self.own, self.other):
            return self
        warps = min(self.warps, max(1, own * other // 1024))
        return replace(self, own=own, other=other, warps=warps, resident=4 * self.resident)


def key_of(kernel: str, dtype: torch.dtype, chunk: int) -> str:
    """kernel "sums" or "gradients"; chunk: channels of a block, a power of two."""
    return f"{kernel}, {8 * dtype.itemsize} bit, {max(64, chunk)} channels"


def choose(
    kernel: str, dtype: torch.dtype, chunk: int, count: int, device: torch.device, run: Callable[[Configuration], Any]
) -> Configuration:
    """The configuration for problems of `count` vectors; `run` launches with one, in case it must be measured."""
    architecture, key = _architecture(device), key_of(kernel, dtype, chunk)
    tuned = os.environ.get(TUNE)
    if tuned:
        found = _table(Path(tuned)).get(architecture, {}).get(key)
        if found is None and count >= WORTH_MEASURING:
            found = _measure(kernel, dtype, chunk, run)
            _write(Path(tuned), architecture, key, found)
        if found is not None:
            return found.shrunk(count)
    return _table(TABLE)[architecture][key].shrunk(count)


def multiprocessors(device: torch.device) -> int:
    # A CPU is the interpreter: few enough that a program has several blocks.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def candidates(dtype: torch.dtype, chunk: int) -> list[Configuration]:
    """What is worth a measurement; whatever does not fit a device is passed over there."""
    sizes = [(128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (256, 64, 8), (64, 32, 4), (128, 32, 4)]
    if dtype == torch.float32 or chunk > 128:
        sizes = [(64, 64, 4), (64, 32, 4), (128, 32, 8), (64, 16, 4), (32, 32, 4)]
    found = []
    for own, other, warps in sizes:
        for stages in (2, 3):
            # As many registers as leave room for 1, 2, 3 ... programs on a multiprocessor.
            for resident in (1, 2) if warps == 8 else (2, 3, 4):
                registers = 65536 // (32 * warps * resident) // 8 * 8
                found.append(Configuration(own, other, warps, stages, min(registers, 255), resident))
    return found


def _architecture(device: torch.device) -> str:
    """Of the table: the newest one known that the device can be taken for."""
    if device.type != "cuda":
        return "80"
    major = torch.cuda.get_device_capability(device)[0]
    if major < 8:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)}: the fused operators need compute capability 8.0 or newer, this is "
            f"{major}.x; use their `_reference` forms"
        )
    # 12.x has the matrix units and the shared memory of 8.6, not those of 10.0.
    return {9: "90", 10: "100"}.get(major, "80")


@cache
def _table(file: Path) -> dict[str, dict[str, Configuration]]:
    if not file.exists():
        return {}
    read = json.loads(file.read_text(encoding="utf-8"))
    return {name: {key: Configuration(**entry) for key, entry in table.items()} for name, table in read.items()}


def _measure(kernel: str, dtype: torch.dtype, chunk: int, run: Callable[[Configuration], Any]) -> Configuration:
    best, least, last = None, float("inf"), None
    for each in candidates(dtype, chunk):
        try:
            taken = triton.testing.do_bench(lambda one=each: run(one), warmup=5, rep=30, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, RuntimeError) as error:
            last = error  # too large for the device, or for the compiler, whose failures are of the last kind
            continue
        if taken < least:
            best, least = each, taken
    if best is None:
        raise RuntimeError(f"{TUNE}: no configuration of {key_of(kernel, dtype, chunk)} fits this device") from last
    return best


def _write(file: Path, architecture: str, key: str, found: Configuration) -> None:
    table = dict(_table(file))
    table[architecture] = {**table.get(architecture, {}), key: found}
    plain = {name: {key: asdict(entry) for key, entry in entries.items()} for name, entries in table.items()}
    file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    _table.cache_clear()
