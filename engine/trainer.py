"""The training loop. It adds scale and bookkeeping; what is learned is the method's business."""

import copy
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import Batch, Method
from . import checkpoint
from .config import Config, ScheduleConfig
from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case, Store
from .deepspeed import Ranks, full_optimizer_state, load_full_state
from .errors import UserError
from .monitor import Monitor
from .signals import StopSignal
from .weights import RUN_WEIGHTS, save_weights


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; the same command continues"
        )
        self.signal_number = signal_number


class Trainer:
    """One run: `engine` is the DeepSpeed engine around `method`."""

    def __init__(
        self,
        engine: Any,
        method: Method,
        config: Config,
        ranks: Ranks,
        store: Store,
        cases: Sequence[Case],
        held_aside: Sequence[Case],
        unreadable: Mapping[str, str],
        description: dict[str, Any],
    ) -> None:
        self.engine, self.method, self.config, self.ranks = engine, method, config, ranks
        self.store, self.cases, self.held_aside = store, cases, held_aside
        self.unreadable = dict(unreadable)
        self.description = description
        self.run = Path(config.output)
        self.average: dict[str, Tensor] = {}
        self.signal = StopSignal()

    def train(self) -> None:
        start = self._resume()
        steps = self.config.train.steps
        if start == steps:
            self.ranks.on_first(lambda: self._save_weights(start))
            if self.ranks.first:
                print(f"{self.run} has taken all of its {steps} steps; nothing to do", file=sys.stderr)
            return
        with self.signal, Monitor(self.run, self.ranks, start, steps) as monitor, self._views(start) as views:
            validation = self._validation_batches()
            self._preflight(validation or self._draw(self.cases, "validation", 1), monitor)
            if start == 0 and validation:
                monitor.validation(0, self._validate(validation, 0))
            batches_of_steps = iter(views)
            for step in range(start, steps):
                began = time.perf_counter()
                batches = self._next(batches_of_steps, step, start)
                waited = time.perf_counter() - began
                numbers, stop = self._step(batches, step)
                seconds = time.perf_counter() - began
                monitor.step(
                    step + 1,
                    numbers
                    | {
                        "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
                        "samples_per_second": self.config.train.global_batch / seconds,
                        "data_wait": waited / seconds,
                        "memory_mb": monitor.memory_mb(),
                    },
                )
                done = step + 1
                last = done == steps
                every = self.config.validation.every
                if validation and ((every and done % every == 0) or last):
                    monitor.validation(done, self._validate(validation, done))
                if stop or last or done % self.config.checkpoint.every == 0:
                    self._save(done)
                if stop and not last:
                    raise Interrupted(self.signal.number or signal.SIGTERM, done)

    def _next(self, views: Iterator[list[Batch]], step: int, start: int) -> list[Batch]:
        try:
            return next(views)
        except UserError:
            # A volume that cannot be read any more must not cost the steps since the last checkpoint. Several ranks
            # cannot save here: the others are on their way into the step.
            if self.ranks.size == 1 and step > start:
                self._save(step)
            raise

    def _step(self, batches: list[Batch], step: int) -> tuple[dict[str, float], bool]:
        """One optimizer step over the micro-batches: its numbers over the global batch, and whether to stop."""
        _set_rate(
            self.engine,
            self.config.optimizer.learning_rate * rate_factor(self.config.schedule, step, self.config.train.steps),
        )
        batches = [_to_device(batch, self.ranks.device) for batch in batches]
        self._share(batches)
        numbers: dict[str, Tensor] = {}
        for batch in batches:
            losses = self.engine(batch, step)
            total = torch.stack(list(losses.values())).sum()
            self.engine.backward(total)
            self.engine.step()
            for name, value in _named(total, losses, self.method.monitors).items():
                numbers[name] = numbers.get(name, 0) + value / len(batches)
        self.method.after_step(step)
        self._update_average()
        return self._reduce(numbers, step)

    def _share(self, batches: list[Batch]) -> None:
        """Tells each part of the global batch its share of what the means divide by (see `Method`)."""
        own = [self.method.counts(batch) for batch in batches]
        names = sorted(own[0])
        if not names:
            return
        counts = torch.stack([torch.stack([count[name].double() for name in names]) for count in own])
        total = self.ranks.sum(counts.sum(0))
        shares = (counts * (len(batches) * self.ranks.size) / total.clamp(min=1e-12)).float()
        for batch, share in zip(batches, shares, strict=True):
            batch["share"] = dict(zip(names, share, strict=True))

    def _reduce(self, numbers: dict[str, Tensor], step: int) -> tuple[dict[str, float], bool]:
        names = list(numbers)
        # The signal travels with the numbers: every rank stops after the same step.
        values = torch.stack(
            [
                *(numbers[name].double() for name in names),
                torch.tensor(float(self.signal.number != 0), dtype=torch.float64, device=self.ranks.device),
            ]
        )
        mean = self.ranks.mean(values).tolist()
        if not math.isfinite(mean[0]):
            raise UserError(
                f"step {step + 1}: the loss is {mean[0]}; the last checkpoint is whole. Lower "
                f"optimizer.learning_rate, set optimizer.gradient_clip, or use train.autocast=off"
            )
        return dict(zip(names, mean, strict=False)), mean[-1] > 0

    @torch.no_grad()
    def _validate(self, batches: list[Batch], step: int) -> dict[str, float]:
        self.engine.eval()
        numbers: dict[str, Tensor] = {}
        for held in batches:
            batch = _to_device(held, self.ranks.device)
            self._share([batch])
            losses = self.engine(batch, step)
            total = torch.stack(list(losses.values())).sum()
            for name, value in _named(total, losses, self.method.monitors).items():
                numbers[name] = numbers.get(name, 0) + value / len(batches)
        self.engine.train()
        mean = self.ranks.mean(torch.stack([value.double() for value in numbers.values()])).tolist()
        return {
            name.removeprefix("loss/").removeprefix("monitor/"): value
            for name, value in zip(numbers, mean, strict=True)
        }

    def _preflight(self, batches: list[Batch], monitor: Monitor) -> None:
        try:
            numbers = self.method.preflight(batches, self.ranks.sum)
        except ValueError as error:
            raise UserError(str(error)) from None
        if numbers:
            monitor.say("before the first step: " + "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))

    def _views(self, start: int) -> ViewPipeline:
        return self._pipeline(self.cases, start, "train", self.config.train.accumulation)

    def _validation_batches(self) -> list[Batch]:
        """The held-aside views: drawn once, the same at every step and for every number of ranks."""
        if not self.held_aside or not self.config.validation.every:
            return []
        return self._draw(self.held_aside, "validation", self.config.validation.batches)

    def _draw(self, cases: Sequence[Case], split: str, steps: int) -> list[Batch]:
        with self._pipeline(cases, 0, split, 1) as views:
            return [batches[0] for batches in itertools.islice(views, steps)]

    def _pipeline(self, cases: Sequence[Case], start: int, split: str, accumulation: int) -> ViewPipeline:
        loader = self.config.loader
        return ViewPipeline(
            self.store,
            cases,
            self.method.views,
            seed=self.config.seed,
            global_batch=self.config.train.global_batch,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            accumulation=accumulation,
            start_step=start,
            split=split,
            device_id=self.ranks.local_rank if self.ranks.device.type == "cuda" else None,
            threads=loader.threads,
            prefetch=loader.prefetch,
            sampling=self.config.sampling if split == "train" else of_validation(self.config.sampling),
            on_error=loader.on_error,
            unreadable=self.unreadable,
        )

    def _resume(self) -> int:
        state, damaged = checkpoint.load_latest(self.run / "checkpoints")
        if self.ranks.first:
            for line in damaged:
                print(f"skipped: {line}", file=sys.stderr)
        step = state.step if state else 0
        if self.ranks.mean(torch.tensor(float(step))).item() != step:
            raise UserError(
                f"output: the ranks do not see the same checkpoints in {self.run}; it must be a folder that all of "
                f"the machines share"
            )
        if state is None:
            if self.config.train.ema_decay:
                self.average = {name: p.detach().float().clone() for name, p in self.method.named_parameters()}
            return 0
        if state.step > self.config.train.steps:
            raise UserError(
                f"train.steps: {self.config.train.steps} is less than the {state.step} steps that "
                f"{self.run} has taken; choose more, or another output"
            )
        load_full_state(self.engine, state.model, state.optimizer)
        self.average = {name: tensor.to(self.ranks.device) for name, tensor in state.average.items()}
        return state.step

    def _update_average(self) -> None:
        decay = self.config.train.ema_decay
        if decay:
            with torch.no_grad():
                for name, parameter in self.method.named_parameters():
                    self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def _save(self, step: int) -> None:
        self.ranks.check_equal(self.method)
        optimizer = full_optimizer_state(self.engine)

        def write() -> None:
            state = checkpoint.State(step, self.method.state_dict(), optimizer, self.average)
            checkpoint.save_checkpoint(self.run / "checkpoints", state, self.config.checkpoint.keep)
            self._save_weights(step)

        self.ranks.on_first(write)

    def _save_weights(self, step: int) -> None:
        save_weights(self.run / RUN_WEIGHTS, self._transferable(), self.description | {"step": step})

    def _transferable(self) -> dict[str, Tensor]:
        if not self.average:
            return self.method.transferable()
        averaged = copy.deepcopy(self.method)
        averaged.load_state_dict(self.average, strict=False)
        return averaged.transferable()


def rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up, then cosine or constant."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _set_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _named(total: Tensor, losses: dict[str, Tensor], monitors: dict[str, Tensor]) -> dict[str, Tensor]:
    return (
        {"loss": total.detach()}
        | {f"loss/{name}": value.detach() for name, value in losses.items()}
        | {f"monitor/{name}": value.detach() for name, value in monitors.items()}
    )


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
