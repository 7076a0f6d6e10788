"""Local correlation of two maps, COVER's 8 channels a unit: volumes, planes and several units.

What is counted: 8 products and sums of each channel and offset (the logits in both passes, the two gradients), two
exponentials an offset, and the bytes of maps, field and gradients once in each pass that needs them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from voxtrast.kernels import local_correlation, local_correlation_reference

from ..harness import Case, Step, gradients_of
from ..place import CPU, Cannot, Place
from .eager_correlation import loop_correlation, unfold_correlation

CHANNELS = 8  # of a unit
LARGEST_BYTES = {"cpu": 8e9, "cuda": 60e9}  # that a rival may keep
# On a CPU: 500 times our time; and many minutes to compile.
SLOW = {"torch.compile of unfold": lambda voxels, offsets: voxels > 32**3,
        "torch.compile of the loop": lambda voxels, offsets: offsets > 125}  # fmt: skip
OTHER_WORK = "MONAI LNCC, radius 2"
# And the numbers that autograd keeps for each voxel and offset: products, copies of them, logits, the softmax.
RIVALS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "eager loop": (loop_correlation, CHANNELS + 3),
    "torch.compile of the loop": (torch.compile(loop_correlation, dynamic=False), CHANNELS + 3),
    "unfold": (unfold_correlation, 2 * CHANNELS + 3),
    "torch.compile of unfold": (torch.compile(unfold_correlation, dynamic=False), 2 * CHANNELS + 3),
    "our reference": (local_correlation_reference, 3),
}


def cases(quick: bool, place: Place = CPU) -> list[dict[str, int]]:
    volumes = (
        [(32, 2), (64, 2)] if quick else [(32, 2), (48, 2), (64, 2), (96, 2), (128, 2), (64, 1), (64, 3), (128, 3)]
    )
    found = [{"D": size, "H": size, "W": size, "B": 1, "units": 1, "radius": radius} for size, radius in volumes]
    planes = [{"D": 1, "H": 384, "W": 384, "B": 4, "units": 1, "radius": radius} for radius in (2, 3)]
    return found + planes[: 1 if quick else 2] + [{"D": 24, "H": 24, "W": 24, "B": 2, "units": 4, "radius": 2}]


def build(shape: dict[str, int], place: Place = CPU) -> Case:
    """D of 1 stands for two axes."""
    sizes = [shape["D"], shape["H"], shape["W"]] if shape["D"] > 1 else [shape["H"], shape["W"]]
    radius, units, axes = shape["radius"], shape["units"], len(sizes)
    torch.manual_seed(0)
    query, key = (place.randn(shape["B"], units * CHANNELS, *sizes) for _ in range(2))
    upstream = place.randn(shape["B"], axes, *sizes, requires_grad=False)

    def step_of(correlation: Callable[..., Tensor]) -> Step:
        return gradients_of(lambda q, k: (correlation(q, k, radius=radius, units=units) * upstream).sum(), query, key)

    offsets = (2 * radius + 1) ** axes
    voxels = query.numel() // CHANNELS  # of all units
    steps, cannot = {"ours": step_of(local_correlation)}, {}
    for name, (correlation, kept) in RIVALS.items():
        held = 4 * kept * offsets * voxels
        if held > LARGEST_BYTES[place.device.type]:
            cannot[name] = f"keeps {held / 1e9:.0f} GB"
        elif name in SLOW and not place.on_gpu and SLOW[name](voxels, offsets):
            cannot[name] = "left out: takes too long at this size"
        else:
            steps[name] = step_of(correlation)
    try:
        steps[OTHER_WORK] = _monai_step(place, shape["B"], sizes)
    except Cannot as why:
        cannot[OTHER_WORK] = str(why)
    flops = 8.0 * CHANNELS * offsets * voxels
    maps, fields = query.numel() * query.element_size(), 4 * upstream.numel()
    # forward: two maps in, field out; backward: two maps, the field and its gradient in, two gradients out
    moved = 6.0 * maps + 3.0 * fields
    exponentials = 2.0 * offsets * voxels
    return Case(
        "local_correlation", shape, place, steps, flops, exponentials, cannot, moved, other_work=frozenset({OTHER_WORK})
    )


def _monai_step(place: Place, batch: int, sizes: list[int]) -> Step:
    """MONAI's local normalized cross-correlation of two images: window sums and no search, for orientation."""
    try:
        from monai.losses import LocalNormalizedCrossCorrelationLoss
    except ImportError as missing:
        raise Cannot("not installed") from missing
    loss = LocalNormalizedCrossCorrelationLoss(spatial_dims=len(sizes), kernel_size=5).to(place.device)
    one, other = (place.randn(batch, 1, *sizes) for _ in range(2))
    return gradients_of(loss, one, other)
