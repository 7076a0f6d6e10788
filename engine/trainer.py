"""The training loop. It adds scale and bookkeeping; what is learned is the method's business."""

import contextlib
import itertools
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..methods import Batch, Method
from ..methods.stages import Moment
from . import resuming, stages
from .average import averaged, begin_average, read_average, update_average
from .checkpoint import State
from .config import Config
from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case, Store
from .errors import UserError
from .guards import Feed, Guards, Verdict
from .learner import Learner
from .loss_scale import LossScale
from .monitor import Monitor
from .ranks import Ranks
from .rates import derivation, rate_factor, stage_rate
from .runs import build_method
from .saving import Saver, origin_of
from .signals import TO_BE_CONTINUED, Clock, Interrupted, StopSignal
from .starts import note_start
from .stepper import Stepper
from .watchdog import at
from .weights import RUN_WEIGHTS, save_weights


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
        self.learners = [learner] if critic is None else [learner, critic]
        self.guards = Guards(config.guards, self.run, ranks, [each.module for each in self.learners])
        clock = clock or Clock(config.train.max_minutes)
        self.stepper = Stepper(method, self.learners, ranks, self.guards, config.train.autocast, self.signal, clock)
        self.saver = Saver(self.run, config.checkpoint)
        self.saved_at = 0  # step of the last save
        self.held_seconds = 0.0  # by saves, since the last line of the log

    def train(self) -> None:
        start = self.saved_at = self._resume()
        steps = self.config.train.steps
        if start == steps:
            self._write_weights(start)
            if self.ranks.first:
                print(f"{self.run} has taken all of its {steps} steps; nothing to do", file=sys.stderr)
            return
        moments = [moment for moment in self.method.schedule.moments if moment.last > start]
        with self.learner.whole():
            for moment in moments:
                if moment.first >= start:
                    stages.check_start(moment, self.method)
        size, device = self.ranks.size, self.ranks.device
        self.ranks.on_first(lambda: note_start(self.run, step=start, ranks=size, device=device))
        with self.signal, Monitor(self.run, self.ranks, start, steps) as monitor, self.saver:
            validation = self._validation_batches()
            self._preflight(validation or self._draw(self.cases, "validation", 1), monitor)
            for moment in moments:
                self._train_stage(moment, max(start, moment.first), validation, monitor)
            self.ranks.on_first(self.saver.finish)

    def _train_stage(self, moment: Moment, start: int, validation: list[Batch], monitor: Monitor) -> None:
        global_batch = self.method.schedule.batch(start, self.config.train.global_batch)
        for each in self.learners:
            each.set_micro_batch(global_batch // (self.ranks.size * self.config.train.accumulation))
        if start == moment.first:
            self._begin(moment, global_batch, monitor)
        if start == 0 and validation:
            monitor.validation(0, self.stepper.look(validation, 0))
        with (
            self.pipeline(self.cases, start, "train", self.config.train.accumulation, global_batch) as views,
            Feed(views, self.config.guards.data_timeout_seconds, self.ranks.device) as feed,
        ):
            for step in range(start, moment.last):
                self._train_step(feed, step, moment, global_batch, validation, monitor)
            self.unreadable |= views.unreadable

    def _train_step(
        self, feed: Feed, step: int, moment: Moment, global_batch: int, validation: list[Batch], monitor: Monitor
    ) -> None:
        began = time.perf_counter()
        at("waiting for views", step + 1)
        batches = self._next(feed, step, moment)
        waited = time.perf_counter() - began
        at("training")
        numbers, verdict = self.step(batches, step, moment)
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
        if self.learner.loss_scale:
            numbers["loss_scale"] = self.learner.loss_scale.scale
        self.held_seconds = 0.0
        monitor.step(step + 1, numbers, words)
        self.guards.end_if_hopeless(step + 1, verdict, batches)
        self._after(step + 1, moment, verdict, validation, monitor)

    def _after(self, done: int, moment: Moment, verdict: Verdict, validation: list[Batch], monitor: Monitor) -> None:
        last, every = done == self.config.train.steps, self.config.validation.every
        held_aside = None
        if validation and ((every and done % every == 0) or last):
            at("validating")
            numbers = self.stepper.look(validation, done - 1)
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
            for each in self.learners:
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

    def _loss_scales(self) -> dict[str, LossScale]:
        named = zip(("method", "adversary"), self.learners, strict=False)
        return {name: each.loss_scale for name, each in named if each.loss_scale}

    def _rate(self, moment: Moment) -> float:
        batch = self.method.schedule.batch(moment.first, self.config.train.global_batch)
        return stage_rate(self.config, moment.stage.learning_rate, batch)

    def _words(
        self, step: int, numbers: dict[str, float], moment: Moment, verdict: Verdict, batches: list[Batch]
    ) -> dict[str, str]:
        """What the line of a step says beside its numbers."""
        words = {"stage": moment.stage.name} if self.config.stages else {}
        if verdict.overflow:
            words["dropped"] = "the gradients overflowed float16; the loss scale was halved"
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

    def step(self, batches: list[Batch], step: int, moment: Moment) -> tuple[dict[str, float], Verdict]:
        """One optimizer step over the micro-batches: its numbers over the global batch, and what was agreed on."""
        factor = rate_factor(self.config.schedule, step - moment.first, moment.last - moment.first)
        self.learner.rate = self._rate(moment) * factor
        numbers, verdict = self.stepper.take(batches, step)
        if self.average and not verdict.not_finite:
            with self.learner.whole():
                update_average(self.average, self.method, self.config.train.ema_decay)
        return numbers, verdict

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
        state = resuming.find_state(self.run, self.config, self.ranks)
        if state is None:
            if self.config.train.ema_decay:
                self._begin_average()
            return 0
        if self.ranks.first:
            for line in resuming.notes(state, self.config):
                print(line, file=sys.stderr)
        resuming.restore(state, self.learner, self.critic, self.method, self.config)
        for name, scale in self._loss_scales().items():
            if name in state.scaler:
                scale.load(state.scaler[name])
        self.loaded = state.loaded
        self.average = read_average(state.average, self.method, self.ranks.device)
        self.guards.load_state(state.guards)
        return state.step

    def _begin_average(self) -> None:
        with self.learner.whole():
            self.average = begin_average(self.method)

    def _save(self, step: int, moment: Moment, held_aside: float | None = None) -> None:
        """Begins a save of what the steps of `moment` so far have made. Collective."""
        at("saving a checkpoint", step)
        began = time.perf_counter()
        optimizers = [each.optimizer_state() for each in self.learners]

        def begin() -> None:
            origin = origin_of(self.config, moment, self.learner.rate)
            state = State(step, self.method.state_dict(), optimizers[0], self.average, loaded=self.loaded, **origin)
            if self.critic is not None:
                state.adversary, state.adversary_optimizer = self.critic.module.state_dict(), optimizers[1]
            state.scaler = {name: scale.state() for name, scale in self._loss_scales().items()}
            state.guards = self.guards.state()
            with averaged(self.method, self.average):
                self.saver.save(state, self.method.transferable(), self._about(step), held_aside)

        with contextlib.ExitStack() as whole:
            for each in self.learners:
                whole.enter_context(each.whole())
                self.ranks.check_equal(each.module)
            self.ranks.on_first(begin)
        self.saved_at = step
        self.held_seconds += time.perf_counter() - began

    def _write_weights(self, step: int) -> None:
        """Those of a run that is done: the file may have gone missing since. Collective."""

        def write() -> None:
            with averaged(self.method, self.average):
                save_weights(self.run / RUN_WEIGHTS, self.method.transferable(), self._about(step))

        with self.learner.whole():
            self.ranks.on_first(write)

    def _about(self, step: int) -> dict[str, Any]:
        untrained = [name for name in self.method.untrained() if name not in self.loaded]
        return self.description | {"step": step, "untrained": untrained}
