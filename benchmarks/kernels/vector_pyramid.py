"""The vector pyramid on maps of five levels: the paper's in 2-D, that of the recipe `cover-3d` in 3-D.

With heads, a 1x1 convolution and a norm a level as COVER has them, or on the units themselves. What is counted: as for
local correlation, and the bytes that warping and the heads move.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from voxtrast.kernels import vector_pyramid, vector_pyramid_reference

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
    maps = [place.randn(shape["B"], count, *[size] * axes) for count, size in zip(channels, sizes, strict=True)]
    others = [(one + place.randn(*one.shape)).detach().requires_grad_() for one in maps]
    heads = [_head(axes, count, CHANNELS * units).to(place.device, place.dtype) if shape["heads"] else nn.Identity()
             for count, units in zip(channels, UNITS, strict=True)]  # fmt: skip
    parameters = [parameter for head in heads for parameter in head.parameters()]
    upstream = place.randn(shape["B"], axes, *[shape["size"]] * axes, requires_grad=False)

    def step_of(pyramid: Callable[..., Tensor]) -> Step:
        def loss(*inputs: Tensor) -> Tensor:
            fixed, moving = inputs[: len(UNITS)], inputs[len(UNITS) : 2 * len(UNITS)]
            return (pyramid(fixed, moving, radius=radius, units=UNITS, heads=heads) * upstream).sum()

        return gradients_of(loss, *maps, *others, *parameters)

    steps = {
        "ours": step_of(vector_pyramid),
        "eager": step_of(eager_pyramid),
        "our reference": step_of(vector_pyramid_reference),
    }
    compiled, cannot = "torch.compile of the loop", {}  # the whole in one graph compiles for many minutes
    if axes == 3 and not place.on_gpu:
        cannot[compiled] = "left out: takes many minutes to compile for the volumes of five levels"
    else:
        steps[compiled] = step_of(partial(eager_pyramid, correlate=torch.compile(loop_correlation, dynamic=False)))
    offsets = (2 * radius + 1) ** axes
    units_of_all = [units * one.numel() // one.shape[1] for units, one in zip(UNITS, maps, strict=True)]
    flops = 8.0 * CHANNELS * offsets * sum(units_of_all)
    exponentials = 2.0 * offsets * sum(units_of_all)
    size = maps[0].element_size()
    moved = 6.0 * CHANNELS * size * sum(units_of_all) + 9.0 * 4 * upstream.numel()
    # Warping reads and writes the moving map, and in backward reads it and its gradient and writes another.
    moved += 5.0 * size * sum(one.numel() for one in maps[1:])
    if shape["heads"]:
        # A head reads its map and writes its units, for two views and two passes.
        moved += 6.0 * size * sum(one.numel() for one in maps)
        flops += 12.0 * CHANNELS * sum(units * one.numel() for units, one in zip(UNITS, maps, strict=True))
    return Case(
        "vector_pyramid", shape, place, steps, flops, exponentials, cannot, moved, norm_tolerance=NORM_TOLERANCE
    )


def _head(axes: int, channels: int, outputs: int) -> nn.Module:
    convolution = nn.Conv3d if axes == 3 else nn.Conv2d
    return nn.Sequential(convolution(channels, outputs, 1), nn.GroupNorm(1, outputs))
