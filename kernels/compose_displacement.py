"""Composition of two displacement fields: first `inner`, then `outer`.

    (outer o inner)(p) = outer(p + inner(p)) + inner(p) = W(outer, inner)(p) + inner(p)

so that warp(warp(f, outer), inner) and warp(f, compose_displacement(outer, inner)) read f at the same points
(COVER, ICCV 2025, the aggregation of its vector pyramid).
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_components, check_same_shape
from ._registration import gradients_by_reference, needs_functional_reference, needs_reference, register_operator
from .warp import warp_reference


def compose_displacement(outer: Tensor, inner: Tensor) -> Tensor:
    """W(outer, inner) + inner in one pass.

    Args:
        outer: (B, 2, H, W) or (B, 3, D, H, W) in voxels.
        inner: the same shape, in voxels. NaN and infinities in it read outer as zero, and stay in the sum.

    Returns: the composed field, float32 (float64 where one argument has that): displacements are never kept in low
        precision. Outside the volume outer counts as zero.

    Where `warp` computes by its torch reference, so does this.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, or a field is empty.
    """
    check_components("outer", outer)
    check_same_shape("inner", inner, "outer", outer)
    if needs_functional_reference() or torch.float64 in (outer.dtype, inner.dtype):
        return compose_displacement_reference(outer, inner)
    return torch.ops.voxtrast.compose_displacement(outer.to(torch.float32), inner.to(torch.float32))


def compose_displacement_reference(outer: Tensor, inner: Tensor) -> Tensor:
    """The same in plain torch."""
    working_type = torch.promote_types(torch.promote_types(outer.dtype, inner.dtype), torch.float32)
    inner = inner.to(working_type)
    return warp_reference(outer.to(working_type), inner) + inner


def _fake(outer: Tensor, inner: Tensor) -> Tensor:
    return outer.new_empty(outer.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    outer, inner = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if needs_reference("warp_backward", grad_output.device):
        return gradients_by_reference(compose_displacement_reference, (outer, inner), needed, grad_output)
    grad_outer, grad_inner = torch.ops.voxtrast.warp_backward(grad_output, outer, inner, *needed)
    return grad_outer if needed[0] else None, grad_inner + grad_output if needed[1] else None


register_operator(
    "compose_displacement(Tensor outer, Tensor inner) -> Tensor",
    reference=compose_displacement_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(0, 1),
)
