"""The stages of a training: which terms of the loss are active when, and with which weight.

    stages:
      - name: discriminate
        share: 1                       # of train.steps, in proportion to the other stages
        terms: {discriminative: 1}
      - name: restore
        share: 2
        learning_rate: 0.03
        terms:
          discriminative: 1
          restorative: {start: 10, end: 1, curve: cosine}

A weight runs from `start` to `end` over the stage. A term that a stage does not name is not computed; a stage without
terms has all of the method's own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CURVES = ("linear", "cosine")


@dataclass
class Stage:
    name: str = "train"  # in every line of the log
    share: float = 1.0  # of train.steps, in proportion to the other stages
    terms: dict[str, Any] = field(default_factory=dict)  # weight, or {start, end, curve}; the method's own if empty
    global_batch: int | None = None  # train.global_batch if not given
    learning_rate: float | None = None  # optimizer.learning_rate if not given; the schedule begins anew with each stage
    start: str = "previous"  # what to start from: previous | initial | the path of a weights file or run
    fresh_optimizer: bool = True  # forget the moments of the stage before


@dataclass(frozen=True)
class Weight:
    start: float
    end: float
    curve: str = "linear"

    def at(self, progress: float) -> float:
        """At a progress from 0 to 1."""
        if self.start == self.end:
            return self.start
        fallen = progress if self.curve == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * fallen


def read_weight(name: str, value: Any) -> Weight:
    """Raises: ValueError naming the setting."""
    given = dict(value) if isinstance(value, Mapping) else {"start": value}
    unknown = sorted(set(given) - {"start", "end", "curve"})
    if unknown:
        raise ValueError(f"{name}: unknown {unknown}; expected a number, or start, end and curve")
    start = _weight(name, given.get("start"))
    end, curve = _weight(name, given.get("end", start)), given.get("curve", "linear")
    if curve not in CURVES:
        raise ValueError(f"{name}.curve: {curve!r} is not one of {', '.join(CURVES)}")
    return Weight(start, end, curve)


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number, 0 or more, got {value!r}")
    return float(value)


@dataclass(frozen=True)
class Moment:
    """Where a step stands."""

    index: int  # of the stage
    stage: Stage
    first: int  # step of the stage
    last: int  # one past its last step

    def progress(self, step: int) -> float:
        """From 0 at the stage's first step towards 1."""
        return (step - self.first) / max(1, self.last - self.first)


class StageSchedule:
    """The stages of a run of `steps` steps.

    Args:
        stages: one after the other; none for a single one with the method's own terms.
        steps: of all of them together.
        own: the method's terms with their weights, zeros among them.
    Raises: ValueError naming the stage that is wrong.
    """

    def __init__(self, stages: Sequence[Stage], steps: int, own: Mapping[str, float]) -> None:
        self.stages = list(stages) or [Stage()]
        self.steps = steps
        shares = [stage.share for stage in self.stages]
        for index, stage in enumerate(self.stages):
            if not 0 < stage.share < math.inf:
                raise ValueError(f"stages[{index}].share: expected a finite number, more than 0, got {stage.share}")
            for name in stage.terms:
                if name not in own:
                    raise ValueError(f"stages[{index}].terms: {name!r} is no term of the method; it has {sorted(own)}")
        ends = [round(steps * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
        self.moments = [
            Moment(i, stage, first, last)
            for i, (stage, first, last) in enumerate(zip(self.stages, [0, *ends], ends, strict=False))
        ]
        for moment in self.moments:
            if moment.first == moment.last:
                raise ValueError(
                    f"stages[{moment.index}].share: {moment.stage.share} of {sum(shares)} leaves it none of "
                    f"train.steps={steps}; raise train.steps or the share"
                )
        self._weights = [
            {
                name: read_weight(f"stages[{index}].terms.{name}", value)
                for name, value in (stage.terms or dict(own)).items()
            }
            for index, stage in enumerate(self.stages)
        ]

    def at(self, step: int) -> Moment:
        """The moment of a step (from 0); the last stage's for steps behind the end."""
        return next((moment for moment in self.moments if step < moment.last), self.moments[-1])

    def batch(self, step: int, usual: int) -> int:
        """Samples of a step over all ranks and micro-batches, where `usual` is that of stages that do not say."""
        return self.at(step).stage.global_batch or usual

    def weights(self, step: int) -> dict[str, float]:
        """The active terms with their weights."""
        moment = self.at(step)
        progress = min(1.0, moment.progress(step))
        found = {name: weight.at(progress) for name, weight in self._weights[moment.index].items()}
        return {name: weight for name, weight in found.items() if weight > 0}

    def ever(self, term: str) -> bool:
        """Whether a term is active in any stage."""
        return any(max(w[term].start, w[term].end) > 0 for w in self._weights if term in w)
