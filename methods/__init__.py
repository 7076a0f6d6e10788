"""What is learned: networks, views, losses and recipes of the pretraining methods."""

from importlib import resources
from typing import Any

from .backbone import Backbone, BackboneConfig, build_network, transferable_state
from .cover import Cover
from .dira import Dira
from .jcl import JCL
from .mae import Mae
from .method import Batch, Method
from .pcl import PCL
from .pcrl import Pcrl
from .pcrlv2 import PcrlV2
from .views import AffineRanges, AppearanceRanges, View, ViewSpec

METHODS: dict[str, Any] = {
    "cover": Cover,
    "dira": Dira,
    "jcl": JCL,
    "mae": Mae,
    "pcl": PCL,
    "pcrl": Pcrl,
    "pcrlv2": PcrlV2,
}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


__all__ = [
    "JCL",
    "METHODS",
    "PCL",
    "AffineRanges",
    "AppearanceRanges",
    "Backbone",
    "BackboneConfig",
    "Batch",
    "Cover",
    "Dira",
    "Mae",
    "Method",
    "Pcrl",
    "PcrlV2",
    "View",
    "ViewSpec",
    "build_network",
    "recipe_names",
    "transferable_state",
]
