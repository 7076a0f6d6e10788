"""Warping by a smooth displacement field, and the composition of two fields; image and displacement want gradients.

The limit counts every byte once: forward reads image and displacement and writes the result; backward reads the
gradient, image and displacement, and writes both gradients. Where all of that fits in a cache it may be exceeded.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import compose_displacement, compose_displacement_reference, warp, warp_reference

from ..harness import Case, gradients_of
from ..place import CPU, Cannot, Place

Function = Callable[[Tensor, Tensor], Tensor]
LARGEST_FOR_REFERENCE = 2**20  # numbers in an image
SPACING = 16  # voxels from one control point of the field to the next
SHIFT_VOXELS = 3.0  # standard deviation at the control points


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    volumes, images = [(1, 8, 64), (2, 32, 48)], [(4, 16, 256)]
    if not quick:
        volumes += [(1, 1, 96), (1, 8, 96), (1, 32, 96)]
        images += [(1, 1, 512)]
    if place.on_gpu and not quick:
        volumes += [(2, 32, 128), (4, 64, 96)]
        images += [(16, 32, 512)]
    shapes = [(*shape, 3) for shape in volumes] + [(*shape, 2) for shape in images]
    named = [dict(zip(("B", "C", "size", "axes"), shape, strict=True)) for shape in shapes]
    return [*({**shape, "compose": 0} for shape in named), {"B": 1, "C": 3, "size": 96, "axes": 3, "compose": 1}]


def smooth_displacement(batch: int, sizes: tuple[int, ...], place: Place) -> Tensor:
    """(B, D, *S) float32. No point comes closer than a twentieth of a voxel to where cells meet: the rounding of a
    normalised grid would choose another cell there, with another gradient."""
    coarse = torch.randn(batch, len(sizes), *(max(2, size // SPACING) for size in sizes), device=place.device)
    mode = "trilinear" if len(sizes) == 3 else "bilinear"
    field = SHIFT_VOXELS * functional.interpolate(coarse, size=sizes, mode=mode, align_corners=True)
    whole = field.floor()
    return (whole + 0.05 + 0.9 * (field - whole)).contiguous()


def check_is_short(image: Tensor) -> None:
    """Raises: Cannot where the torch reference, which gathers every corner by itself, takes seconds for a step."""
    if image.numel() > LARGEST_FOR_REFERENCE:
        raise Cannot("left out: takes too long at this size")


def by_grid_sample(image: Tensor, displacement: Tensor) -> Tensor:
    """As it is written everywhere; in float32, because a grid in 16 bits would miss whole voxels."""
    sizes = image.shape[2:]
    axes = [torch.arange(size, dtype=displacement.dtype, device=image.device) for size in sizes]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement
    extent = torch.tensor(sizes, dtype=displacement.dtype, device=image.device).sub(1).view(-1, *[1] * len(sizes))
    grid = (2 * points / extent - 1).movedim(1, -1).flip(-1)
    return functional.grid_sample(image.float(), grid, align_corners=True).to(image.dtype)


def compose_by_grid_sample(outer: Tensor, inner: Tensor) -> Tensor:
    return by_grid_sample(outer, inner) + inner


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    batch, channels, axes, composing = shape["B"], shape["C"], shape["axes"], shape["compose"]
    torch.manual_seed(0)
    sizes = (shape["size"],) * axes
    displacement = smooth_displacement(batch, sizes, place)
    functions: tuple[Function, Function, Function]
    if composing:
        functions = compose_displacement, compose_by_grid_sample, compose_displacement_reference
        image = smooth_displacement(batch, sizes, place)
    else:
        functions = warp, by_grid_sample, warp_reference
        image = place.randn(batch, channels, *sizes, requires_grad=False)
    ours, eager, reference = functions
    upstream = torch.randn(image.shape, device=place.device).to(image.dtype)
    step = partial(gradients_of, upstream=upstream)
    inputs = image.requires_grad_(), displacement.requires_grad_()

    def plain() -> Function:
        check_is_short(image)
        return reference

    rivals: dict[str, Callable[[], Function]] = {
        "grid_sample": lambda: eager,
        "torch.compile, grid_sample": lambda: torch.compile(eager, dynamic=False),
        "torch reference": plain,
    }
    steps, cannot = {"ours": step(ours, *inputs)}, {}
    for name, make in rivals.items():
        try:
            steps[name] = step(make(), *inputs)
        except Cannot as why:
            cannot[name] = str(why)
    # Interpolation, its transpose, and the products that the gradient of the displacement needs.
    flops = 3 * 2.0 * 2**axes * image.numel()
    moved = 5.0 * image.numel() * image.element_size() + 3.0 * displacement.numel() * displacement.element_size()
    op = "compose_displacement" if composing else "warp"
    return Case(op, shape, place, steps, flops, 0.0, cannot, moved)
