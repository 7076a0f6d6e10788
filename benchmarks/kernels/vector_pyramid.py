"""The vector pyramid on maps of five levels: the paper's in 2-D, that of the recipe `cover-3d` in 3-D.

With heads, a 1x1 convolution and a norm a level as COVER has them, or on the units themselves. Ours has the convolution
before the warp, as our COVER has it, the others behind it, as the paper's text and code have it: the same result. What
is counted: as for local correlation, and the bytes that warping and the heads move.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from voxtrast.kernels import vector_pyramid, vector_pyramid_reference, warp
from voxtrast.methods.cover import Projection, UnitNorm

from ..harness import Case, Step, gradients_of
from ..place import CPU, Place
from .eager_correlation import eager_pyramid, loop_correlation

UNITS = (4, 4, 4, 1, 1)  # from coarse to fine
CHANNELS = 8  # of a unit
# Gradients jump where a point passes from cell to cell. Beside float64, by the norm, planes with heads: ours is off by
# 6e-5, and grid_sample by 2.7e-2, whose coordinates, fractions of the map, are rounded across more often.
NORM_TOLERANCE = 5e-2
FEATURES = {2: (512, 256, 128, 64, 32), 3: (320, 256, 128, 64, 32)}  # of the maps, by axes


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    planes = [{"axes": 2, "size": 384, "B": 4, "heads": heads, "radius": 2} for heads in (1, 0)]
    volumes = [{"axes": 3, "size": 48 if quick else 96, "B": 1, "heads": heads, "radius": 2} for heads in (1, 0)]
    return planes + volumes


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    axes, radius = shape["axes"], shape["radius"]
    torch.manual_seed(0)
    channels = FEATURES[axes] if shape["heads"] else tuple(CHANNELS * units for units in UNITS)
    sizes = [shape["size"] // 2 ** (len(UNITS) - 1 - level) for level in range(len(UNITS))]
    maps, others = _maps(shape["B"], channels, sizes, place, axes)
    projections = [Projection(count, CHANNELS * units) for count, units in zip(channels, UNITS, strict=True)]
    norms = [UnitNorm(count, CHANNELS * units) for count, units in zip(channels, UNITS, strict=True)]
    modules = [module.to(place.device, place.dtype) for module in (*projections, *norms)] if shape["heads"] else []
    for norm in norms:
        nn.init.constant_(norm.norm.weight, 2.0)  # as sharp as trained ones
    parameters = [parameter for module in modules for parameter in module.parameters()]
    upstream = place.randn(shape["B"], axes, *[shape["size"]] * axes, requires_grad=False)

    def ours(fixed: Sequence[Tensor], moving: Sequence[Tensor], **options: Any) -> Tensor:
        """As COVER does: the linear half of the heads before the warp."""
        if not shape["heads"]:
            return vector_pyramid(fixed, moving, **options)
        ahead = [[project(each) for project, each in zip(projections, maps, strict=True)] for maps in (fixed, moving)]
        return vector_pyramid(*ahead, **options, heads=norms)

    def as_written(pyramid: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The whole head behind the warp, by a convolution."""
        convolve = functional.conv3d if axes == 3 else functional.conv2d

        def head_of(project: Projection, norm: UnitNorm) -> Callable[[Tensor], Tensor]:
            return lambda maps: norm.norm(convolve(maps, project.weight[(..., *[None] * axes)], norm.bias))

        heads = [head_of(*pair) if shape["heads"] else nn.Identity() for pair in zip(projections, norms, strict=True)]
        return partial(pyramid, heads=heads)

    def step_of(pyramid: Callable[..., Tensor]) -> Step:
        def loss(*inputs: Tensor) -> Tensor:
            fixed, moving = inputs[: len(UNITS)], inputs[len(UNITS) : 2 * len(UNITS)]
            return (pyramid(fixed, moving, radius=radius, units=UNITS) * upstream).sum()

        return gradients_of(loss, *maps, *others, *parameters)

    steps = {
        "ours": step_of(ours),
        "eager": step_of(as_written(eager_pyramid)),
        "our reference": step_of(as_written(vector_pyramid_reference)),
    }
    compiled, cannot = "torch.compile of the loop", {}  # the whole in one graph compiles for many minutes
    if axes == 3 and not place.on_gpu:
        cannot[compiled] = "left out: takes many minutes to compile for the volumes of five levels"
    else:
        loop = torch.compile(loop_correlation, dynamic=False)
        steps[compiled] = step_of(as_written(partial(eager_pyramid, correlate=loop)))
    offsets = (2 * radius + 1) ** axes
    units_of_all = [units * one.numel() // one.shape[1] for units, one in zip(UNITS, maps, strict=True)]
    flops = 8.0 * CHANNELS * offsets * sum(units_of_all)
    exponentials = 2.0 * offsets * sum(units_of_all)
    size = maps[0].element_size()
    moved = 6.0 * CHANNELS * size * sum(units_of_all) + 9.0 * 4 * upstream.numel()
    # Warping reads and writes the moving units, and in backward reads them and their gradient and writes another.
    moved += 5.0 * CHANNELS * size * sum(units_of_all[1:])
    if shape["heads"]:
        # A projection reads its map, for two views and two passes, and writes its units and the map's gradient.
        moved += 6.0 * size * sum(one.numel() for one in maps) + 4.0 * CHANNELS * size * sum(units_of_all)
        flops += 12.0 * CHANNELS * sum(units * one.numel() for units, one in zip(UNITS, maps, strict=True))
    return Case(
        "vector_pyramid", shape, place, steps, flops, exponentials, cannot, moved, norm_tolerance=NORM_TOLERANCE
    )


def _maps(
    batch: int, channels: Sequence[int], sizes: Sequence[int], place: Place, axes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Two views of random maps that correspond under a smooth field of up to some ten voxels, as trained ones do."""
    mode = "trilinear" if axes == 3 else "bilinear"
    coarse = 4.0 * torch.randn(batch, axes, *[max(2, sizes[0] // 4)] * axes)
    fixed, moving = [], []
    for level, (count, size) in enumerate(zip(channels, sizes, strict=True)):
        smooth = functional.interpolate(torch.randn(batch, count, *[size // 2] * axes), scale_factor=2, mode=mode)
        field = functional.interpolate(coarse, size=[size] * axes, mode=mode) / 2 ** (len(sizes) - 1 - level)
        one, other = 2 * smooth, warp(2 * smooth, -field)
        fixed.append(one.to(place.device, place.dtype).requires_grad_())
        moving.append(other.to(place.device, place.dtype).requires_grad_())
    return fixed, moving
