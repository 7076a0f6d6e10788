"""What the backbones have in common: fields with values of their own, an encoder and a decoder opened up."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..backbone import BackboneConfig

DEFAULT_SLOPE = 0.01
RunPart = Callable[..., Tensor]  # run(level, work, *inputs) -> work(*inputs), the finest level being 0


class Architecture(ABC):
    """How a network of a library is built and where in it the maps are. Stateless: the network is an argument."""

    class_name: str  # with its module
    # Prefixes in the state dict: the last layers, which the downstream task replaces, and second names of tensors.
    last_layers: tuple[str, ...]
    second_names: tuple[str, ...] = ()
    norms: tuple[str, ...]  # that it can be built with
    encoder_module = "encoder"  # the network's encoder, without what belongs to the decoder

    @abstractmethod
    def own_values(self, config: "BackboneConfig") -> dict[str, Any]:
        """Of the fields that a recipe leaves empty."""

    def fill(self, config: "BackboneConfig") -> None:
        for name, value in self.own_values(config).items():
            if not getattr(config, name):
                setattr(config, name, list(value) if isinstance(value, list) else value)

    @abstractmethod
    def check(self, config: "BackboneConfig") -> None:
        """Raises: ValueError naming the field that the network cannot be built with."""

    @abstractmethod
    def build(self, config: "BackboneConfig", classes: int) -> nn.Module:
        """The library's network with initial weights."""

    def encoder_strides(self, config: "BackboneConfig") -> list[int]:
        """Of the encoder maps, fine to coarse."""
        return [2**level for level in range(len(config.features))]

    def decoder_channels(self, config: "BackboneConfig") -> list[int]:
        """Of the bottleneck and the decoder maps, coarse to fine."""
        return list(config.features)[::-1]

    @abstractmethod
    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        """Encoder maps, fine to coarse; the last is the bottleneck."""

    @abstractmethod
    def encode_by_parts(self, network: Any, image: Tensor, run: RunPart) -> list[Tensor]:
        """The same maps; what belongs to one level alone goes through `run`."""

    @abstractmethod
    def decode(self, network: Any, block: int, below: Tensor, skip: Tensor | None) -> Tensor:
        """One block of the decoder, counted from the bottleneck, on the map below it.

        Args:
            skip: None where there is no encoder map of that size, or where the recipe leaves it out.
        """

    @abstractmethod
    def encoder_parts(self, network: Any) -> list[tuple[str, ...]]:
        """Names of the modules of the encoder, by depth, those that see the image first."""

    @abstractmethod
    def decoder_parts(self, block: int) -> tuple[str, ...]:
        """Names of the modules that this block alone passes a gradient to."""

    def skip_kernels(self, config: "BackboneConfig") -> list[str]:
        """Names of the kernels that take a skip beside the map from below."""
        return []


def require(config: "BackboneConfig", field: str, expected: Any, reason: str) -> None:
    """Refuses a field that the architecture has no use for, where it is not what the network has anyway."""
    found = getattr(config, field)
    if found != expected:
        raise ValueError(f"backbone.{field}: {found!r}, but {config.architecture} {reason}; take {expected!r}")
