"""Registers an operator of namespace `voxtrast` with torch: schema, reference, fake, autograd and autocast.

The compiled libraries add implementations for their devices and nothing else, so an operator is complete without
them: any device that has no implementation runs the torch reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native

LIBRARY = torch.library.Library("voxtrast", "FRAGMENT")
AUTOCAST_DEVICES = ("CPU", "CUDA")


def register_operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    float32_arguments: Sequence[int],
) -> None:
    """Registers an operator that is differentiable in reverse mode, the only one that torch.library registers.

    The public function that calls it asks `needs_functional_reference` first.

    Args:
        schema: "name(Tensor a, ...) -> ..."
        reference: the same function in plain torch, with the schema's defaults; may not return one of its arguments
        fake: gives empty outputs of the right shape and type; with the schema's defaults, which torch leaves out
        save: save(ctx, inputs, output), called after forward
        backward: backward(ctx, *gradients) -> one gradient, or None, for each argument
        float32_arguments: positions of the arguments that autocast casts to float32; the others stay what they are
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.voxtrast, name).default

    def run_reference(first: Tensor, *rest: Any) -> Any:
        if _native.becomes_compiled(name, first.device):
            return operator(first, *rest)
        _native.warn_of_reference(name, first.device)
        return reference(first, *rest)

    def autocast(*arguments: Any) -> Any:
        device = arguments[0].device.type
        cast = [
            value.to(torch.float32) if position in float32_arguments else value
            for position, value in enumerate(arguments)
        ]
        with torch.autocast(device, enabled=False):
            return operator(*cast)

    LIBRARY.impl(name, run_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"voxtrast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"voxtrast::{name}", backward, setup_context=save, lib=LIBRARY)
    for device in AUTOCAST_DEVICES:
        LIBRARY.impl(name, autocast, f"Autocast{device}")


def register_backward(schema: str, *, fake: Callable[..., Any]) -> None:
    """Registers the operator that computes gradients, where something compiled does. It has no gradient of its own."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"voxtrast::{name}", fake, lib=LIBRARY)


def needs_functional_reference() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way.

    What `torch.library` registers knows neither: tangents would be lost without a word, and `torch.func.grad` would
    fail. The public functions then compute by their reference, which every transform can take apart.
    """
    # Not peek_interpreter_stack: while torch.compile traces, that is never None, and no graph would hold the operator.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_reference(operator: str, device: torch.device) -> bool:
    """Whether a backward pass must go through the reference.

    So it must for gradients of gradients (autograd runs backward with gradients enabled then), and where `operator`,
    the one that computes the gradients, has no implementation.
    """
    return torch.is_grad_enabled() or not _native.is_compiled(operator, device)


def gradients_by_reference(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of reference(*inputs), differentiable themselves where gradients are enabled."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may have been computed from another, and only the partial derivatives are wanted.
        aliases = [
            tensor.view_as(tensor) if need and tensor.requires_grad else tensor.detach().requires_grad_(need)
            for tensor, need in zip(inputs, needed, strict=True)
        ]
        output = reference(*aliases)
        wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=differentiable, materialize_grads=True))
    return tuple(next(found) if need else None for need in needed)
