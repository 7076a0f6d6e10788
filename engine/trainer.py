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
from ..methods.stages import Moment
from . import checkpoint, stages
from .config import Config, ScheduleConfig
from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case, Store
from .errors import UserError
from .learner import Learner
from .monitor import Monitor
from .ranks import Ranks
from .runs import build_method
from .signals import StopSignal
from .watchdog import at
from .weights import RUN_WEIGHTS, save_weights


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} after step {step}; the same command continues"
        )
        self.signal_number = signal_number


class Trainer:
    """One run: `learner` holds the method in its DeepSpeed engine, `critic` its adversary where there is one."""

    def __init__(
        self,
        learner: Learner,
        critic: Learner | None,
        method: Method,
        config: Config,
        ranks: Ranks,
        store: Store,
        cases: Sequence[Case],
        held_aside: Sequence[Case],
        unreadable: Mapping[str, str],
        description: dict[str, Any],
    ) -> None:
        self.learner, self.critic, self.method, self.config, self.ranks = learner, critic, method, config, ranks
        self.store, self.cases, self.held_aside = store, cases, held_aside
        self.unreadable = dict(unreadable)
        self.description = description
        self.run = Path(config.output)
        self.average: dict[str, Tensor] = {}
        self.resumed_at = 0
        self.loaded: list[str] = []  # transferable tensors that a stage took from a weights file
        self.signal = StopSignal()

    def train(self) -> None:
        start = self.resumed_at = self._resume()
        steps = self.config.train.steps
        if start == steps:
            self.ranks.on_first(lambda: self._save_weights(start))
            if self.ranks.first:
                print(f"{self.run} has taken all of its {steps} steps; nothing to do", file=sys.stderr)
            return
        moments = [moment for moment in self.method.schedule.moments if moment.last > start]
        for moment in moments:
            if moment.first >= start:
                stages.check_start(moment, self.method)
        with self.signal, Monitor(self.run, self.ranks, start, steps) as monitor:
            validation = self._validation_batches()
            self._preflight(validation or self._draw(self.cases, "validation", 1), monitor)
            for moment in moments:
                self._train_stage(moment, max(start, moment.first), validation, monitor)

    def _train_stage(self, moment: Moment, start: int, validation: list[Batch], monitor: Monitor) -> None:
        global_batch = self.method.schedule.batch(start, self.config.train.global_batch)
        for each in self._learners():
            each.set_micro_batch(global_batch // (self.ranks.size * self.config.train.accumulation))
        if start == moment.first:
            self._begin(moment, global_batch, monitor)
        if start == 0 and validation:
            monitor.validation(0, self._validate(validation, 0))
        with self._pipeline(self.cases, start, "train", self.config.train.accumulation, global_batch) as views:
            for step in range(start, moment.last):
                began = time.perf_counter()
                at("waiting for views", step + 1)
                batches = self._next(views, step)
                waited = time.perf_counter() - began
                at("training")
                numbers, stop = self._step(batches, step, moment)
                seconds = time.perf_counter() - began
                monitor.step(
                    step + 1,
                    numbers
                    | {
                        "learning_rate": self.learner.rate,
                        "samples_per_second": global_batch / seconds,
                        "data_wait": waited / seconds,
                        "memory_mb": monitor.memory_mb(),
                    },
                    self._words(step, numbers, moment),
                )
                self._after(step + 1, stop, validation, monitor)
            self.unreadable |= views.unreadable

    def _after(self, done: int, stop: bool, validation: list[Batch], monitor: Monitor) -> None:
        last, every = done == self.config.train.steps, self.config.validation.every
        if validation and ((every and done % every == 0) or last):
            monitor.validation(done, self._validate(validation, done))
        if stop or last or done % self.config.checkpoint.every == 0:
            self._save(done)
        if stop and not last:
            raise Interrupted(self.signal.number or signal.SIGTERM, done)

    def _begin(self, moment: Moment, global_batch: int, monitor: Monitor) -> None:
        """What a stage starts from."""
        stage, network = moment.stage, "as it is"
        if moment.first > 0 and stage.fresh_optimizer:
            for each in self._learners():
                each.forget_moments()
        if stage.start == "initial":
            network = "initial"
            fresh = build_method(self.config)
            self.learner.load_module(fresh.state_dict())
            if self.critic and fresh.adversary:
                self.critic.load_module(fresh.adversary.state_dict())
            self.loaded = []
        elif stage.start != "previous":
            network = stage.start
            self.loaded = stages.take_weights(stage.start, self.method)
            self.method.weights_loaded(moment.first)
            self.learner.parameters_changed()
        if stage.start != "previous" and self.average:
            self.average = stages.parameters_of(self.method)
        if self.config.stages:
            optimizer = "kept" if moment.first > 0 and not stage.fresh_optimizer else "fresh"
            monitor.say(
                f"step {moment.first + 1}: stage {stage.name!r} ({moment.index + 1} of {len(self.config.stages)}), "
                f"{moment.last - moment.first} steps of {global_batch} samples, learning rate {self._rate(moment):g}, "
                f"terms {', '.join(self.method.weights(moment.first))}; network: {network}, optimizer: {optimizer}"
            )

    def _learners(self) -> list[Learner]:
        return [self.learner] if self.critic is None else [self.learner, self.critic]

    def _rate(self, moment: Moment) -> float:
        return moment.stage.learning_rate or self.config.optimizer.learning_rate

    def _words(self, step: int, numbers: dict[str, float], moment: Moment) -> dict[str, str]:
        """What the line of a step says beside its numbers."""
        words = {"stage": moment.stage.name} if self.config.stages else {}
        warning = self.method.warning(step, numbers | {"learning_rate": self.learner.rate})
        return words | {"warning": warning} if warning else words

    def _next(self, views: Iterator[list[Batch]], step: int) -> list[Batch]:
        try:
            return next(views)
        except UserError:
            # A volume that cannot be read any more must not cost the steps since the last checkpoint. Several ranks
            # cannot save here: the others are on their way into the step.
            if self.ranks.size == 1 and step > self.resumed_at:
                self._save(step)
            raise

    def _step(self, batches: list[Batch], step: int, moment: Moment) -> tuple[dict[str, float], bool]:
        """One optimizer step over the micro-batches: its numbers over the global batch, and whether to stop."""
        factor = rate_factor(self.config.schedule, step - moment.first, moment.last - moment.first)
        self.learner.rate = self._rate(moment) * factor
        batches = [_to_device(batch, self.ranks.device) for batch in batches]
        self._share(batches)
        self._exchange(batches, step)
        numbers: dict[str, Tensor] = {}
        for batch in batches:
            losses = self.learner(batch, step)
            total = torch.stack(list(losses.values())).sum()
            self.learner.learn(total)
            _add(numbers, _named(total, losses, self.method.monitors), len(batches))
        if self.critic is not None and "adversarial" in self.method.weights(step):
            for batch in batches:
                _add(numbers, self._critic_step(self.critic, batch), len(batches))
        self.method.after_step(step)
        self._update_average()
        return self._reduce(numbers, step)

    def _exchange(self, batches: list[Batch], step: int) -> None:
        # In the precision of the forward, which the engine sees to: what is shared must not depend on the parts.
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.train.autocast == "bfloat16"):
            self.method.exchange(batches, step)

    def _critic_step(self, critic: Learner, batch: Batch) -> dict[str, Tensor]:
        losses = critic(*self.method.adversary_inputs(batch))
        critic.learn(torch.stack(list(losses.values())).sum())
        seen: dict[str, Tensor] = losses | getattr(critic.module, "monitors", {})
        return {f"adversary/{name}": value.detach() for name, value in seen.items()}

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
                f"optimizer.learning_rate, set optimizer.gradient_clip, or use train.autocast=none"
            )
        return dict(zip(names, mean, strict=False)), mean[-1] > 0

    @torch.no_grad()
    def _validate(self, batches: list[Batch], done: int) -> dict[str, float]:
        """Losses on the held-aside views with the terms of the step taken last."""
        at("validating")
        step = max(0, done - 1)
        for each in self._learners():
            each.train(False)
        numbers: dict[str, Tensor] = {}
        for held in batches:
            batch = _to_device(held, self.ranks.device)
            self._share([batch])
            self._exchange([batch], step)
            losses = self.learner(batch, step)
            total = torch.stack(list(losses.values())).sum()
            _add(numbers, _named(total, losses, self.method.monitors), len(batches))
        for each in self._learners():
            each.train()
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

    def _validation_batches(self) -> list[Batch]:
        """The held-aside views: drawn once, the same at every step and for every number of ranks."""
        if not self.held_aside or not self.config.validation.every:
            return []
        return self._draw(self.held_aside, "validation", self.config.validation.batches)

    def _draw(self, cases: Sequence[Case], split: str, steps: int) -> list[Batch]:
        with self._pipeline(cases, 0, split, 1, self.config.train.global_batch) as views:
            return [batches[0] for batches in itertools.islice(views, steps)]

    def _pipeline(
        self, cases: Sequence[Case], start: int, split: str, accumulation: int, global_batch: int
    ) -> ViewPipeline:
        loader = self.config.loader
        return ViewPipeline(
            self.store,
            cases,
            self.method.views,
            seed=self.config.seed,
            global_batch=global_batch,
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
                self.average = stages.parameters_of(self.method)
            return 0
        if state.step > self.config.train.steps:
            raise UserError(
                f"train.steps: {self.config.train.steps} is less than the {state.step} steps that "
                f"{self.run} has taken; choose more, or another output"
            )
        self.learner.load_module(state.model)
        self.learner.load_optimizer_state(state.optimizer)
        if self.critic is not None:
            self.critic.load_module(state.adversary)
            self.critic.load_optimizer_state(state.adversary_optimizer)
        self.loaded = state.loaded
        self.average = {name: tensor.to(self.ranks.device) for name, tensor in state.average.items()}
        return state.step

    def _update_average(self) -> None:
        decay = self.config.train.ema_decay
        if decay:
            with torch.no_grad():
                for name, parameter in self.method.named_parameters():
                    self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def _save(self, step: int) -> None:
        at("saving a checkpoint", step)
        for each in self._learners():
            self.ranks.check_equal(each.module)
        optimizers = [each.optimizer_state() for each in self._learners()]

        def write() -> None:
            state = checkpoint.State(step, self.method.state_dict(), optimizers[0], self.average, loaded=self.loaded)
            if self.critic is not None:
                state.adversary, state.adversary_optimizer = self.critic.module.state_dict(), optimizers[1]
            checkpoint.save_checkpoint(self.run / "checkpoints", state, self.config.checkpoint.keep)
            self._save_weights(step)

        self.ranks.on_first(write)

    def _save_weights(self, step: int) -> None:
        untrained = [name for name in self.method.untrained() if name not in self.loaded]
        about = self.description | {"step": step, "untrained": untrained}
        save_weights(self.run / RUN_WEIGHTS, self._transferable(), about)

    def _transferable(self) -> dict[str, Tensor]:
        if not self.average:
            return self.method.transferable()
        alone = (self.method.group, self.method.adversary)  # cannot be copied; need not be
        averaged = copy.deepcopy(self.method, {id(each): each for each in alone})
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


def _add(numbers: dict[str, Tensor], more: dict[str, Tensor], parts: int) -> None:
    for name, value in more.items():
        numbers[name] = numbers.get(name, 0) + value / parts


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
