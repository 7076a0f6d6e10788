"""The numbers of a step by name, summed over its micro-batches."""

from torch import Tensor


def named(total: Tensor, losses: dict[str, Tensor], monitors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars, without gradients: `loss`, `loss/TERM`, `monitor/NAME`."""
    return (
        {"loss": total.detach()}
        | {f"loss/{name}": value.detach() for name, value in losses.items()}
        | {f"monitor/{name}": value.detach() for name, value in monitors.items()}
    )


def add(numbers: dict[str, Tensor], more: dict[str, Tensor], parts: int) -> None:
    """Adds those of one of so many parts, in place, so that the sum is their mean."""
    for name, value in more.items():
        numbers[name] = numbers.get(name, 0) + value / parts
