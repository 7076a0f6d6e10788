"""Agreement of two feature maps along a displacement field, without storing the warped map.

    L = 1 - sum_p mask(p) cos( fixed(p), W(moving, psi)(p) ) / sum_p mask(p)

(COVER, ICCV 2025, L_con. The released code warps all channels at full resolution and keeps the result for backward;
here both passes warp a block of points at a time.)
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_displacement, check_map, check_mask, check_same_shape
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)
from .warp import warp_reference

# Shorter vectors have no direction. The same number stands in csrc/cpu/warp_points.inl.
MINIMUM_NORM = 1e-6


def warped_cosine_loss(fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor) -> Tensor:
    """1 - masked mean cosine between `fixed` and `moving` warped by `displacement`.

    A vector whose norm is below 1e-6 has no direction: its cosine is 0, and so is its gradient (the true one grows
    like 1/norm). That holds for zero vectors, and for points that the displacement sends outside.

    Args:
        fixed: (B, C, *S), 2-D or 3-D, float32, bfloat16, float16 or float64.
        moving: the same shape. Where the types differ, both are promoted.
        displacement: (B, D, *S) in voxels, used in float32; it gets a gradient where it asks for one.
        mask: (B, 1, *S) weights, not negative, floating or bool. It gets no gradient. A voxel of weight zero is not
            looked at.

    Returns: the loss, a scalar between 0 and 2, float32 (float64 where a map or the field has that). 0 with zero
        gradients where the mask is empty. The sum is the same for any number of threads.
        NaN where a vector that counts holds NaN and its partner has a direction.

    Where `warp` computes by its torch reference, so does this.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, or a map is empty.
    """
    check_map("fixed", fixed)
    check_same_shape("moving", moving, "fixed", fixed)
    check_displacement("displacement", displacement, "fixed", fixed)
    check_mask("mask", mask, "fixed", fixed)
    if needs_functional_reference() or torch.float64 in (fixed.dtype, moving.dtype, displacement.dtype):
        return warped_cosine_loss_reference(fixed, moving, displacement, mask)
    common = torch.promote_types(fixed.dtype, moving.dtype)
    loss, _ = torch.ops.voxtrast.warped_cosine_loss(
        fixed.to(common), moving.to(common), displacement.to(torch.float32), mask.detach().to(torch.float32)
    )
    return loss


def warped_cosine_loss_reference(fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor) -> Tensor:
    """The same in plain torch."""
    return _loss_and_mask_sum(fixed, moving, displacement, mask)[0]


def _loss_and_mask_sum(fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    working_type = torch.promote_types(torch.promote_types(fixed.dtype, moving.dtype), torch.float32)
    working_type = torch.promote_types(working_type, displacement.dtype)
    weight = mask.detach().to(working_type)
    # A voxel without weight is emptied and sent outside: nothing is read there and no gradient comes from it.
    here = torch.where(weight != 0, fixed.to(working_type), 0)
    field = torch.where(weight != 0, displacement.to(working_type), torch.inf)
    there = warp_reference(moving.to(working_type), field)

    fixed_norm, there_norm = ((vectors * vectors).sum(1, keepdim=True) for vectors in (here, there))  # squared
    # Asked this way round, NaN counts as a direction and shows in the loss.
    directed = ~((fixed_norm < MINIMUM_NORM**2) | (there_norm < MINIMUM_NORM**2))
    fixed_norm, there_norm = (torch.where(directed, squared, 1).sqrt() for squared in (fixed_norm, there_norm))
    cosine = torch.where(directed, (here * there).sum(1, keepdim=True) / (fixed_norm * there_norm), 0)

    mask_sum = weight.sum()
    mean = (weight * cosine).sum() / torch.where(mask_sum == 0, 1, mask_sum)
    return torch.where(mask_sum == 0, 0, 1 - mean), mask_sum


def _fake(fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(()), mask.new_empty(())


def _fake_backward(
    grad_loss: Tensor,
    fixed: Tensor,
    moving: Tensor,
    displacement: Tensor,
    mask: Tensor,
    mask_sum: Tensor,
    *needed: bool,
) -> tuple[Tensor, ...]:
    tensors = (fixed, moving, displacement)
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip(tensors, needed, strict=True))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])  # depends on the mask alone, which gets no gradient
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_loss: Tensor, grad_mask_sum: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, mask_sum = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    if needs_reference("warped_cosine_loss_backward", grad_loss.device):
        return gradients_by_reference(warped_cosine_loss_reference, inputs, (*needed, False), grad_loss)
    gradients = torch.ops.voxtrast.warped_cosine_loss_backward(grad_loss, *inputs, mask_sum, *needed)
    return (*(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None)


register_operator(
    "warped_cosine_loss(Tensor fixed, Tensor moving, Tensor displacement, Tensor mask)"
    " -> (Tensor loss, Tensor mask_sum)",
    reference=_loss_and_mask_sum,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(2, 3),
)
register_backward(
    "warped_cosine_loss_backward(Tensor grad_loss, Tensor fixed, Tensor moving, Tensor displacement, Tensor mask,"
    " Tensor mask_sum, bool need_fixed, bool need_moving, bool need_displacement) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
