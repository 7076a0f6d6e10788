"""What a run says of itself: JSON lines always, TensorBoard and a progress bar on the first rank."""

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from .deepspeed import Ranks


class Monitor:
    """Writes RUN/log.jsonl, RUN/tensorboard and a progress bar; on ranks other than the first it does nothing."""

    def __init__(self, run: Path, ranks: Ranks, start: int, steps: int) -> None:
        self.active = ranks.first
        self.on_gpu = ranks.device.type == "cuda"
        if not self.active:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from torch.utils.tensorboard import SummaryWriter

        _drop_lines_after(run / "log.jsonl", start)
        self.log = (run / "log.jsonl").open("a")
        self.tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start)
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

    def step(self, step: int, values: dict[str, float]) -> None:
        """One optimizer step: numbers by name; `step` counts from 1."""
        if not self.active:
            return
        self._write(step, values)
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
        self._write(step, {f"validation/{name}": value for name, value in values.items()})
        self.say(f"step {step}: held aside: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def say(self, line: str) -> None:
        if self.active:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def memory_mb(self) -> float:
        """Peak of the device's memory, or what this process holds now."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 1e6
        return psutil.Process().memory_info().rss / 1e6

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self.log.write(json.dumps({"step": step, **values}) + "\n")
        self.log.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.stop()
            self.log.close()
            self.tensorboard.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """A resumed run writes the steps after its checkpoint again; a line cut off by a kill goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".jsonl.part")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
