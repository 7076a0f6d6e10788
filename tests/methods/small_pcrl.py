"""A PCRL of two levels with batches for it, for its tests."""

from typing import Any

import torch
from torch import Tensor

from voxtrast.methods import BackboneConfig, Batch
from voxtrast.methods.pcrl import Pcrl, PcrlConfig, PcrlViews
from voxtrast.methods.views import View

SIZES = {2: (8, 8), 3: (4, 8, 8)}


def small_pcrl(dimensions: int = 3, norm: str = "instance", **config: Any) -> Pcrl:
    torch.manual_seed(0)
    backbone = BackboneConfig(
        dimensions=dimensions, features=[8, 16], encoder_blocks=[1], decoder_blocks=[1], norm=norm
    )
    view = View(flips=[0.5] * dimensions, quarter_turns=True, clean=True)
    options = {"bank_size": 37, "embedding": 12, "gate_hidden": 6} | config
    return Pcrl(PcrlConfig(**options), backbone, PcrlViews(list(SIZES[dimensions]), view, view))


def small_batch(count: int = 4, dimensions: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for view in ("x1", "x2"):
        batch[view] = torch.randn(count, 1, *SIZES[dimensions], generator=generator)
        batch[f"{view}_clean"] = torch.randn(count, 1, *SIZES[dimensions], generator=generator)
        batch[f"{view}_flips"] = torch.randint(2, (count, dimensions), generator=generator)
        batch[f"{view}_quarter_turns"] = torch.randint(4, (count,), generator=generator)
    return batch


def doubled(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def rows(batch: Batch, chosen: slice) -> Batch:
    return {name: value[chosen].clone() for name, value in batch.items()}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(method: Pcrl) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def unit_rows(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)
