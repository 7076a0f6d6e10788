"""Regression of vectors: the masked mean of the L1 distance.

    L = sum_p mask(p) |prediction(p) - target(p)|_1 / sum_p mask(p)

(COVER, ICCV 2025, L_vec; PyTorch's `l1_loss` averages over the components, this sums over them.)
"""

from typing import Any

import torch
from torch import Tensor

from ._checks import check_map, check_mask, check_same_shape
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)


def vector_regression_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Masked mean of the L1 distance of two vector fields, summed over the components.

    Args:
        prediction: (B, D, *S), usually displacements in voxels, 2-D or 3-D.
        target: the same shape.
        mask: (B, 1, *S) weights, not negative, floating or bool. It gets no gradient. A voxel of weight zero is not
            looked at: what it holds, NaN too, has no part in the loss or its gradient.

    Returns: the loss, a scalar in the unit of prediction, float32 (float64 where one field has that). 0 with zero
        gradients where the mask is empty. The sum is the same for any number of threads.

    Where `warp` computes by its torch reference, so does this.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, or a field is empty.
    """
    check_map("prediction", prediction)
    check_same_shape("target", target, "prediction", prediction)
    check_mask("mask", mask, "prediction", prediction)
    if needs_functional_reference() or torch.float64 in (prediction.dtype, target.dtype):
        return vector_regression_loss_reference(prediction, target, mask)
    tensors = (tensor.to(torch.float32) for tensor in (prediction, target, mask.detach()))
    loss, _ = torch.ops.voxtrast.vector_regression_loss(*tensors)
    return loss


def vector_regression_loss_reference(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The same in plain torch."""
    return _loss_and_mask_sum(prediction, target, mask)[0]


def _loss_and_mask_sum(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    working_type = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    weight = mask.detach().to(working_type)
    # Chosen before the distance is taken: a NaN in a voxel without weight would otherwise reach the gradient.
    difference = torch.where(weight != 0, prediction.to(working_type) - target.to(working_type), 0)
    mask_sum = weight.sum()
    loss = (weight * difference.abs()).sum() / torch.where(mask_sum == 0, 1, mask_sum)
    return loss, mask_sum


def _fake(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.new_empty(()), prediction.new_empty(())


def _fake_backward(grad_loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mask_sum: Tensor) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])  # depends on the mask alone, which gets no gradient
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_loss: Tensor, grad_mask_sum: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target, mask, mask_sum = ctx.saved_tensors
    needed = (*ctx.needs_input_grad[:2], False)
    if needs_reference("vector_regression_loss_backward", grad_loss.device):
        inputs = (prediction, target, mask)
        return gradients_by_reference(vector_regression_loss_reference, inputs, needed, grad_loss)
    gradient = torch.ops.voxtrast.vector_regression_loss_backward(grad_loss, prediction, target, mask, mask_sum)
    return gradient if needed[0] else None, -gradient if needed[1] else None, None


register_operator(
    "vector_regression_loss(Tensor prediction, Tensor target, Tensor mask) -> (Tensor loss, Tensor mask_sum)",
    reference=_loss_and_mask_sum,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(0, 1, 2),
)
register_backward(
    "vector_regression_loss_backward(Tensor grad_loss, Tensor prediction, Tensor target, Tensor mask, Tensor mask_sum)"
    " -> Tensor",
    fake=_fake_backward,
)
