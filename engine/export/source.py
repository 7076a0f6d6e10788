"""What is exported: a run's weights in the network that they are for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...methods.backbone import BackboneConfig, architecture_of, build_network
from ..errors import UserError
from ..weights import SEGMENTATION, first_few, load_into, load_weights
from .fit import unwrapped

CLASSES = 2  # of the last layers, which the task replaces


@dataclass(frozen=True)
class Source:
    """A network that holds pretrained weights."""

    file: Path  # that they were read from
    network: nn.Module
    config: BackboneConfig
    description: dict[str, Any]  # of the weights file
    untrained: list[str]  # names with initial values, last layers included
    partly: list[str]  # names of kernels with initial values in the channels of the skips
    task_layers: tuple[str, ...]  # prefixes of the last layers
    notes: list[str]  # what was mended on the way, for the screen


def open_source(file: Path) -> Source:
    """Builds the network that a weights file describes, and fills it.

    What pretraining did not train gets initial values, the same in every export.

    Raises: UserError where the file cannot be used, or does not fit its own description.
    """
    tensors, description = load_weights(file)
    if description.get("kind") == SEGMENTATION:
        raise UserError(f"{file}: is a fine-tuned model; give the run that it began with, or predict with it")
    if "module" in description:
        raise UserError(f"{file}: holds {description['module']!r} of a network alone; give the run that it is from")
    wrapped = [name for name in tensors if unwrapped(name) != name]
    if wrapped:
        bare = {unwrapped(name): tensor for name, tensor in tensors.items()}
        if len(bare) < len(tensors):
            raise UserError(
                f"{file}: holds tensors both bare and wrapped, such as {wrapped[0]}; save one module's alone"
            )
        tensors = bare
        for field in ("untrained", "not_pretrained"):
            description[field] = [unwrapped(name) for name in description.get(field, [])]
    try:
        config = BackboneConfig.from_dict(description["backbone"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_network(config, CLASSES)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{file}: its backbone cannot be built ({error}); use the version of voxtrast that "
            f"wrote it ({description.get('version', 'unknown')})"
        ) from error
    left = load_into(network, tensors, description.get("untrained", []))
    untrained = list(dict.fromkeys([*description.get("not_pretrained", []), *left]))
    return Source(
        file, network, config, description, untrained,
        partly=_without_their_skips(config, network, untrained),
        task_layers=architecture_of(network).last_layers,
        notes=[f"names freed of wrappers: {first_few(wrapped)}"] if wrapped else [],
    )  # fmt: skip


def _without_their_skips(config: BackboneConfig, network: nn.Module, untrained: list[str]) -> list[str]:
    """The kernels of the decoder that were trained without the channels of their skips."""
    if config.skips:
        return []
    kernels = architecture_of(network).skip_kernels(config)
    return [name for name in kernels if name not in untrained]
