"""Saving while training goes on: the state is copied at its step, and a thread writes the copy."""

import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..methods.stages import Moment
from . import checkpoint
from .checkpoint import State
from .config import CheckpointConfig, Config
from .errors import UserError
from .monitor import vanished
from .versions import versions
from .weights import RUN_WEIGHTS, save_weights

BEST_WEIGHTS = "weights-best.safetensors"
ROOM = 2  # times what a save writes must be free: another process writes, too


class Saver:
    """Writes RUN/checkpoints and the weights files, one save at a time; on the first rank alone.

    While it is entered a save may be under way; leaving waits for it, but for an interrupt from the keyboard, which
    leaves the checkpoint before it. What went wrong in a save is raised by the next one, or by `finish`.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self.run, self.config = run, config
        self.folder = run / "checkpoints"
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, state: State, weights: Mapping[str, Tensor], about: Mapping[str, Any], held_aside: float | None
    ) -> None:
        """Copies and begins to write; the caller may change everything once this returns.

        Args:
            state: its optimizer states must be copies already, as those of a `Learner` are.
            weights, about: tensors and description of the weights files.
            held_aside: the loss of the cases held aside, where it was measured after this step.

        Raises: UserError where the save before failed, the folder has vanished, or the disk is nearly full.
        """
        self.finish()
        copies = _HostCopies()
        state = replace(
            state,
            model=copies.of(state.model),
            average=copies.of(state.average),
            adversary=copies.of(state.adversary),
        )
        tensors = copies.of(weights)
        self._check_room(state, copies)
        # No copy of what is written now, and a daemon: a second Ctrl-C ends the process without it.
        arguments = (state, tensors, dict(about), held_aside)
        self._thread = threading.Thread(target=self._run, args=arguments, name="voxtrast-saver", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way, and raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(
        self, state: State, tensors: Mapping[str, Tensor], about: Mapping[str, Any], held_aside: float | None
    ) -> None:
        try:
            checkpoint.save_checkpoint(
                self.folder,
                state,
                self.config.keep,
                keep_best=self.config.keep_best,
                held_aside=held_aside,
                when_best=lambda: save_weights(self.run / BEST_WEIGHTS, tensors, about),
            )
            save_weights(self.run / RUN_WEIGHTS, tensors, about)
        except BaseException as error:  # for the thread that trains
            self._error = error

    def _check_room(self, state: State, copies: "_HostCopies") -> None:
        if not self.run.is_dir():
            raise vanished(self.run)
        optimizers = (*state.optimizer.values(), *state.adversary_optimizer.values())
        size = copies.bytes + sum(tensor.nbytes for values in optimizers for tensor in values.values())
        free = shutil.disk_usage(self.run).free
        if free < ROOM * size:
            last = checkpoint.finished_checkpoints(self.folder)
            raise UserError(
                f"output: {free / 1e6:.0f} MB are free for {self.run}, and a save of {size / 1e6:.0f} MB is begun with "
                f"{ROOM} times as much; nothing of step {state.step} was written, the last checkpoint is "
                f"{f'that of step {last[-1][0]}' if last else 'missing'}. Free some space, or lower checkpoint.keep, "
                f"then run the same command again: it continues"
            )

    def __enter__(self) -> "Saver":
        for partial in self.run.glob(".weights*.partial"):  # of a process that was killed while it wrote weights
            partial.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:
            self._thread.join()
        if self._error is not None and error is not None and error is not self._error:
            print(f"the last save failed as well: {self._error}", file=sys.stderr)  # what ends the run is another error


def origin_of(config: Config, moment: Moment, rate: float) -> dict[str, Any]:
    """What a state says of where it comes from: fields of `State`.

    Args:
        moment: of the last step taken.
        rate: learning rate of that step.
    """
    place = {"steps": config.train.steps, "held_aside_batches": config.validation.batches,
             "stage": moment.index, "stage_name": moment.stage.name,
             "stage_first": moment.first, "stage_last": moment.last, "learning_rate": rate}  # fmt: skip
    return {
        "method": config.method.name,
        "backbone": config.backbone.to_dict(),
        "schedule": place,
        "versions": versions(),
    }


class _HostCopies:
    """Copies in the host's memory; one of each tensor, however many names it has."""

    def __init__(self) -> None:
        self.bytes = 0
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # the original is kept: its address is its key

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._copy(tensor) for name, tensor in tensors.items()}

    def _copy(self, tensor: Tensor) -> Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or place not in self._made:
            made = tensor.detach().to("cpu", copy=True)
            self.bytes += made.nbytes
            if tensor.numel() == 0:  # all of these have the same address
                return made
            self._made[place] = tensor, made
        return self._made[place][1]
