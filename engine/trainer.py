"""The training loop. It adds scale and bookkeeping; what is learned is the method's business."""

import itertools
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import Batch, Method
from ..methods.stages import Moment
from . import resuming, stages
from .checkpoint import State
from .config import Config, ScheduleConfig
from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case, Store
from .errors import UserError
from .guards import Feed, Guards, Verdict
from .learner import Learner
from .monitor import Monitor
from .ranks import Ranks
from .runs import build_method
from .saving import Saver, origin_of, transferable
from .signals import TO_BE_CONTINUED, Clock, Interrupted, StopSignal
from .step_numbers import add, named


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
        clock: Clock | None = None,
    ) -> None:
        self.learner, self.critic, self.method, self.config, self.ranks = learner, critic, method, config, ranks
        self.store, self.cases, self.held_aside = store, cases, held_aside
        self.unreadable = dict(unreadable)
        self.description = description
        self.run = Path(config.output)
        self.average: dict[str, Tensor] = {}
        self.loaded: list[str] = []  # transferable tensors that a stage took from a weights file
        self.signal = StopSignal()
        self.clock = clock or Clock(config.train.max_minutes)
        self.guards = Guards(config.guards, self.run, ranks, [each.module for each in self._learners()])
        self.saver = Saver(self.run, config.checkpoint)
        self.saved_at = 0  # step of the last save
        self.held_seconds = 0.0  # by saves, since the last line of the log

    def train(self) -> None:
        start = self.saved_at = self._resume()
        steps = self.config.train.steps
        if start == steps:
            weights, about = transferable(self.method, self.average), self._about(start)
            stage = self.method.schedule.at(start - 1).index
            self.ranks.on_first(lambda: self.saver.write_weights(start, stage, weights, about))
            if self.ranks.first:
                print(f"{self.run} has taken all of its {steps} steps; nothing to do", file=sys.stderr)
            return
        moments = [moment for moment in self.method.schedule.moments if moment.last > start]
        for moment in moments:
            if moment.first >= start:
                stages.check_start(moment, self.method)
        with self.signal, Monitor(self.run, self.ranks, start, steps) as monitor, self.saver:
            validation = self._validation_batches()
            self._preflight(validation or self._draw(self.cases, "validation", 1), monitor)
            for moment in moments:
                self._train_stage(moment, max(start, moment.first), validation, monitor)
            self.ranks.on_first(self.saver.finish)

    def _train_stage(self, moment: Moment, start: int, validation: list[Batch], monitor: Monitor) -> None:
        global_batch = self.method.schedule.batch(start, self.config.train.global_batch)
        for each in self._learners():
            each.set_micro_batch(global_batch // (self.ranks.size * self.config.train.accumulation))
        if start == moment.first:
            self._begin(moment, global_batch, monitor)
        if start == 0 and validation:
            monitor.validation(0, self._validate(validation, 0))
        with (
            self._pipeline(self.cases, start, "train", self.config.train.accumulation, global_batch) as views,
            Feed(views, self.config.guards.data_timeout_seconds, self.ranks.device) as feed,
        ):
            for step in range(start, moment.last):
                self._train_step(feed, step, moment, global_batch, validation, monitor)
            self.unreadable |= views.unreadable

    def _train_step(
        self, feed: Feed, step: int, moment: Moment, global_batch: int, validation: list[Batch], monitor: Monitor
    ) -> None:
        began = time.perf_counter()
        batches = self._next(feed, step, moment)
        waited = time.perf_counter() - began
        numbers, verdict = self._step(batches, step, moment)
        words = self._words(step, numbers, moment, verdict, batches)
        seconds = time.perf_counter() - began
        numbers |= {
            "learning_rate": self.learner.rate,
            "samples_per_second": global_batch / seconds,
            "data_wait": waited / seconds,
            "memory_mb": monitor.memory_mb(),
            "skipped": self.guards.skipped,
            "save_seconds": self.held_seconds,
        }
        self.held_seconds = 0.0
        monitor.step(step + 1, numbers, words)
        self.guards.end_if_hopeless(step + 1, verdict.not_finite, batches, verdict.own)
        self._after(step + 1, moment, verdict, validation, monitor)

    def _after(self, done: int, moment: Moment, verdict: Verdict, validation: list[Batch], monitor: Monitor) -> None:
        last, every = done == self.config.train.steps, self.config.validation.every
        held_aside = None
        if validation and ((every and done % every == 0) or last):
            numbers = self._validate(validation, done)
            monitor.validation(done, numbers)
            held_aside = numbers["loss"]
        ends = verdict.stop or verdict.out_of_time
        if ends or last or done % self.config.checkpoint.every == 0:
            self._save(done, moment, held_aside)
        if ends and not last:
            self.ranks.on_first(self.saver.finish)
            if verdict.stop:
                raise Interrupted.by_signal(self.signal.number or signal.SIGTERM, done)
            raise Interrupted(f"train.max_minutes={self.config.train.max_minutes:g}", done, TO_BE_CONTINUED)

    def _begin(self, moment: Moment, global_batch: int, monitor: Monitor) -> None:
        """What a stage starts from."""
        stage, network = moment.stage, "as it is"
        self.guards.begin_stage()
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

    def _words(
        self, step: int, numbers: dict[str, float], moment: Moment, verdict: Verdict, batches: list[Batch]
    ) -> dict[str, str]:
        """What the line of a step says beside its numbers."""
        words = {"stage": moment.stage.name} if self.config.stages else {}
        warnings = [self.guards.warning(numbers["loss"], verdict, batches)]
        if not verdict.not_finite:
            warnings.append(self.method.warning(step, numbers | {"learning_rate": self.learner.rate}))
        said = "; ".join(each for each in warnings if each)
        return words | {"warning": said} if said else words

    def _next(self, feed: Feed, step: int, moment: Moment) -> list[Batch]:
        try:
            return feed.next(step + 1)
        except UserError:
            # A volume that cannot be read any more must not cost the steps since the last checkpoint. Several ranks
            # cannot save here: the others are on their way into the step.
            if self.ranks.size == 1:
                if step != self.saved_at:
                    self._save(step, moment if step > moment.first else self.method.schedule.at(step - 1))
                self.saver.finish()
            raise

    def _step(self, batches: list[Batch], step: int, moment: Moment) -> tuple[dict[str, float], Verdict]:
        """One optimizer step over the micro-batches: its numbers over the global batch, and what was agreed on."""
        factor = rate_factor(self.config.schedule, step - moment.first, moment.last - moment.first)
        self.learner.rate = self._rate(moment) * factor
        batches = [_to_device(batch, self.ranks.device) for batch in batches]
        self.guards.remember()
        self._share(batches)
        self._exchange(batches, step)
        numbers: dict[str, Tensor] = {}
        for batch in batches:
            losses = self.learner(batch, step)
            total = torch.stack(list(losses.values())).sum()
            self.learner.learn(total)
            add(numbers, named(total, losses, self.method.monitors), len(batches))
        stepping = {"gradients": self.learner}
        if self.critic is not None and "adversarial" in self.method.weights(step):
            stepping["adversary's gradients"] = self.critic
            for batch in batches:
                add(numbers, self._critic_step(self.critic, batch), len(batches))
        # All is agreed on before anything moves.
        means, verdict = self._reduce(numbers, stepping)
        if verdict.not_finite:
            for each in stepping.values():
                each.drop()
            self.method.step_dropped()
            self.guards.restore()
        else:
            for each in stepping.values():
                each.step()
            self.method.after_step(step)
            self._update_average()
        return means, verdict

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

    def _reduce(self, numbers: dict[str, Tensor], stepping: Mapping[str, Learner]) -> tuple[dict[str, float], Verdict]:
        """Means over the ranks, in one collective and one question to the device."""
        names = list(numbers)
        # What one rank knows travels with the numbers: every rank does the same with the same step.
        own = torch.tensor([self.signal.number != 0, self.clock.out_of_time], dtype=torch.float64)
        sound = [each.sound().double() for each in stepping.values()]
        values = torch.stack([*(numbers[name].double() for name in names), *(1 - each for each in sound)])
        found = self.ranks.mean(torch.cat((values, own.to(values.device)))).tolist()
        means = dict(zip(names, found, strict=False))
        unsound = dict(zip(stepping, found[len(names) :], strict=False))
        return means, Verdict(found[-2] > 0, found[-1] > 0, self.guards.judge(means, unsound), numbers)

    @torch.no_grad()
    def _validate(self, batches: list[Batch], done: int) -> dict[str, float]:
        """Losses on the held-aside views with the terms of the step taken last."""
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
            add(numbers, named(total, losses, self.method.monitors), len(batches))
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
        state = resuming.find_state(self.run, self.config, self.ranks)
        if state is None:
            if self.config.train.ema_decay:
                self.average = stages.parameters_of(self.method)
            return 0
        if self.ranks.first:
            for line in resuming.notes(state, self.config):
                print(line, file=sys.stderr)
        resuming.restore(state, self.learner, self.critic, self.method, self.config)
        self.loaded = state.loaded
        self.average = {name: tensor.to(self.ranks.device) for name, tensor in state.average.items()}
        self.guards.load_state(state.guards)
        return state.step

    def _update_average(self) -> None:
        decay = self.config.train.ema_decay
        if decay:
            with torch.no_grad():
                for name, parameter in self.method.named_parameters():
                    self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def _save(self, step: int, moment: Moment, held_aside: float | None = None) -> None:
        """Begins a save of what the steps of `moment` so far have made. Collective."""
        began = time.perf_counter()
        for each in self._learners():
            self.ranks.check_equal(each.module)
        optimizers = [each.optimizer_state() for each in self._learners()]

        def begin() -> None:
            origin = origin_of(self.config, moment, self.learner.rate)
            state = State(step, self.method.state_dict(), optimizers[0], self.average, loaded=self.loaded, **origin)
            if self.critic is not None:
                state.adversary, state.adversary_optimizer = self.critic.module.state_dict(), optimizers[1]
            state.guards = self.guards.state()
            weights = transferable(self.method, self.average)
            self.saver.save(state, weights, self._about(step), held_aside)

        self.ranks.on_first(begin)
        self.saved_at = step
        self.held_seconds += time.perf_counter() - began

    def _about(self, step: int) -> dict[str, Any]:
        untrained = [name for name in self.method.untrained() if name not in self.loaded]
        return self.description | {"step": step, "untrained": untrained}


def rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up, then cosine or constant."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
