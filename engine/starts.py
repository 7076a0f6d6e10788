"""RUN/starts.jsonl: one line each time a run starts or continues: when, on what, and by which code."""

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .versions import commit, versions

FILE = "starts.jsonl"


def note_start(run: Path, *, step: int, ranks: int, device: torch.device) -> None:
    """Appends the line of this start.

    Args:
        step: the run goes on after this one.
        device: of the first rank.

    Raises: UserError where it cannot be written.
    """
    line = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "ranks": ranks,
        "device": device_name(device.type),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "versions": versions(),
    }
    try:
        with open(run / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(
            f"{run / FILE}: cannot be written ({error.strerror or error}); free some space or make its folder "
            f"writable, then run the same command again"
        ) from None


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts of a run, the last one last, without a line that a kill cut off; none where nothing was noted."""
    try:
        text = (run / FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            start = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(start, dict):
            found.append(start)
    return found


def device_name(kind: str) -> str:
    """Of the GPU where `kind` is cuda, of the processor otherwise."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return platform.machine()
