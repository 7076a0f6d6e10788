"""The momentum encoder: a copy of a network that follows it as an exponential moving average (MoCo)."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class MomentumTwin(nn.Module):
    """theta' <- m theta' + (1 - m) theta after each step, in float32; no gradients.

    Parameters alone follow: the running statistics of its norms are its own, as in MoCo. Its tensors are buffers under
    the names of the source's parameters, so that ZeRO 3, which cuts parameters, leaves them whole.

    Args:
        source: the network to copy; what is never called costs memory alone.
        momentum: m.
    """

    def __init__(self, source: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected 0 up to less than 1, got {momentum}")
        self.momentum = momentum
        self.network = copy.deepcopy(source).requires_grad_(False)
        self._hide()

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """The source's parameters must be whole."""
        for own, theirs in self._pairs(source):
            own.lerp_(theirs.to(own.dtype), 1 - self.momentum)

    @torch.no_grad()
    def copy(self, source: nn.Module) -> None:
        """Begins anew from the source."""
        for own, theirs in self._pairs(source):
            own.copy_(theirs)

    @torch.no_grad()
    def forward(self, *arguments: Any) -> Any:
        return self.network(*arguments)

    @contextlib.contextmanager
    def as_parameters(self) -> Iterator[None]:
        """Within, its tensors are parameters: conversions of batch norm expect them to be."""
        for path in self._hidden:
            prefix, _, name = path.rpartition(".")
            module = self.network.get_submodule(prefix)
            tensor = module.get_buffer(name)
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        yield
        self._hide()

    def tensors(self) -> dict[str, Tensor]:
        """What follows, under the names of the source's parameters."""
        return {name: self.network.get_buffer(name) for name in self._hidden}

    def _pairs(self, source: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, theirs in source.named_parameters():
            own = self.network.get_buffer(name)
            if own.shape != theirs.shape:
                raise ValueError(f"{name}: {tuple(theirs.shape)} of the source for {tuple(own.shape)}; gather it first")
            yield own, theirs.detach()

    def _hide(self) -> None:
        self._hidden = []
        for prefix, module in self.network.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    delattr(module, name)
                    precise = torch.promote_types(parameter.dtype, torch.float32)
                    module.register_buffer(name, parameter.detach().to(precise))
                    self._hidden.append(f"{prefix}.{name}".removeprefix("."))
