"""Which tensors of a pretrained network are trained, from which step on, and how fast.

A network is seen as layers from its head down to its stem: the head is what pretraining did not fill (the segmentation
layers, and tensors that the weights file lists as not pretrained), then come the decoder's blocks from the finest to
the coarsest, then the encoder's from the bottleneck to the stem. Layer-wise decay gives the head the whole learning
rate and each layer below it `layer_decay` times that of the one above (Clark et al., ELECTRA, 2020; Bao et al., BEiT,
2022, for images).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...methods.backbone import BackboneConfig, architecture_of
from ..errors import UserError

HEAD = "head"


@dataclass(frozen=True)
class Tuning:
    """How the pretrained tensors are treated; by default as all others."""

    freeze: str = "none"  # none | encoder | encoder:STEPS, for the first of the steps
    layer_decay: float = 1.0
    head_warmup: int = 0  # steps in which the head alone is trained

    def frozen_steps(self, steps: int) -> int:
        """Of `steps`, those in which the encoder stays as it is. Raises: UserError for a setting that cannot be."""
        part, colon, number = self.freeze.partition(":")
        if part not in ("none", "encoder") or (colon and part == "none") or (colon and not number.isdecimal()):
            raise UserError(f"--freeze {self.freeze}: expected none, encoder or encoder:STEPS, for example encoder:100")
        if colon and not 1 <= int(number) < steps:
            raise UserError(
                f"--freeze {self.freeze}: expected 1 to {steps - 1} of the {steps} steps; "
                "write --freeze encoder to freeze it in all of them"
            )
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"--layer-decay {self.layer_decay}: expected above 0 to 1, for example 0.75")
        if not 0 <= self.head_warmup < steps:
            raise UserError(f"--head-warmup {self.head_warmup}: expected 0 to {steps - 1} of the {steps} steps")
        return 0 if part == "none" else int(number) if colon else steps

    @property
    def is_default(self) -> bool:
        return self == Tuning()


@dataclass(frozen=True)
class Layer:
    name: str  # "head", "decoder.3" (counted from the bottleneck), "encoder.0" (counted from the image)
    parameters: list[nn.Parameter]
    rate: float  # share of the learning rate


def layers_of(network: nn.Module, config: BackboneConfig, new: Iterable[str], decay: float = 1.0) -> list[Layer]:
    """The layers with parameters, from the head down to the stem.

    Args:
        network: of `build_network(config, ...)`.
        new: names that pretraining did not fill, as `load_into` returns them.
        decay: of the rate from each layer to the one below it.
    """
    architecture = architecture_of(network)
    blocks = [(f"decoder.{number}", architecture.decoder_parts(number)) for number in range(config.levels - 1)]
    levels = [(f"encoder.{number}", part) for number, part in enumerate(architecture.encoder_parts(network))]
    parts = [(HEAD, architecture.last_layers)]
    parts += [(name, tuple(f"{each}." for each in part)) for name, part in (*blocks[::-1], *levels[::-1])]
    unfilled = set(new)
    found: dict[str, list[nn.Parameter]] = {name: [] for name, _ in parts}
    for name, parameter in network.named_parameters():
        owner = next(each for each, prefixes in parts if name.startswith(prefixes))
        found[HEAD if name in unfilled else owner].append(parameter)
    filled = [name for name, _ in parts if found[name]]  # a layer that pretraining did not reach is no step down
    return [Layer(name, found[name], decay**depth) for depth, name in enumerate(filled)]


class Plan:
    """A tuning of a network over a number of steps."""

    def __init__(self, network: nn.Module, layers: list[Layer], tuning: Tuning, steps: int) -> None:
        self.layers, self.tuning, self.steps = layers, tuning, steps
        self._network = network
        self._frozen_steps = tuning.frozen_steps(steps)
        self._trained: frozenset[str] | None = None

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, in the order of `layers`."""
        return [{"params": layer.parameters, "weight_decay": weight_decay} for layer in self.layers]

    def rates(self, learning_rate: float) -> list[float]:
        """The highest learning rate of each group."""
        return [learning_rate * layer.rate for layer in self.layers]

    def begin(self, step: int) -> None:
        """Freezes what is not trained in this step, counted from 1. What is frozen also keeps its running means."""
        trained = frozenset(self._trained_in(step))
        if trained == self._trained:
            return
        self._trained = trained
        for layer in self.layers:
            for parameter in layer.parameters:
                parameter.requires_grad_(layer.name in trained)
        self._network.train()
        for module in self._network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()

    def _trained_in(self, step: int) -> list[str]:
        if step <= self.tuning.head_warmup:
            return [HEAD]
        frozen = step <= self._frozen_steps
        return [layer.name for layer in self.layers if not (frozen and layer.name.startswith("encoder."))]

    def summary(self, learning_rate: float) -> dict[str, Any]:
        """For the line of a run: tensors by part, those that no step trains, the highest rate of each layer."""
        ever = set(self._trained_in(self.steps))
        counts = {part: self._count(part) for part in (HEAD, "decoder", "encoder")}
        return {
            "tensors": counts,
            "never_trained": sum(len(layer.parameters) for layer in self.layers if layer.name not in ever),
            "rates": {layer.name: rate for layer, rate in zip(self.layers, self.rates(learning_rate), strict=True)},
        }

    def describe(self, learning_rate: float) -> str:
        """One line for a person."""
        total = sum(len(layer.parameters) for layer in self.layers)
        words = [f"{total} tensors, {self._count(HEAD)} of them new"]
        if self.tuning.head_warmup:
            words.append(f"the new ones alone for {self.tuning.head_warmup} steps")
        if self._frozen_steps:
            when = "throughout" if self._frozen_steps == self.steps else f"for {self._frozen_steps} steps"
            words.append(f"the encoder's {self._count('encoder')} frozen {when}")
        if self.tuning.layer_decay < 1:
            rates = self.rates(learning_rate)
            words.append(f"learning rate {rates[0]:.2g} at the {self.layers[0].name} to {rates[-1]:.2g} at the stem")
        return "; ".join(words)

    def _count(self, part: str) -> int:
        return sum(len(layer.parameters) for layer in self.layers if layer.name.partition(".")[0] == part)
