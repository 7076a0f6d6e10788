"""A DiRA of three levels with batches and a loop for it, for its tests."""

import itertools
from typing import Any

import torch
from torch import Tensor

from voxtrast.methods import BackboneConfig
from voxtrast.methods.dira import Dira, DiraConfig, DiraViews
from voxtrast.methods.stages import Stage

DISCRIMINATIONS = ("moco", "simsiam", "barlow_twins")

FORMS = ("least_squares", "log", "wgan_gp")

STAGES = [
    Stage("d", terms={"discriminative": 1.0}),
    Stage("dr", terms={"discriminative": 1.0, "restorative": 10.0}),
    Stage("dra", terms={"discriminative": 1.0, "restorative": 10.0, "adversarial": 0.5}),
]


def small_backbone(dimensions: int) -> BackboneConfig:
    return BackboneConfig(dimensions=dimensions, features=[4, 8, 8], encoder_blocks=[1], decoder_blocks=[1])


def small_dira(dimensions: int = 2, views: DiraViews | None = None, **config: Any) -> Dira:
    torch.manual_seed(0)
    widths = {"bank": 11, "hidden": 8, "outputs": 6, "predictor_hidden": 4, "critic_width": 2}
    chosen = DiraConfig(**{**widths, "adversarial_weight": 0.5, **config})
    return Dira(chosen, small_backbone(dimensions), views or DiraViews(crop=[16] * dimensions))


def small_batch(count: int = 4, dimensions: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 1, *[16] * dimensions)
    return {name: torch.randn(size, generator=generator) for name in ("x1", "x2", "x1_clean")}


def total_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Loop:
    """Training as in a plain loop: the generator's step, then the critic's."""

    def __init__(self, method: Dira) -> None:
        self.method = method
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizers = [torch.optim.SGD(trained, lr=0.01, momentum=0.9)]
        if method.adversary is not None:
            self.optimizers.append(torch.optim.Adam(method.adversary.parameters(), lr=1e-3, betas=(0.5, 0.999)))

    def step(self, step: int) -> dict[str, float]:
        batch = small_batch(seed=step)
        losses = self.method(batch, step)
        self._take(self.optimizers[0], losses)
        if "adversarial" in self.method.weights(step):
            assert self.method.adversary is not None
            of_critic = self.method.adversary(*self.method.adversary_inputs(batch))
            self._take(self.optimizers[1], of_critic)
            losses |= {f"adversary/{name}": loss for name, loss in of_critic.items()}
        self.method.after_step(step)
        return {name: loss.item() for name, loss in losses.items()}

    @staticmethod
    def _take(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        total_of(losses).backward()
        optimizer.step()


def gradients_and_buffers(method: Dira) -> dict[str, Tensor]:
    named = itertools.chain(method.named_parameters(), method.adversary.named_parameters())
    return {name: p.grad for name, p in named if p.grad is not None} | dict(method.named_buffers())
