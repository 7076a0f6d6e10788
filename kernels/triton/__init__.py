"""The pairwise operators on CUDA tensors, in Triton.

Importing this folder costs nothing and needs no Triton: an operator's first call on a CUDA tensor imports it.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .._registration import LIBRARY

OPERATORS = (
    "pairwise_logsumexp",
    "pairwise_backward",
    "info_nce",
    "positional_info_nce",
    "positional_info_nce_backward",
    "softplus_sums",
    "softplus_sums_backward",
)


def register() -> None:
    """Adds the CUDA implementations to the schemas. Without Triton, and on AMD's GPUs, which torch calls CUDA devices
    too, the torch reference stays in their place."""
    if torch.version.hip is None and importlib.util.find_spec("triton") is not None:
        for name in OPERATORS:
            LIBRARY.impl(name, _imported_when_called(name), "CUDA")


def _imported_when_called(name: str) -> Callable[..., Any]:
    def operator(*arguments: Any) -> Any:
        return getattr(importlib.import_module(".operators", __package__), name)(*arguments)

    return operator
