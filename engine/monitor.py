"""What a run says of itself: JSON lines always, TensorBoard and a progress bar on the first rank."""

import contextlib
import json
import math
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from .errors import UserError
from .ranks import Ranks
from .weights import write_whole


class Monitor:
    """Writes RUN/log.jsonl, RUN/validation.jsonl, RUN/tensorboard and a progress bar; all on the first rank alone."""

    def __init__(self, run: Path, ranks: Ranks, start: int, steps: int) -> None:
        self.active, self.run = ranks.first, run
        self.on_gpu = ranks.device.type == "cuda"
        if not self.active:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        self.log, self.held_aside = (_LineFile(run / name, start) for name in ("log.jsonl", "validation.jsonl"))
        try:
            self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else 0)
        except OSError as error:
            raise _not_written(run / "tensorboard", error) from None
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("pretrain"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("pretrain", total=steps, completed=start, numbers="")
        self.bar.start()

    def step(self, step: int, values: dict[str, float], words: dict[str, str]) -> None:
        """One optimizer step: numbers and words by name; `step` counts from 1. A warning is also said aloud."""
        if not self.active:
            return
        if not self.run.is_dir():
            raise vanished(self.run)
        self.log.write({"step": step, **words, **values})
        if "warning" in words:
            self.say(f"warning: step {step}: {words['warning']}")
        self._draw(step, values)
        numbers = (
            f"loss {values['loss']:.4g}  {values['samples_per_second']:.2f} samples/s  "
            f"data wait {values['data_wait']:.0%}  {values['memory_mb']:.0f} MB"
        )
        self.bar.update(self.task, completed=step, numbers=numbers)
        if self.bar.disable and (step == 1 or step % 25 == 0 or step == self.bar.tasks[0].total):
            self.say(f"step {step}: {numbers}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        self.held_aside.write({"step": step, **values})
        self._draw(step, {f"validation/{name}": value for name, value in values.items()})
        self.say(f"step {step}: held aside: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def say(self, line: str) -> None:
        if self.active:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def memory_mb(self) -> float:
        """Peak of the device's memory, or what this process holds now."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 1e6
        return psutil.Process().memory_info().rss / 1e6

    def _draw(self, step: int, values: dict[str, float]) -> None:
        try:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        except OSError as error:  # of an earlier write: a thread does them
            raise _not_written(Path(self.tensorboard.log_dir), error) from None

    def _hear(self, arguments: threading.ExceptHookArgs) -> None:
        """Of what fails in a thread, TensorBoard's failed writes are not printed: its next call raises them."""
        if not (isinstance(arguments.exc_value, OSError) and "tensorboard" in type(arguments.thread).__module__):
            self._heard_before(arguments)

    def __enter__(self) -> "Monitor":
        self._heard_before, threading.excepthook = threading.excepthook, self._hear
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        threading.excepthook = self._heard_before
        if self.active:
            self.bar.stop()
            self.log.close()
            self.held_aside.close()
            with contextlib.suppress(OSError):
                self.tensorboard.close()


class _LineFile:
    """A file of JSON lines that goes on after a step: a resumed run writes the steps after its checkpoint again."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if _step(line) <= start and start > 0]
        write_whole(path, lambda partial: partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))
        try:
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _not_written(path, error) from None

    def write(self, values: dict[str, Any]) -> None:
        try:
            # JSON has no word for what is not finite.
            known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
            self.file.write(json.dumps(known) + "\n")
            self.file.flush()
        except OSError as error:
            raise _not_written(self.path, error) from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def vanished(run: Path) -> UserError:
    return UserError(
        f"output: {run} has vanished in the course of the run, so nothing can be saved; bring it back (is its disk "
        f"still mounted?), then run the same command again: it continues from the last checkpoint in it"
    )


def _not_written(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or make its folder writable, then run "
        f"the same command again: it continues from the last checkpoint"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
