"""Saving and resuming: one file of full tensors by name, for every ZeRO stage and number of ranks.

RUN/checkpoints/step-00000100.pt with step-00000100.json (step, bytes, sha256) beside it. The JSON is written last:
a checkpoint without it was cut off and does not count.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.store import file_sha256
from .errors import UserError

FORMAT = 1


@dataclass
class State:
    """Everything that a run continues from. The data plane needs the step alone."""

    step: int  # optimizer steps taken
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]  # moving average of the parameters; empty where it is off


def save_checkpoint(folder: Path, state: State, keep: int) -> Path:
    """Writes one checkpoint so that a kill at any moment leaves the one before it whole; then drops the oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state.step:08d}.pt"
    temporary = path.with_suffix(".pt.part")
    try:
        torch.save({"format": FORMAT, **vars(state)}, temporary)
        _flush(temporary)
        digest = file_sha256(temporary)
        os.replace(temporary, path)
        description = {"step": state.step, "bytes": path.stat().st_size, "sha256": digest}
        _write_text(path.with_suffix(".json"), json.dumps(description))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot write the checkpoint ({error.strerror or error}); free some space or choose "
            f"another output; the checkpoints before it are whole"
        ) from None
    except RuntimeError as error:  # torch's file writer reports a full disk so
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot write the checkpoint ({str(error).splitlines()[0]}); free some space or choose "
            f"another output; the checkpoints before it are whole"
        ) from None
    for _, old in finished_checkpoints(folder)[:-keep]:
        old.with_suffix(".json").unlink()
        old.unlink(missing_ok=True)
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
    if content.pop("format") != FORMAT:
        raise UserError(f"{path}: written by another version of voxtrast; this one reads format {FORMAT}")
    return State(**content)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".json.part")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, path)
