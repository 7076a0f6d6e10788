"""How every benchmark measures: providers side by side in one process, checked against each other first.

A provider is timed in turns with all others (A B C A B C ...), so that a machine that slows down slows all of them. The
limit is what the work needs at the rates of the machine's own matrix product, exponential and copy, measured in the
same run.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import Rates
from .place import Place

# Between the gradients of two providers, of the largest. As narrow as the peers' own rounding allows: float32 leaves
# room for TF32, which inf-cl and flex_attention use. Measured: ours is within 3e-4 of float64 in float16 and 2.6e-3 in
# bfloat16; eager torch is at 5e-3 in float16 and, beside ours, at 1.1e-2 in bfloat16 and MONAI at 1.7e-2 (1024 images).
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
Step = Callable[[], Sequence[Tensor]]  # forward and backward; gives the gradients to compare
REFUSED = "refused"  # begins the line of a provider whose gradients are other ones


@dataclass
class Case:
    """One size of one operator, and everybody who can do it."""

    op: str
    shape: dict[str, int]
    place: Place
    steps: dict[str, Step]  # by provider; "ours" is the first
    flops: float  # of the best known way, forward and backward
    exponentials: float
    cannot: dict[str, str] = field(default_factory=dict)  # provider: why
    moved_bytes: float = 0.0  # to and from memory at the least; 0: the arithmetic alone is the limit
    other_work: frozenset[str] = frozenset()  # providers that compute something else, timed for orientation
    norm_tolerance: float = 0.0  # where gradients jump: their difference is compared by its norm, and with this


def gradients_of(loss: Callable[..., Tensor], *inputs: Tensor, upstream: Tensor | None = None) -> Step:
    """A step: the loss of the inputs, and the gradients of those that ask for one. What is no scalar needs `upstream`,
    its gradient."""
    asked = [tensor for tensor in inputs if tensor.requires_grad]

    def step() -> Sequence[Tensor]:
        for tensor in asked:
            tensor.grad = None
        loss(*inputs).backward(upstream)
        return [_gradient(tensor) for tensor in asked]

    return step


def _gradient(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError(f"no gradient for an input of shape {tuple(tensor.shape)}")
    return tensor.grad


def run(case: Case, rates: Rates, *, most_rounds: int) -> list[dict[str, Any]]:
    """One line for each provider, medians over turns, after one that is not counted: `most_rounds`, or three where a
    turn of all takes longer than ten seconds. A provider that fails, or has other gradients than ours, gets no time.
    """
    _check(case)
    times: dict[str, list[float]] = {name: [] for name in case.steps}
    started, rounds = time.perf_counter(), 0
    while rounds < most_rounds and not (rounds >= 3 and time.perf_counter() - started > 30):
        rounds += 1
        for name, step in list(case.steps.items()):
            try:
                times[name].append(case.place.seconds_of(step))
            except Exception as error:  # memory that sufficed once may not suffice again
                _leave_out(case, name, error)
                del times[name]
    limit = rates.limit(case.flops, case.exponentials, case.moved_bytes)
    ours = statistics.median(times["ours"]) if "ours" in times else None
    lines = []
    for name, taken in times.items():
        middle = statistics.median(taken)
        lines.append(
            {
                "op": case.op,
                "shape": case.shape,
                "dtype": case.place.dtype_name,
                "mode": "forward and backward",
                "provider": name,
                "median_s": middle,
                "spread_s": max(taken) - min(taken),
                "ratio_to_ours": None if ours is None else middle / ours,
                "limit_s": limit,
                "share_of_limit": limit / middle,
                "rounds": rounds,
            }
            | ({"other_work": True} if name in case.other_work else {})
        )
    return lines + [
        {"op": case.op, "shape": case.shape, "dtype": case.place.dtype_name, "provider": name, "cannot": why}
        for name, why in case.cannot.items()
    ]


def _check(case: Case) -> None:
    """Runs every provider once and moves those that fail or differ from the first to `case.cannot`."""
    expected: list[Tensor] | None = None
    for name, step in list(case.steps.items()):
        try:
            found = [gradient.double() for gradient in step()]
        except Exception as error:  # of a peer, of any kind: the others are measured all the same
            _leave_out(case, name, error)
            continue
        if name in case.other_work:
            continue
        if expected is None:
            expected = found
        size, what, allowed = _largest, "largest gradient", TOLERANCE[case.place.dtype]
        if case.norm_tolerance:
            size, what, allowed = torch.linalg.vector_norm, "norm of the gradient", case.norm_tolerance
        differences = [size(one - other) / size(other) for one, other in zip(found, expected, strict=True)]
        difference = float(torch.stack(differences).max())  # NaN where one is
        if not difference < allowed:
            case.cannot[name] = f"{REFUSED}: differs by {difference:.1e} of the {what}"
            del case.steps[name]


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def _leave_out(case: Case, name: str, error: Exception) -> None:
    case.cannot[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    del case.steps[name]


def peak_memory_mb(module: str, op: str, case: Case, provider: str) -> float | None:
    """What one step of a provider takes beyond inputs and gradients; None where it fails. What a process on a CPU has
    once held it may keep: there each provider has a process of its own."""
    if case.place.on_gpu:
        try:
            return case.place.peak_beyond_mb(case.steps[provider])
        except torch.OutOfMemoryError:
            return None
    about = {"op": op, "shape": case.shape, "provider": provider, "dtype": case.place.dtype_name}
    words = [sys.executable, "-m", module, "--memory", json.dumps(about)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def append(lines: Iterable[dict[str, Any]], file: Path) -> None:
    """Adds lines to a results file; nothing in it is ever changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with file.open("a+b", buffering=0) as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            text = text if stream.read(1) == b"\n" else f"\n{text}"  # after a line that was cut off
        stream.write(text.encode())
        os.fsync(stream.fileno())


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
        name = line["provider"] + (" *" if line.get("other_work") else "")
        rows.append(
            f"  {name:<24} {line['median_s'] * 1e3:10.2f} ms ± {line['spread_s'] * 1e3:<9.2f}"
            + (f" {ratio:7.2f} x ours" if ratio is not None else " " * 15)
            + f"   {line['share_of_limit']:6.0%} of the limit"
            + (f"   {memory:9.1f} MB" if memory is not None else "")
        )
    if any(line.get("other_work") for line in lines):
        rows.append("  * other work, for orientation")
    return "\n".join(rows)
