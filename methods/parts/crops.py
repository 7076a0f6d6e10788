"""Whether a network can take the views of a store, and of a certain size."""

import math
from collections.abc import Sequence

from ..backbone import BackboneConfig


def check_channels(backbone: BackboneConfig) -> None:
    """Raises: ValueError where the network takes images of several channels."""
    if backbone.input_channels != 1:
        raise ValueError(f"backbone.input_channels: a store has one channel, got {backbone.input_channels}; take 1")


def check_crop(crop: Sequence[int], backbone: BackboneConfig, shrunk: int = 1, name: str = "views.crop") -> None:
    """Raises: ValueError naming the setting, with a value that works.

    Args:
        crop: the size that the network must halve at every level.
        backbone: the network.
        shrunk: how many times smaller along each axis the network sees it at the least.
        name: the setting that says the size.
    """
    check_channels(backbone)
    small = [size // shrunk if size % shrunk == 0 else 0 for size in crop]
    if shrunk == 1 or len(crop) != backbone.dimensions:
        backbone.check_size(crop, name)
        return
    stride = backbone.stride * shrunk
    seen = f"{backbone.levels} levels, seen {shrunk} times smaller"
    if any(size < 1 or size % backbone.stride for size in small):
        works = [max(1, round(size / stride)) * stride for size in crop]
        raise ValueError(
            f"{name}: expected {backbone.dimensions} multiples of {stride} ({seen}), got {list(crop)}; take {works}"
            " or fewer backbone.features"
        )
    if backbone.norm == "instance" and math.prod(size // stride for size in crop) == 1:
        raise ValueError(
            f"backbone.features: of a crop {list(crop)} the last level ({seen}) sees a single voxel, which an instance "
            f"norm makes 0; take {list(backbone.features)[:-1]}, or {name}={[2 * size for size in crop]}"
        )
