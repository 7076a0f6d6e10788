"""The learning rate of a step: the recipe's, made for the global batch in use, times the schedule's factor."""

import math

from .config import Config, ScheduleConfig


def rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at a step (from 0): linear warm-up, then cosine or constant."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    return schedule.final_fraction + (1 - schedule.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_factor(schedule: ScheduleConfig, global_batch: int) -> float:
    """What a rate made for batches of `schedule.rule_batch` is multiplied by for others.

    linear: k for batches k times as large, for SGD (Goyal et al., 2017). sqrt: the root of k, for Adam and its like
    (Krizhevsky, 2014; You et al., 2020; Malladi et al., 2022).
    """
    if schedule.batch_rule == "none":
        return 1.0
    times = global_batch / schedule.rule_batch
    return times if schedule.batch_rule == "linear" else math.sqrt(times)


def stage_rate(config: Config, own: float | None, global_batch: int) -> float:
    """The highest rate of a stage of this batch.

    Args:
        own: the stage's, where it has one.
    """
    return (own or config.optimizer.learning_rate) * batch_factor(config.schedule, global_batch)


def derivation(config: Config, own: float | None, global_batch: int) -> str:
    """The rate of a stage in words, with where it comes from."""
    schedule, rate = config.schedule, stage_rate(config, own, global_batch)
    if schedule.batch_rule == "none":
        return f"{rate:g}"
    return (
        f"{rate:g} = {own or config.optimizer.learning_rate:g} x {batch_factor(schedule, global_batch):g} "
        f"({schedule.batch_rule}, batch {global_batch} for {schedule.rule_batch})"
    )
