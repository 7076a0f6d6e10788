"""Swin UNETR (Hatamizadeh et al., 2022): windows of attention going down, convolutions going up. MONAI's, unchanged.

Its encoder maps are what the decoder is given: convolved tokens, and at stride 16 the tokens themselves. The
convolutions between tokens and decoder belong to the decoder block that they feed.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .architecture import DEFAULT_SLOPE, Architecture, RunPart, require

if TYPE_CHECKING:
    from ..backbone import BackboneConfig

FEATURE_SIZE = 48  # of the published network; `features` can name another
WIDENING = [1, 1, 2, 4, 8, 16]  # channels of the maps at strides 1 to 32, in feature sizes
HEADS = 12  # the least common multiple of what the attention heads ask of the feature size


class SwinUNETR(Architecture):
    class_name = "monai.networks.nets.swin_unetr.SwinUNETR"
    last_layers = ("out.",)
    norms = ("instance",)
    encoder_module = "swinViT"

    def own_values(self, config: "BackboneConfig") -> dict[str, Any]:
        size = config.features[0] if config.features else FEATURE_SIZE
        values = {"encoder_blocks": [2], "decoder_blocks": [1], "norm": "instance"}
        return {"features": [size * each for each in WIDENING], **values}

    def fill(self, config: "BackboneConfig") -> None:
        if len(config.features) == 1:
            config.features = self.own_values(config)["features"]
        super().fill(config)

    def check(self, config: "BackboneConfig") -> None:
        size = config.features[0]
        if size < 1 or size % HEADS:
            raise ValueError(
                f"backbone.features: the feature size of {config.architecture} must be a multiple of {HEADS}, got "
                f"{size}; write backbone.features=[{FEATURE_SIZE}]"
            )
        if config.features != self.own_values(config)["features"]:
            raise ValueError(
                f"backbone.features: {list(config.features)}, but {config.architecture} takes its feature size alone; "
                f"write backbone.features=[{FEATURE_SIZE}]"
            )
        for field in ("encoder_blocks", "decoder_blocks"):
            require(config, field, self.own_values(config)[field], "has blocks of its own")
        require(config, "norm", "instance", "has instance norm around its attention")
        require(config, "negative_slope", DEFAULT_SLOPE, "has a slope of its own")
        require(config, "skips", True, "has convolutions on its skips, which would stay untrained")

    def build(self, config: "BackboneConfig", classes: int) -> nn.Module:
        # MONAI takes seconds to import, and most recipes do without it.
        from monai.networks.nets.swin_unetr import SwinUNETR as Network

        network: nn.Module = Network(
            in_channels=config.input_channels,
            out_channels=classes,
            feature_size=config.features[0],
            spatial_dims=config.dimensions,
        )
        return network

    def encode(self, network: Any, image: Tensor) -> list[Tensor]:
        return self.encode_by_parts(network, image, lambda _, work, *inputs: work(*inputs))

    def encode_by_parts(self, network: Any, image: Tensor, run: RunPart) -> list[Tensor]:
        """The attention is kept whole: it is the smaller part of the finest levels."""
        tokens = network.swinViT(image, network.normalize)
        return [
            run(0, network.encoder1, image),
            run(1, network.encoder2, tokens[0]),
            run(2, network.encoder3, tokens[1]),
            run(3, network.encoder4, tokens[2]),
            tokens[3],
            run(5, network.encoder10, tokens[4]),
        ]

    def decode(self, network: Any, block: int, below: Tensor, skip: Tensor | None) -> Tensor:
        found: Tensor = getattr(network, f"decoder{5 - block}")(below, skip)
        return found

    def encoder_parts(self, network: Any) -> list[tuple[str, ...]]:
        layers = [(f"swinViT.layers{number}",) for number in range(1, 5)]
        return [("swinViT.patch_embed",), *layers, ("encoder10",)]

    def decoder_parts(self, block: int) -> tuple[str, ...]:
        return (f"decoder{5 - block}", f"encoder{5 - block}")[: 1 if block == 0 else 2]
