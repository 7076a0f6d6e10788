"""What looks after a run: steps that are not finite are not taken, losses that leap are said, data that stalls ends."""

import math
import queue
import statistics
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import Batch
from ..methods.parts.feature_bank import FeatureBank
from ..methods.parts.momentum_twin import MomentumTwin
from .config import GuardsConfig
from .data.pipeline import ViewPipeline
from .errors import UserError
from .ranks import Ranks
from .weights import first_few, write_whole

WINDOW = 100  # losses that a leap is judged by
LEAST = 20  # of them before any is judged
FLOOR = 1e-3  # of the median, below which the deviation of a loss that hardly moves is not taken
NO_LOSS = "monitor/"  # numbers that a step is not judged by


class StalledError(UserError):
    """No batch came in time. Threads may hang in a system call that never returns: only the process's end is sure."""


@dataclass
class Verdict:
    """What all ranks have agreed on at the end of a step's forwards and backwards."""

    stop: bool = False  # a signal
    out_of_time: bool = False
    not_finite: list[str] = field(default_factory=list)  # terms of the loss, gradients; then the step is not taken
    overflow: bool = False  # by the scale of float16 alone, which is halved: nothing to worry about
    own: dict[str, Tensor] = field(default_factory=dict)  # the numbers of this rank


class Guards:
    """Judges the steps of one run, the same on every rank.

    Args:
        run: its folder, for what is dumped.
        modules: the method and its adversary.
    """

    def __init__(self, config: GuardsConfig, run: Path, ranks: Ranks, modules: Sequence[nn.Module]) -> None:
        self.config, self.run, self.ranks = config, run, ranks
        every = [each for module in modules for each in module.modules()]
        # Banks and what a momentum encoder follows with change after a step alone, and are too large to copy at each.
        following = {
            id(tensor) for each in every if isinstance(each, MomentumTwin) for tensor in each.tensors().values()
        }
        self._places = [
            (each, name)
            for each in every
            if not isinstance(each, FeatureBank)
            for name, tensor in each._buffers.items()
            if id(tensor) not in following
        ]
        self._before: list[tuple[Tensor, Tensor]] = []  # buffers and their values
        self.skipped = 0  # steps that were not taken
        self.in_a_row = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": list(self._recent)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Of a checkpoint; empty in those before format 3."""
        self.skipped, self.in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))
        self._recent = deque(state.get("recent", ()), maxlen=WINDOW)

    def begin_stage(self) -> None:
        """Losses of other terms are no measure."""
        self._recent.clear()

    @torch.no_grad()
    def remember(self) -> None:
        """Before the forwards of a step: what these change, such as the running statistics of a batch norm."""
        found = [module._buffers[name] for module, name in self._places]
        buffers = {id(tensor): tensor for tensor in found if tensor is not None}
        known = {id(tensor) for tensor, _ in self._before}
        if buffers.keys() != known:
            self._before = [(tensor, tensor.clone()) for tensor in buffers.values()]
            return
        self._copy([(copy, tensor) for tensor, copy in self._before])

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes what the forwards of a dropped step changed."""
        self._copy(self._before)

    @staticmethod
    def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
        if pairs:
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])

    def judge(self, numbers: dict[str, float], unsound: dict[str, bool], *, scaled: bool) -> tuple[list[str], bool]:
        """What of a step is not finite, after it was averaged over the ranks, and whether by its loss scale alone.

        Counts the steps; those that the loss scale made overflow are none in a row.

        Args:
            numbers: losses and monitors by name.
            unsound: "gradients" and the like, with whether any rank holds some that are not finite.
            scaled: whether the losses were multiplied by a loss scale.
        """
        losses = [name for name, value in numbers.items() if not name.startswith(NO_LOSS) and not math.isfinite(value)]
        found = losses + [name for name, bad in unsound.items() if bad]
        overflow = scaled and bool(found) and not losses
        if not overflow:
            self.in_a_row = self.in_a_row + 1 if found else 0
        self.skipped += bool(found)
        return found, overflow

    def warning(self, loss: float, verdict: Verdict, batches: Sequence[Batch]) -> str | None:
        """What the line of a step says where it was not taken, or where its loss leaps. Collective where it does.

        A leap is more than `guards.spike_factor` median absolute deviations above the median of the last losses.
        """
        if verdict.overflow:
            return None
        if verdict.not_finite:
            return (
                f"not finite: {first_few(verdict.not_finite)}; the step was not taken ({self.in_a_row} in a row, "
                f"{self.skipped} in all; {self.config.skip_steps} in a row end the run)"
            )
        factor, recent = self.config.spike_factor, sorted(self._recent)
        self._recent.append(loss)
        if not factor or len(recent) < LEAST:
            return None
        median = statistics.median(recent)
        deviation = max(statistics.median(abs(each - median) for each in recent), FLOOR * abs(median))
        if loss <= median + factor * deviation:
            return None
        cases = [case for cases in self.ranks.gather(_cases(batches)) for case in cases]
        return (
            f"the loss {loss:.4g} is {(loss - median) / deviation:.0f} median deviations above {median:.4g}, the "
            f"median of the last {len(recent)}; the batch is of {first_few(cases, 16)}"
        )

    def end_if_hopeless(self, step: int, verdict: Verdict, batches: Sequence[Batch]) -> None:
        """Ends the run where too many steps in a row could not be taken, with a dump of the last one. Collective.

        Args:
            step: from 1.

        Raises: UserError.
        """
        not_finite = verdict.not_finite
        if not not_finite or verdict.overflow or self.in_a_row < self.config.skip_steps:
            return
        own = {name: float(value) for name, value in verdict.own.items()}
        bad = any(not math.isfinite(value) for name, value in own.items() if not name.startswith(NO_LOSS))
        anywhere = self.ranks.sum(torch.tensor(float(bad))).item() > 0
        where = f"failed-step-{step}.pt" if self.ranks.size == 1 else f"failed-step-{step}-rank-{self.ranks.rank}.pt"
        said = ""
        if bad or not anywhere:  # gradients alone: nobody knows of which rank they came
            said = f"rank {self.ranks.rank}: " if self.ranks.size > 1 else ""
            said += f"{', '.join(_cases(batches))} ({self._dump(self.run / where, step, not_finite, batches, own)})"
        found = [each for each in self.ranks.gather(said) if each]
        raise UserError(
            f"step {step}: not finite: {first_few(not_finite)}, for {self.in_a_row} steps in a row "
            f"(guards.skip_steps={self.config.skip_steps}), none of which was taken; the last checkpoint is whole. The "
            f"batch is of {'; '.join(found)}. Look at these volumes; raise guards.skip_steps to pass over them, or "
            f"begin again with a lower optimizer.learning_rate, optimizer.gradient_clip, or train.autocast=none"
        )

    def _dump(
        self, path: Path, step: int, not_finite: Sequence[str], batches: Sequence[Batch], losses: dict[str, float]
    ) -> str:
        content = {"step": step, "rank": self.ranks.rank, "not_finite": list(not_finite), "losses": losses,
                   "batches": [_on_host(batch) for batch in batches]}  # fmt: skip
        try:
            write_whole(path, lambda partial: torch.save(content, partial))
        except UserError as error:
            return f"no dump: {error}"
        return f"dumped to {path}"


class Feed:
    """The batches of a pipeline, each within so many seconds, fetched in a thread of its own.

    Args:
        views: gives the batches.
        seconds: how long to wait for one; 0 for ever.
        device: where the batches are.
    """

    def __init__(self, views: ViewPipeline, seconds: float, device: torch.device) -> None:
        self.views, self.seconds, self.device = views, seconds, device
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[list[Batch] | None, BaseException | None]] = queue.SimpleQueue()
        if seconds:
            # A daemon: where it hangs, the process must be able to end without it.
            threading.Thread(target=self._fetch, name="voxtrast-feed", daemon=True).start()

    def next(self, step: int) -> list[Batch]:
        """The batches of a step (from 1). Raises: StalledError where they do not come."""
        if not self.seconds:
            return next(self.views)
        self._asked.put(True)
        try:
            batches, error = self._found.get(timeout=self.seconds)
        except KeyboardInterrupt:
            self.views.abandoned = True  # perhaps because they hang
            raise
        except queue.Empty:
            self.views.abandoned = True
            raise StalledError(
                f"step {step}: no batch for {self.seconds:g} s (guards.data_timeout_seconds), waiting for "
                f"{self.views.waiting_for()}; see to the store's disk, then run the same command again: it continues"
            ) from None
        if error is not None:
            raise error
        assert batches is not None
        return batches

    def _fetch(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # each thread begins with the first
        while self._asked.get():
            try:
                self._found.put((next(self.views), None))
            except BaseException as error:
                self._found.put((None, error))

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._asked.put(False)


def _cases(batches: Sequence[Batch]) -> list[str]:
    return [case for batch in batches for case in batch.get("case", ())]


def _on_host(batch: Batch) -> Batch:
    return {key: value.detach().cpu() if torch.is_tensor(value) else value for key, value in batch.items()}
