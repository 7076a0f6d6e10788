"""Losses of other libraries as functions of two sets of vectors, each where it can be had.

    python -m pip install -c constraints.txt --no-build-isolation -e ".[peers]"

None of them is needed: what cannot be imported is reported as "cannot", with the reason. lightly needs a torchvision
that fits torch, KeOps a C++ compiler at run time.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..place import Cannot

Loss = Callable[[Tensor, Tensor], Tensor]


def imported(module: str, name: str) -> Any:
    """Raises: Cannot where the import fails; a library whose own dependencies do not fit raises anything."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        raise Cannot(f"{missing.name} is not installed") from missing
    except Exception as broken:
        raise Cannot(f"import {module}: {str(broken).splitlines()[0]}") from broken


def unit(vectors: Tensor) -> Tensor:
    """Unit vectors of the same type, their lengths taken in float32."""
    return functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)


def needs_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Cannot("needs a GPU")


# Symmetric InfoNCE


def linear_cross_entropy_info_nce(temperature: float) -> Loss:
    options = imported("torch.nn", "LinearCrossEntropyOptions")()
    cross_entropy = imported("torch.nn.functional", "linear_cross_entropy")

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query), unit(key)
        targets = torch.arange(len(query), device=query.device)
        one, other = (
            cross_entropy(a / temperature, b, targets, options=options) for a, b in ((query, key), (key, query))
        )
        return (one + other) / 2

    return loss


def keops_info_nce(temperature: float) -> Loss:
    lazy = imported("pykeops.torch", "LazyTensor")
    imported("pykeops", "set_verbose")(False)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = (functional.normalize(vectors.float(), dim=-1) for vectors in (query, key))  # it has no bfloat16
        similarity = (lazy(query.unsqueeze(-2)) | lazy(key.unsqueeze(-3))) / temperature
        last = query.dim() - 1
        rows, columns = (similarity.logsumexp(dim=axis).squeeze(-1) for axis in (last, last - 1))
        return ((rows + columns) / 2 - (query * key).sum(-1) / temperature).mean()

    return loss


def inf_cl_info_nce(temperature: float, device: torch.device) -> Loss:
    needs_gpu(device)
    one_way = imported("inf_cl", "cal_flash_loss")

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query), unit(key)
        options = {"scale": 1 / temperature, "head_dim": query.shape[-1]}  # one head: C, a power of two
        return (one_way(query, key, **options).mean() + one_way(key, query, **options).mean()) / 2

    return loss


def flex_attention_info_nce(temperature: float, device: torch.device) -> Loss:
    needs_gpu(device)  # on a CPU it has no compiled backward
    attention = torch.compile(imported("torch.nn.attention.flex_attention", "flex_attention"), dynamic=False)
    request = imported("torch.nn.attention.flex_attention", "AuxRequest")(lse=True)

    def logsumexp(query: Tensor, key: Tensor) -> Tensor:
        values = key.new_zeros((1, 1, len(key), 16))  # not asked for; 16 is the least width of a kernel
        _, found = attention(query[None, None], key[None, None], values, scale=1 / temperature, return_aux=request)
        return found.lse[0, 0]

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = unit(query), unit(key)
        positive = (query.float() * key.float()).sum(-1) / temperature
        return ((logsumexp(query, key) + logsumexp(key, query)) / 2 - positive).mean()

    return loss


# NT-Xent


def monai_nt_xent(temperature: float) -> Loss:
    loss: Loss = imported("monai.losses", "ContrastiveLoss")(temperature)
    return loss


def lightly_nt_xent(temperature: float) -> Loss:
    loss: Loss = imported("lightly.loss", "NTXentLoss")(temperature)
    return loss


def metric_learning_nt_xent(temperature: float, name: str) -> Loss:
    """Args: name: NTXentLoss, or SupConLoss, which is the same where every vector has one positive."""
    of_views = imported("pytorch_metric_learning.losses", "SelfSupervisedLoss")
    loss: Loss = of_views(imported("pytorch_metric_learning.losses", name)(temperature))
    return loss
