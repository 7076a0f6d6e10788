"""One optimizer step over the global batch: forwards and backwards of its parts, a verdict of all ranks, then the step.

All is agreed on before anything moves: a step that is not finite on one rank is taken on none.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..methods import Batch, Method
from .guards import Guards, Verdict
from .learner import Learner
from .precision import autocast
from .ranks import Ranks
from .signals import Clock, StopSignal


class Stepper:
    """Steps of a method in its engine, and of its adversary in another.

    Args:
        learners: the method's and, where it has an adversary, that one's.
        precision: `train.autocast`.
        signal, clock: what ends a run; what one rank knows of them travels with the numbers of a step.
    """

    def __init__(
        self,
        method: Method,
        learners: Sequence[Learner],
        ranks: Ranks,
        guards: Guards,
        precision: str,
        signal: StopSignal,
        clock: Clock,
    ) -> None:
        self.method, self.learners, self.ranks, self.guards = method, learners, ranks, guards
        self.learner, self.critic = learners[0], learners[1] if len(learners) > 1 else None
        self.precision, self.signal, self.clock = precision, signal, clock

    def take(self, batches: list[Batch], step: int) -> tuple[dict[str, float], Verdict]:
        """The step over the micro-batches of this rank: its numbers over the global batch, and what was agreed on."""
        batches = [_to_device(batch, self.ranks.device) for batch in batches]
        self.guards.remember()
        self._share(batches)
        self._exchange(batches, step)
        numbers: dict[str, Tensor] = {}
        for batch in batches:
            with self._critic_at_hand():
                losses = self.learner(batch, step)
                total = torch.stack(list(losses.values())).sum()
                self.learner.learn(total)
            _add(numbers, _named(total, losses, self.method.monitors), len(batches))
        stepping = {"gradients": self.learner}
        if self.critic is not None and "adversarial" in self.method.weights(step):
            stepping["adversary's gradients"] = self.critic
            for batch in batches:
                _add(numbers, self._critic_losses(self.critic, batch), len(batches))
        means, verdict = self._agree(numbers, stepping)
        if verdict.not_finite:
            for each in stepping.values():
                each.drop()
            self.method.step_dropped()
            self.guards.restore()
        else:
            for each in stepping.values():
                each.step()
            with self._whole_for_method():
                self.method.after_step(step)
        return means, verdict

    @torch.no_grad()
    def look(self, batches: list[Batch], step: int) -> dict[str, float]:
        """Losses and monitors, on which nothing learns, with the terms of a step."""
        for each in self.learners:
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
        for each in self.learners:
            each.train()
        mean = self.ranks.mean(torch.stack([value.double() for value in numbers.values()])).tolist()
        return {
            name.removeprefix("loss/").removeprefix("monitor/"): value
            for name, value in zip(numbers, mean, strict=True)
        }

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

    def _exchange(self, batches: list[Batch], step: int) -> None:
        # In the precision of the forward, which the engine sees to: what is shared must not depend on the parts.
        with autocast(self.precision, self.ranks.device), self._whole_for_method():
            self.method.exchange(batches, step)

    def _whole_for_method(self) -> AbstractContextManager[None]:
        return self.learner.whole() if self.method.reads_parameters else nullcontext()

    def _critic_at_hand(self) -> AbstractContextManager[None]:
        """The critic judges for the generator past its engine."""
        return nullcontext() if self.critic is None else self.critic.whole()

    def _critic_losses(self, critic: Learner, batch: Batch) -> dict[str, Tensor]:
        losses = critic(*self.method.adversary_inputs(batch))
        critic.learn(torch.stack(list(losses.values())).sum())
        seen: dict[str, Tensor] = losses | getattr(critic.module, "monitors", {})
        return {f"adversary/{name}": value.detach() for name, value in seen.items()}

    def _agree(self, numbers: dict[str, Tensor], stepping: Mapping[str, Learner]) -> tuple[dict[str, float], Verdict]:
        """Means over the ranks, in one collective and one question to the device."""
        names = list(numbers)
        own = torch.tensor([self.signal.number != 0, self.clock.out_of_time], dtype=torch.float64)
        sound = [each.sound().double() for each in stepping.values()]
        values = torch.stack([*(numbers[name].double() for name in names), *(1 - each for each in sound)])
        found = self.ranks.mean(torch.cat((values, own.to(values.device)))).tolist()
        means = dict(zip(names, found, strict=False))
        unsound = {name: share > 0 for name, share in zip(stepping, found[len(names) :], strict=False)}
        not_finite, overflow = self.guards.judge(means, unsound, scaled=self.learner.loss_scale is not None)
        for name, each in stepping.items():
            if each.loss_scale and (not not_finite or (overflow and unsound[name])):
                each.loss_scale.update(not unsound[name])
        return means, Verdict(found[-2] > 0, found[-1] > 0, not_finite, overflow, numbers)


def _named(total: Tensor, losses: dict[str, Tensor], monitors: dict[str, Tensor]) -> dict[str, Tensor]:
    return (
        {"loss": total.detach()}
        | {f"loss/{name}": value.detach() for name, value in losses.items()}
        | {f"monitor/{name}": value.detach() for name, value in monitors.items()}
    )


def _add(numbers: dict[str, Tensor], more: dict[str, Tensor], parts: int) -> None:
    """Adds those of one of so many parts, so that the sum is their mean."""
    for name, value in more.items():
        numbers[name] = numbers.get(name, 0) + value / parts


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
