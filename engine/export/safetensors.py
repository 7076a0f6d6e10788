"""The weights as a safetensors file of their own: the network's keys, the description, what was not pretrained."""

from pathlib import Path
from typing import Any

from torch import nn

from ...methods.backbone import transferable_state
from ..weights import save_weights


def write_safetensors(file: Path, network: nn.Module, description: dict[str, Any], untrained: list[str]) -> list[str]:
    """Writes the file; its description names under `not_pretrained` what of the network pretraining left as it was."""
    tensors = transferable_state(network)
    save_weights(file, tensors, {**description, "not_pretrained": untrained})
    inside = [name for name in untrained if name in tensors]
    return [
        f"{file}: {len(tensors)} names under the network's own keys",
        f"in the file, but not pretrained: {', '.join(inside) or 'nothing'}",
        f"not in the file: {', '.join(name for name in untrained if name not in tensors)}",
    ]
