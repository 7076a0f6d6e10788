"""What every pretraining method offers to whoever runs it: a plain loop of ten lines, or the engine."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .stages import Stage, StageSchedule
from .views import ViewSpec

Batch = dict[str, Any]


@runtime_checkable
class Collector(Protocol):
    """A part that collects in the forwards of a step what it takes in after the step."""

    def forget_collected(self) -> None: ...


class Method(nn.Module):
    """A network with its own views and losses.

    Every mean of a method runs over the global batch: all ranks and all micro-batches of one step. `counts` says
    what the means divide by; whoever runs several parts of a global batch sums the counts over the parts and puts
    `batch["share"][name]` = parts * own count / sum of counts, so that the mean of the parts' losses, and of their
    gradients, is the loss of the global batch. A batch without "share" is the whole batch. What else the parts must
    know of each other passes through `exchange` before the forwards, and through `group` within them.

    Args:
        terms: the names of the losses with their weights; see `weights`.
    """

    name: str
    views: ViewSpec
    seed: int = 0  # of every draw that is not the data plane's
    group: Any = None  # the process group whose ranks share a batch; None where this process has all of it
    monitors: dict[str, Tensor]  # numbers of the last forward for the log, reduced like the losses; not trained on
    # Trained by an optimizer of its own, by turns with the method; no submodule, so in none of its parameters.
    adversary: nn.Module | None = None
    reads_parameters = True  # in `exchange` or `after_step`; False spares ZeRO 3 gathering them for these

    def __init__(self, terms: Mapping[str, float]) -> None:
        super().__init__()
        self.monitors = {}
        self.terms = dict(terms)
        self.schedule = StageSchedule((), 1, self.terms)

    def set_stages(self, stages: Sequence[Stage], steps: int) -> None:
        """Which terms are active when, over `steps` steps. Raises: ValueError naming the stage that is wrong."""
        self.schedule = StageSchedule(stages, steps, self.terms)

    def weights(self, step: int) -> dict[str, float]:
        """The active terms of a step with their weights; a term that is not among them need not be computed."""
        return self.schedule.weights(step)

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """For draws that concern the whole batch: the same on every rank and in every micro-batch of a step."""
        word = hashlib.sha256(f"{self.seed} {step} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(word[:8], "little", signed=True))

    def check_training(self, global_batch: int, parts: int) -> None:
        """Refuses (ValueError naming the setting) a batch that the method cannot learn from.

        Args:
            global_batch: of one stage; called for each.
            parts: into how many it is cut, ranks times micro-batches.
        """

    def check_volumes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Refuses (ValueError naming the setting) volumes (D, H, W) that lack what the method needs."""

    def advice(self, shapes: Sequence[tuple[int, ...]]) -> str | None:
        """What of these settings will hardly learn from volumes of (D, H, W), with the remedy; said at the start."""

    def exchange(self, batches: list[Batch], step: int) -> None:
        """Called once a step before the forwards with this rank's parts of the global batch, which may add to them."""

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses of one batch: named scalar terms, already weighted; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the means of this batch divide by, each of shape ()."""
        return {}

    def after_step(self, step: int) -> None:
        """Runs after each optimizer step: moving averages, banks."""

    def step_dropped(self) -> None:
        """Runs in place of `after_step` where the step was not taken: what its forwards collected is forgotten.

        Whoever drops a step puts the buffers back as they were, but for those of banks: they change after a step alone.
        """
        for each in self.modules():
            if isinstance(each, Collector):
                each.forget_collected()

    def weights_loaded(self, step: int) -> None:
        """Runs after the backbone was given other weights: what followed the old ones begins anew."""

    def adversary_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the adversary is called with for its own step, without gradients, after a forward of this batch."""
        raise NotImplementedError(f"{type(self).__name__} has no adversary")

    def warning(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A line for the user where a step's numbers over the global batch (`loss/…`, `monitor/…`) bode ill."""
        return None

    def preflight(
        self, batches: Iterable[Batch], total: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """Looks at some batches before training and refuses (ValueError) a set-up that cannot work.

        Args:
            batches: some that training could meet.
            total: adds sums up over all ranks, so that every rank judges alike.

        Returns: numbers worth logging.
        """
        return {}

    def inspect(self, batch: Batch) -> dict[str, Tensor]:
        """What a report draws of a batch, without gradients.

        Returns: where the method has them, `features` (B, C, *S) of a view; `displacement` (B, D, *S) in voxels;
            `restored` (B, 1, *S) with its `input`, where that is not the first view, and its `target`, where that is
            not the clean first view.
        """
        return {}

    def _apply(self, function: Any, recurse: bool = True) -> "Method":
        # A module of its own, but it moves with the method.
        if self.adversary is not None:
            self.adversary._apply(function)
        return super()._apply(function, recurse)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer: no decay of biases, norms and other vectors."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def transferable(self) -> dict[str, Tensor]:
        """The tensors that go downstream, under the backbone's own names."""
        raise NotImplementedError(f"{type(self).__name__} transfers nothing")

    def untrained(self) -> list[str]:
        """The names in `transferable` that no loss reaches: they have their initial values."""
        return []
