"""The training loop. It adds scale and bookkeeping; what is learned is the method's business."""

import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import Batch, Method
from ..methods.stages import Moment
from . import checkpoint, stages
from .average import averaged, begin_average, read_average, update_average
from .config import Config
from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case, Store
from .errors import UserError
from .learner import Learner
from .loss_scale import LossScale
from .monitor import Monitor
from .precision import autocast
from .ranks import Ranks
from .rates import derivation, rate_factor, stage_rate
from .runs import build_method
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
        self.dropped = False  # whether the last step was: float16 could not hold its gradients
        self.signal = StopSignal()

    def train(self) -> None:
        start = self.resumed_at = self._resume()
        steps = self.config.train.steps
        if start == steps:
            with self.learner.whole():
                self.ranks.on_first(lambda: self._save_weights(start))
            if self.ranks.first:
                print(f"{self.run} has taken all of its {steps} steps; nothing to do", file=sys.stderr)
            return
        moments = [moment for moment in self.method.schedule.moments if moment.last > start]
        with self.learner.whole():
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
        for each in self.learners():
            each.set_micro_batch(global_batch // (self.ranks.size * self.config.train.accumulation))
        if start == moment.first:
            self._begin(moment, global_batch, monitor)
        if start == 0 and validation:
            monitor.validation(0, self._validate(validation, 0))
        with self.pipeline(self.cases, start, "train", self.config.train.accumulation, global_batch) as views:
            for step in range(start, moment.last):
                began = time.perf_counter()
                batches = self._next(views, step)
                waited = time.perf_counter() - began
                numbers, stop = self.step(batches, step, moment)
                seconds = time.perf_counter() - began
                monitor.step(
                    step + 1,
                    numbers
                    | {
                        "learning_rate": self.learner.rate,
                        "samples_per_second": global_batch / seconds,
                        "data_wait": waited / seconds,
                        "memory_mb": monitor.memory_mb(),
                    }
                    | self._loss_scale(),
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
            for each in self.learners():
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
            with self.learner.whole(change=True):
                self.loaded = stages.take_weights(stage.start, self.method)
                self.method.weights_loaded(moment.first)
        if stage.start != "previous" and self.average:
            self._begin_average()
        rate = derivation(self.config, stage.learning_rate, global_batch)
        if self.config.stages:
            optimizer = "kept" if moment.first > 0 and not stage.fresh_optimizer else "fresh"
            monitor.say(
                f"step {moment.first + 1}: stage {stage.name!r} ({moment.index + 1} of {len(self.config.stages)}), "
                f"{moment.last - moment.first} steps of {global_batch} samples, learning rate {rate}, "
                f"terms {', '.join(self.method.weights(moment.first))}; network: {network}, optimizer: {optimizer}"
            )
        elif self.config.schedule.batch_rule != "none":
            monitor.say(f"learning rate {rate}")

    def learners(self) -> list[Learner]:
        return [self.learner] if self.critic is None else [self.learner, self.critic]

    def _loss_scales(self) -> dict[str, LossScale]:
        named = zip(("method", "adversary"), self.learners(), strict=False)
        return {name: each.loss_scale for name, each in named if each.loss_scale}

    def _rate(self, moment: Moment) -> float:
        batch = self.method.schedule.batch(moment.first, self.config.train.global_batch)
        return stage_rate(self.config, moment.stage.learning_rate, batch)

    def _words(self, step: int, numbers: dict[str, float], moment: Moment) -> dict[str, str]:
        """What the line of a step says beside its numbers."""
        words = {"stage": moment.stage.name} if self.config.stages else {}
        if self.dropped:
            words["dropped"] = "the gradients overflowed float16; the loss scale was halved"
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

    def step(self, batches: list[Batch], step: int, moment: Moment) -> tuple[dict[str, float], bool]:
        """One optimizer step over the micro-batches: its numbers over the global batch, and whether to stop."""
        factor = rate_factor(self.config.schedule, step - moment.first, moment.last - moment.first)
        self.learner.rate = self._rate(moment) * factor
        batches = [_to_device(batch, self.ranks.device) for batch in batches]
        self._share(batches)
        self._exchange(batches, step)
        numbers: dict[str, Tensor] = {}
        for batch in batches:
            with self._critic_at_hand():
                losses = self.learner(batch, step)
                total = torch.stack(list(losses.values())).sum()
                self.dropped = not self.learner.learn(total)
            _add(numbers, _named(total, losses, self.method.monitors), len(batches))
        if self.dropped:
            self.method.step_dropped(step)
            return self._reduce(numbers, step)
        if self.critic is not None and "adversarial" in self.method.weights(step):
            for batch in batches:
                _add(numbers, self._critic_step(self.critic, batch), len(batches))
        with self._whole_for_method():
            self.method.after_step(step)
        if self.average:
            with self.learner.whole():
                update_average(self.average, self.method, self.config.train.ema_decay)
        return self._reduce(numbers, step)

    def _exchange(self, batches: list[Batch], step: int) -> None:
        # In the precision of the forward, which the engine sees to: what is shared must not depend on the parts.
        with autocast(self.config.train.autocast, self.ranks.device), self._whole_for_method():
            self.method.exchange(batches, step)

    def _whole_for_method(self) -> AbstractContextManager[None]:
        return self.learner.whole() if self.method.reads_parameters else nullcontext()

    def _critic_at_hand(self) -> AbstractContextManager[None]:
        """The critic judges for the generator past its engine."""
        return nullcontext() if self.critic is None else self.critic.whole()

    def _loss_scale(self) -> dict[str, float]:
        return {"loss_scale": self.learner.loss_scale.scale} if self.learner.loss_scale else {}

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
        step = max(0, done - 1)
        for each in self.learners():
            each.train(False)
        numbers: dict[str, Tensor] = {}
        for held in batches:
            batch = _to_device(held, self.ranks.device)
            self._share([batch])
            self._exchange([batch], step)
            with self._critic_at_hand():
                losses = self.learner(batch, step)
            total = torch.stack(list(losses.values())).sum()
            _add(numbers, _named(total, losses, self.method.monitors), len(batches))
        for each in self.learners():
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
        with self.pipeline(cases, 0, split, 1, self.config.train.global_batch) as views:
            return [batches[0] for batches in itertools.islice(views, steps)]

    def pipeline(
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
                self._begin_average()
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
        for name, scale in self._loss_scales().items():
            if name in state.scaler:
                scale.load(state.scaler[name])
        self.loaded = state.loaded
        self.average = read_average(state.average, self.method, self.ranks.device)
        return state.step

    def _begin_average(self) -> None:
        with self.learner.whole():
            self.average = begin_average(self.method)

    def _save(self, step: int) -> None:
        optimizers = [each.optimizer_state() for each in self.learners()]

        def write() -> None:
            state = checkpoint.State(step, self.method.state_dict(), optimizers[0], self.average, loaded=self.loaded)
            if self.critic is not None:
                state.adversary, state.adversary_optimizer = self.critic.module.state_dict(), optimizers[1]
            state.scaler = {name: scale.state() for name, scale in self._loss_scales().items()}
            checkpoint.save_checkpoint(self.run / "checkpoints", state, self.config.checkpoint.keep)
            self._save_weights(step)

        with self.learner.whole(), self._critic_at_hand():
            for each in self.learners():
                self.ranks.check_equal(each.module)
            self.ranks.on_first(write)

    def _save_weights(self, step: int) -> None:
        untrained = [name for name in self.method.untrained() if name not in self.loaded]
        about = self.description | {"step": step, "untrained": untrained}
        with averaged(self.method, self.average):
            save_weights(self.run / RUN_WEIGHTS, self.method.transferable(), about)


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
