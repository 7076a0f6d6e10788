"""Saving and resuming: one file of full tensors by name, for every ZeRO stage and number of ranks.

RUN/checkpoints/step-00000100.pt with step-00000100.json (step, bytes, sha256) beside it. The JSON is written last:
a checkpoint without it was cut off and does not count.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.store import file_sha256
from .errors import UserError
from .weights import write_whole

FORMAT = 2
READABLE = (1, FORMAT)  # the first knew no adversary and no stages


@dataclass
class State:
    """Everything that a run continues from. The data plane needs the step alone."""

    step: int  # optimizer steps taken
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]  # moving average of the parameters; empty where it is off
    adversary: dict[str, Tensor] = field(default_factory=dict)
    adversary_optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)  # transferable tensors that a stage took from a weights file
    scaler: dict[str, dict[str, float]] = field(default_factory=dict)  # loss scales of float16: method, adversary


def save_checkpoint(folder: Path, state: State, keep: int) -> Path:
    """Writes one checkpoint so that a kill at any moment leaves the one before it whole; then drops the oldest.

    Checkpoints of later steps go as well: the run was resumed from before them, so they are damaged.
    """
    path = folder / f"step-{state.step:08d}.pt"
    write_whole(path, lambda partial: torch.save({"format": FORMAT, **vars(state)}, partial))
    description = json.dumps({"step": state.step, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    write_whole(path.with_suffix(".json"), lambda partial: partial.write_text(description))
    earlier = [old for step, old in finished_checkpoints(folder) if step <= state.step]
    kept = {each.name for old in earlier[-keep:] for each in (old, old.with_suffix(".json"))}
    for file in [*folder.glob("*.json"), *folder.glob("*.pt"), *folder.glob(".*.partial")]:
        if file.name not in kept:
            file.unlink(missing_ok=True)
    return path


def finished_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every finished checkpoint, oldest first."""
    found = []
    for description in folder.glob("step-*.json"):
        path = description.with_suffix(".pt")
        if path.exists():
            found.append((int(path.stem.removeprefix("step-")), path))
    return sorted(found)


def load_latest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not."""
    damaged: list[str] = []
    for _, path in reversed(finished_checkpoints(folder)):
        try:
            return load_checkpoint(path), damaged
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{folder}: no checkpoint is whole ({'; '.join(damaged)}); move the folder away to start anew")
    return None, []


def load_checkpoint(path: Path) -> State:
    """Reads one checkpoint after checking its checksum."""
    try:
        description = json.loads(path.with_suffix(".json").read_text())
        if file_sha256(path) != description["sha256"]:
            raise UserError(f"{path}: its content does not match its checksum; delete it to resume from the one before")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not readable ({error}); delete it to resume from the one before") from None
    if content.pop("format") not in READABLE:
        raise UserError(f"{path}: written by another version of voxtrast; this one reads formats {READABLE}")
    return State(**content)
