"""What every pretraining method offers to whoever runs it: a plain loop of ten lines, or the engine."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .views import ViewSpec

Batch = dict[str, Any]


class Method(nn.Module):
    """A network with its own views and losses.

    Every mean of a method runs over the global batch: all ranks and all micro-batches of one step. `counts` says
    what the means divide by; whoever runs several parts of a global batch sums the counts over the parts and puts
    `batch["share"][name]` = parts * own count / sum of counts, so that the mean of the parts' losses, and of their
    gradients, is the loss of the global batch. A batch without "share" is the whole batch.
    """

    name: str
    views: ViewSpec
    monitors: dict[str, Tensor]  # numbers of the last forward for the log, reduced like the losses; not trained on

    def __init__(self) -> None:
        super().__init__()
        self.monitors = {}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """The losses of one batch: named scalar terms, already weighted; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the means of this batch divide by, each of shape ()."""
        return {}

    def after_step(self, step: int) -> None:
        """Runs after each optimizer step: moving averages, banks."""

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
        """What a report draws of a batch, without gradients."""
        return {}

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
