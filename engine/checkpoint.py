"""Checkpoints: one file of full tensors by name, for every ZeRO stage and number of ranks.

RUN/checkpoints/step-00000100.pt with step-00000100.json beside it (step, bytes, sha256, and what a person or the
retention wants to know). The JSON is written last: a checkpoint without it was cut off and does not count.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .data.store import file_sha256
from .errors import UserError
from .weights import write_whole

FORMAT = 3
READABLE = (1, 2, FORMAT)  # the first knew no adversary and no stages, the second not who had written it


class DamagedError(UserError):
    """A checkpoint that is not what was written; the one before it may be."""


@dataclass
class State:
    """Everything that a run continues from. The data plane needs the step alone."""

    step: int  # optimizer steps taken, and dropped
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor]  # moving average of the parameters; empty where it is off
    adversary: dict[str, Tensor] = field(default_factory=dict)
    adversary_optimizer: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)  # transferable tensors that a stage took from a weights file
    scaler: dict[str, dict[str, float]] = field(default_factory=dict)  # loss scales of float16: method, adversary
    method: str = ""  # its name; empty before format 3, as all that follows
    backbone: dict[str, Any] = field(default_factory=dict)  # its configuration
    schedule: dict[str, Any] = field(default_factory=dict)  # the place in it: steps, stage, learning_rate
    guards: dict[str, Any] = field(default_factory=dict)  # what they remember of earlier steps
    versions: dict[str, str] = field(default_factory=dict)  # of what computes


def save_checkpoint(
    folder: Path,
    state: State,
    keep: int,
    *,
    keep_best: bool = False,
    held_aside: float | None = None,
    when_best: Callable[[], None] = lambda: None,
) -> Path:
    """Writes one checkpoint so that a kill at any moment leaves the one before it whole; then drops the oldest.

    Checkpoints of later steps go as well: the run was resumed from before them, so they are damaged.

    Args:
        folder: RUN/checkpoints; made where it is missing.
        keep: how many of the newest stay.
        keep_best: whether the best of this stage stays besides, see `best_step`.
        held_aside: the loss of the cases held aside, where it was measured after this step.
        when_best: called before a checkpoint that is the best one counts.

    Raises: UserError where it cannot be written.
    """
    path = folder / f"step-{state.step:08d}.pt"
    if path.with_suffix(".json").exists():  # of a damaged one of this step: it must not describe what comes now
        _remove(path.with_suffix(".json"))
    sums: list[Any] = []
    write_whole(path, lambda partial: sums.append(_write_hashed(partial, {"format": FORMAT, **vars(state)})))
    sync_folder(folder)
    number, best = stage_of(state), None
    measured = held_aside if held_aside is not None and math.isfinite(held_aside) else None
    if keep_best:
        best = best_step(folder, number, state.step - 1, state.schedule.get("held_aside_batches"))
        if measured is not None and (best is None or measured <= _description(folder, best)["held_aside"]):
            best = state.step
            when_best()
    size, sha256 = sums[0]
    about = {"format": FORMAT, "step": state.step, "bytes": size, "sha256": sha256, "method": state.method,
             "stage": number, "views": state.schedule.get("held_aside_batches"), "held_aside": measured, "best": best,
             "versions": state.versions}  # fmt: skip
    write_whole(path.with_suffix(".json"), lambda partial: partial.write_text(json.dumps(about)))
    sync_folder(folder)
    earlier = [old for step, old in finished_checkpoints(folder) if step <= state.step]
    stays = earlier[-keep:] + [old for old in earlier if best is not None and old.name == f"step-{best:08d}.pt"]
    kept = {each.name for old in stays for each in (old, old.with_suffix(".json"))}
    for file in [*folder.glob("*.json"), *folder.glob("*.pt"), *folder.glob(".*.partial")]:
        if file.name not in kept:
            _remove(file)
    return path


def stage_of(state: State) -> int:
    """The number of the stage that a state is of; the losses of two stages cannot be compared."""
    return int(state.schedule.get("stage", 0))


def best_step(folder: Path, stage: int, until: int, views: int | None) -> int | None:
    """The step of the checkpoint, up to `until`, with the lowest loss of the cases held aside in this stage.

    `views`: `validation.batches`; losses of other views cannot be compared.
    """
    found = []
    for step, _ in finished_checkpoints(folder):
        about = _description(folder, step)
        if (
            step <= until
            and about.get("held_aside") is not None
            and (about.get("stage"), about.get("views")) == (stage, views)
        ):
            found.append((about["held_aside"], -step))
    return -min(found)[1] if found else None


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power; some file systems know no such thing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


class _Hashing:
    """A file that is hashed as it is written; torch.save writes from the first byte to the last."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.file.write(content)
        self.sha256.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self.file.flush()


def _write_hashed(partial: Path, content: Any) -> tuple[int, str]:
    with open(partial, "wb") as file:
        hashing = _Hashing(file)
        torch.save(content, hashing)  # type: ignore[arg-type]  # only writes
    return hashing.size, hashing.sha256.hexdigest()


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be removed ({error.strerror}); make its folder writable") from None


def _description(folder: Path, step: int) -> dict[str, Any]:
    """Empty where it is damaged."""
    try:
        found = json.loads((folder / f"step-{step:08d}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def finished_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every finished checkpoint, oldest first."""
    return sorted(_finished(folder))


def _finished(folder: Path) -> Iterator[tuple[int, Path]]:
    for description in folder.glob("step-*.json"):
        path, number = description.with_suffix(".pt"), description.stem.removeprefix("step-")
        if number.isdigit() and path.exists():
            yield int(number), path


def load_latest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Raises: UserError where none is whole, or where the newest is of a format that this version does not know.
    """
    damaged: list[str] = []
    for _, path in reversed(finished_checkpoints(folder)):
        try:
            return load_checkpoint(path), damaged
        except DamagedError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError(f"{folder}: no checkpoint is whole ({'; '.join(damaged)}); move the folder away to start anew")
    return None, []


def load_checkpoint(path: Path) -> State:
    """Reads one checkpoint after checking its checksum.

    Raises: DamagedError where it is not what was written, UserError where its format is unknown.
    """
    try:
        description = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if file_sha256(path) != description["sha256"]:
            raise DamagedError(
                f"{path}: its content does not match its checksum; delete it to resume from the one before"
            )
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = content.pop("format")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path}: not readable ({error}); delete it to resume from the one before") from None
    if found not in READABLE:
        raise UserError(
            f"{path}: has format {found}, and this version of voxtrast reads {', '.join(map(str, READABLE))}; continue "
            f"with the version that wrote it ({description.get('versions', {}).get('voxtrast', 'a newer one')}), or "
            f"delete it to resume from the one before"
        )
    return State(**content)
