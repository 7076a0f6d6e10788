"""The precision of forwards and backwards; parameters, moments and whatever is averaged over steps stay float32."""

from typing import Any

import torch

AUTOCAST = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(name: str, device: torch.device) -> Any:
    """What `train.autocast` stands for, as a context."""
    return torch.autocast(device.type, AUTOCAST[name] if name != "none" else torch.bfloat16, enabled=name != "none")
