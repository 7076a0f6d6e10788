"""How every benchmark measures: providers side by side in one process, checked against each other first.

A provider is timed in turns with all others (A B C A B C ...), so that a machine that slows down slows all of them. The
limit is what the work needs at the rates of the machine's own matrix product and exponential, measured in the same run.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]  # forward and backward; gives the gradients to compare
REFUSED = "refused"  # begins the line of a provider whose gradients are other ones
PACKAGES = ("voxtrast", "torch", "triton", "monai", "lightly", "pytorch-metric-learning", "pykeops", "inf-cl")


class Cannot(Exception):
    """Why a provider is left out."""


@dataclass(frozen=True)
class Place:
    """Where a case runs, and in which type its inputs are."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def randn(self, *sizes: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(sizes, device=self.device).to(self.dtype).requires_grad_(requires_grad)

    def check_holds(self, numbers: int, what: str) -> None:
        """Raises: Cannot where a provider's largest array, of which it holds several, is too large for the machine."""
        if 4 * numbers > LARGEST_BYTES:
            raise Cannot(f"holds {what}, {4 * numbers / 1e9:.0f} GB, several times")


CPU = Place(torch.device("cpu"), torch.float32)
LARGEST_BYTES = 1_600_000_000  # a matrix of 20,000 x 20,000


@dataclass
class Case:
    """One size of one operator, and everybody who can do it."""

    op: str
    shape: dict[str, int]
    dtype: str
    steps: dict[str, Step]  # by provider; "ours" is the first
    flops: float  # of the best known way, forward and backward
    exponentials: float
    cannot: dict[str, str] = field(default_factory=dict)  # provider: why
    tolerance: float = 2e-3  # of the largest gradient, between providers


def gradients_of(loss: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """A step: the loss of the inputs, and the gradients of those that ask for one."""
    asked = [tensor for tensor in inputs if tensor.requires_grad]

    def step() -> Sequence[Tensor]:
        for tensor in asked:
            tensor.grad = None
        loss(*inputs).backward()
        return [tensor.grad for tensor in asked if tensor.grad is not None]

    return step


@dataclass(frozen=True)
class Rates:
    flops: float  # a second, by torch's own matrix product
    exponentials: float  # a second, by torch's own exponential, in the cache


def measure_rates() -> Rates:
    matrix, numbers = torch.randn(2048, 2048), -torch.rand(65536)
    target = torch.empty_like(numbers)
    product = min(seconds_of(lambda: matrix @ matrix) for _ in range(5))

    def exponentials() -> None:
        for _ in range(100):
            torch.exp(numbers, out=target)

    return Rates(2 * 2048**3 / product, 100 * numbers.numel() / min(seconds_of(exponentials) for _ in range(5)))


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run(case: Case, rates: Rates, *, most_rounds: int) -> list[dict[str, Any]]:
    """One line for each provider, medians over turns, after one that is not counted: `most_rounds`, or three where a
    turn of all takes longer than ten seconds. A provider that fails, or has other gradients than ours, gets no time.
    """
    _check(case)
    times: dict[str, list[float]] = {name: [] for name in case.steps}
    started, rounds = time.perf_counter(), 0
    while rounds < most_rounds and not (rounds >= 3 and time.perf_counter() - started > 30):
        rounds += 1
        for name, step in case.steps.items():
            times[name].append(seconds_of(step))
    limit = case.flops / rates.flops + case.exponentials / rates.exponentials
    ours = statistics.median(times["ours"]) if "ours" in times else None
    lines = []
    for name, taken in times.items():
        middle = statistics.median(taken)
        lines.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.dtype,
                "mode": "forward and backward",
                "provider": name,
                "median_s": middle,
                "spread_s": max(taken) - min(taken),
                "ratio_to_ours": None if ours is None else middle / ours,
                "limit_s": limit,
                "share_of_limit": limit / middle,
                "rounds": rounds,
            }
        )
    return lines + [
        {"op": case.op, "shape": case.shape, "dtype": case.dtype, "provider": name, "cannot": why}
        for name, why in case.cannot.items()
    ]


def _check(case: Case) -> None:
    """Runs every provider once and moves those that fail or differ from the first to `case.cannot`."""
    expected: list[Tensor] | None = None
    for name, step in list(case.steps.items()):
        try:
            found = [gradient.double() for gradient in step()]
        except Exception as error:  # of a peer, of any kind: the others are measured all the same
            case.cannot[name] = f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            del case.steps[name]
            continue
        if expected is None:
            expected = found
        compared = zip(found, expected, strict=True)
        differences = [(one - other).abs().max() / other.abs().max() for one, other in compared]
        difference = float(torch.stack(differences).max())  # NaN where one is
        if not difference < case.tolerance:
            case.cannot[name] = f"{REFUSED}: differs by {difference:.1e} of the largest gradient"
            del case.steps[name]


def peak_memory_mb(module: str, op: str, shape: dict[str, int], provider: str) -> float | None:
    """What one step of a provider takes beyond its inputs, in a process of its own; None where it fails there."""
    words = [sys.executable, "-m", module, "--memory", json.dumps({"op": op, "shape": shape, "provider": provider})]
    done = subprocess.run(words, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def peak_beyond_mb(work: Callable[[], Any]) -> float:
    """What this process holds at most during some work beyond what it holds before. Linux alone."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": f"{processor}, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "versions": found,
    }


def append(lines: Iterable[dict[str, Any]], file: Path) -> None:
    """Adds lines to a results file; nothing in it is ever changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        for line in lines:
            stream.write(json.dumps(line) + "\n")


def table(lines: list[dict[str, Any]]) -> str:
    """The lines of one case as text."""
    first = lines[0]
    sizes = ", ".join(f"{name} {size}" for name, size in first["shape"].items())
    limit = f"  (limit {first['limit_s'] * 1e3:.2f} ms)" if "limit_s" in first else ""
    rows = [f"{first['op']}  {sizes}  {first['dtype']}{limit}"]
    for line in lines:
        if "cannot" in line:
            rows.append(f"  {line['provider']:<24} cannot: {line['cannot']}")
            continue
        ratio, memory = line["ratio_to_ours"], line.get("peak_memory_mb")
        rows.append(
            f"  {line['provider']:<24} {line['median_s'] * 1e3:10.2f} ms ± {line['spread_s'] * 1e3:<9.2f}"
            + (f" {ratio:7.2f} x ours" if ratio is not None else " " * 15)
            + f"   {line['share_of_limit']:6.0%} of the limit"
            + (f"   {memory:9.1f} MB" if memory is not None else "")
        )
    return "\n".join(rows)
