"""How a network runs: what of it is kept for backward, in which order in memory, compiled or not.

No part of what it computes: the same values and gradients, under the same names in the state dict. A run may be resumed
with other settings, and weights know nothing of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Function = TypeVar("Function", bound=Callable[..., Any])
FIELDS = ("checkpoint_levels", "channels_last", "compile")  # of a BackboneConfig


@dataclass(frozen=True)
class Running:
    """Runs the parts of a network.

    Args:
        checkpoint_levels: at so many of the finest levels, encoder and decoder keep their inputs alone and compute the
            rest again in backward.
        channels_last: convolutions are given their maps with the channels last in memory. Parameters stay as they are:
            optimizers and ZeRO go through their memory in its order.
        compile: by torch.compile, at the first call for each shape.
    """

    checkpoint_levels: int = 0
    channels_last: bool = False
    compile: bool = False

    def prepare(self, network: nn.Module) -> None:
        if self.channels_last:
            for module in network.modules():
                if isinstance(module, _CONVOLUTIONS):
                    module.register_forward_pre_hook(_channels_last)

    def part(self, network: nn.Module, level: int, work: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """work(*inputs), which is a part of the network at a level, the finest being 0."""
        if level >= self.checkpoint_levels or not torch.is_grad_enabled():
            return work(*inputs)
        found: Tensor = checkpoint(
            work, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(network))
        )
        return found

    def compiled(self, work: Function) -> Function:
        """A function of a network as it is to be called."""
        return cast(Function, torch.compile(work)) if self.compile else work


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, *others = inputs
    order = torch.channels_last_3d if image.ndim == 5 else torch.channels_last
    return image.contiguous(memory_format=order), *others


@contextlib.contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms that run once more for backward count their batch once: meanwhile they update copies.

    Copies in place of a rollback: autograd would take the rolled-back tensors for changed ones.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if one is None else one.clone() for name, one in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def check_compiler(device: torch.device) -> None:
    """Raises: ValueError where torch.compile finds no compiler that works; compiles something small to know."""
    try:
        compiled: Any = torch.compile(torch.nn.functional.softplus)
        compiled(torch.ones(8, device=device, requires_grad=True)).sum().backward()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"backbone.compile: torch.compile does not work here ({(lines or [type(error).__name__])[0]}); install a "
            f"compiler (g++ for the CPU, triton for a GPU), or set backbone.compile=false"
        ) from None
