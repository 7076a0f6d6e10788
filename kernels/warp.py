"""Warping by a displacement field in voxels.

    W(f, psi)(p) = f(p + psi(p))

with linear interpolation, and zeros outside the image. Unlike `torch.nn.functional.grid_sample` there is no
normalised grid: a displacement of zero is exactly the identity, whatever the size (COVER, ICCV 2025, W of section 3;
its released code mixes two grid conventions and misses the identity by up to half a voxel).
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from ._checks import check_displacement, check_map
from ._registration import (
    gradients_by_reference,
    needs_functional_reference,
    needs_reference,
    register_backward,
    register_operator,
)

# Displacements beyond this many voxels count as outside, and so do NaN and infinities.
MAXIMUM_DISPLACEMENT = 2.0**30


def warp(image: Tensor, displacement: Tensor, *, deterministic: bool = True) -> Tensor:
    """Reads `image` at p + displacement(p), with linear interpolation and zeros outside.

    Args:
        image: (B, C, H, W) or (B, C, D, H, W), float32, bfloat16, float16 or float64.
        displacement: (B, 2, H, W) or (B, 3, D, H, W) in voxels; component 0 moves along the first spatial axis. It is
            used in float32 (float64 where one argument has that). NaN and infinities count as outside: value 0 and
            gradient 0.
        deterministic: False: on a GPU the gradient of the image is summed by float atomics, and may differ in its last
            bits from run to run. Without effect on the CPU, which gives the same bits either way.

    Returns: the warped image, of image's shape and type; interpolation accumulates in float32.

    A voxel whose weight is zero has no part in the value, whatever it holds. The gradient of the displacement at a
    whole voxel is the forward difference. Where gradients of gradients are asked for, in float64, in forward mode and
    under the transforms of `torch.func`, the torch reference computes.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not fit, or image is empty.
    """
    check_map("image", image)
    check_displacement("displacement", displacement, "image", image)
    if needs_functional_reference() or torch.float64 in (image.dtype, displacement.dtype):
        return warp_reference(image, displacement)
    return torch.ops.voxtrast.warp(image, displacement.to(torch.float32), deterministic)


def warp_reference(image: Tensor, displacement: Tensor) -> Tensor:
    """The same in plain torch: the weighted sum of the corners of the cell that holds the displaced point."""
    working_type = torch.promote_types(torch.promote_types(image.dtype, displacement.dtype), torch.float32)
    batch, channels, *sizes = image.shape
    values = image.to(working_type).flatten(2)
    shift = displacement.to(working_type)
    usable = shift.abs() < MAXIMUM_DISPLACEMENT  # False for NaN
    shift = torch.where(usable, shift, 0)
    # The fraction is taken before the point is added: it keeps every bit.
    whole = shift.detach().floor()
    fraction = shift - whole
    point = torch.meshgrid(*(torch.arange(size, device=image.device) for size in sizes), indexing="ij")

    warped = torch.zeros_like(values)
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        weight = torch.ones_like(shift[:, 0])
        index = torch.zeros_like(shift[:, 0], dtype=torch.int64)
        for axis, (side, size) in enumerate(zip(corner, sizes, strict=True)):
            position = point[axis] + whole[:, axis].to(torch.int64) + side
            inside = usable[:, axis] & (position >= 0) & (position < size)
            share = fraction[:, axis] if side else 1 - fraction[:, axis]
            weight = weight * torch.where(inside, share, 0)
            index = index * size + torch.where(inside, position, 0)
        weight = weight.reshape(batch, 1, -1)
        value = values.gather(2, index.reshape(batch, 1, -1).expand(-1, channels, -1))
        # A corner without weight may hold NaN or an infinity. The product stays: the forward difference needs it.
        value = torch.where(weight == 0, value.nan_to_num(0, 0, 0), value)
        warped = warped + weight * value
    return warped.reshape(image.shape).to(image.dtype)


def _operator_reference(image: Tensor, displacement: Tensor, deterministic: bool = True) -> Tensor:
    return warp_reference(image, displacement)


def _fake(image: Tensor, displacement: Tensor, deterministic: bool = True) -> Tensor:
    return image.new_empty(image.shape)


def _fake_backward(
    grad_output: Tensor,
    image: Tensor,
    displacement: Tensor,
    need_image: bool,
    need_displacement: bool,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    return (
        image.new_empty(image.shape if need_image else (0,)),
        displacement.new_empty(displacement.shape if need_displacement else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    image, displacement, ctx.deterministic = inputs
    ctx.save_for_backward(image, displacement)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    image, displacement = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    if needs_reference("warp_backward", grad_output.device):
        return (*gradients_by_reference(warp_reference, (image, displacement), needed, grad_output), None)
    gradients = torch.ops.voxtrast.warp_backward(grad_output, image, displacement, *needed, ctx.deterministic)
    return (*(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), None)


register_operator(
    "warp(Tensor image, Tensor displacement, bool deterministic=True) -> Tensor",
    reference=_operator_reference,
    fake=_fake,
    save=_save,
    backward=_backward,
    float32_arguments=(1,),
)
register_backward(
    "warp_backward(Tensor grad_output, Tensor image, Tensor displacement, bool need_image, bool need_displacement,"
    " bool deterministic=True) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
