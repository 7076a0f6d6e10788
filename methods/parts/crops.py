"""Which sizes of views a backbone takes."""

import math
from collections.abc import Sequence

from ..backbone import BackboneConfig


def check_size(setting: str, size: Sequence[int], backbone: BackboneConfig) -> None:
    """Refuses (ValueError naming the setting) a view that the backbone cannot halve down to its bottleneck.

    Args:
        setting: where the size was given, such as "views.crop".
        size: of the view, voxels.
    """
    stride = backbone.stride
    fitting = [max(stride, round(side / stride) * stride) for side in size]
    if len(size) != backbone.dimensions or any(side < 1 or side % stride for side in size):
        expected = f", such as {fitting}" if len(size) == backbone.dimensions else ""
        raise ValueError(
            f"{setting}: expected {backbone.dimensions} multiples of {stride} ({backbone.levels} levels), "
            f"got {list(size)}{expected}"
        )
    if backbone.norm == "instance" and math.prod(side // stride for side in size) == 1:
        raise ValueError(
            f"{setting}: {list(size)} leaves one voxel at the bottleneck, of which an instance norm makes nothing; "
            f"take {[2 * side for side in size]}, fewer backbone.features, or backbone.norm=group"
        )
