"""LAMB (You et al., 2020, algorithm 2) for any device: Adam's direction, in steps as long as the layer's norm says.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        r = m' / (sqrt(v') + eps) + decay x
    x = x - rate |x| / |r| r

with m' and v' corrected for their start at zero. |x| / |r| is 1 where one of them is 0, and for parameters that are not
decayed (biases and norms), as in the authors' own code.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    counts_in_integers = ("step",)  # a tensor on a GPU would be waited for

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (one, two) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        taken, gradient = state["step"], parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - one)
        state["exp_avg_sq"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
        deviation = (state["exp_avg_sq"] / (1 - two**taken)).sqrt_().add_(group["eps"])
        direction = (state["exp_avg"] / (1 - one**taken)).div_(deviation)
        length: Tensor | float = 1.0
        if group["weight_decay"]:
            direction.add_(parameter, alpha=group["weight_decay"])
            of_parameter, of_direction = parameter.norm(), direction.norm()
            usual = (of_parameter > 0) & (of_direction > 0)
            length = torch.where(usual, of_parameter / of_direction, 1.0)
        parameter.sub_(direction * (group["lr"] * length))
