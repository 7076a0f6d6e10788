"""The honest rival on the CPU: symmetric InfoNCE by tiles in plain torch, with a constant shift and one exponential for
both directions. Thirty lines that anybody could write."""

from typing import Any

import torch
from torch import Tensor

TILE = 1024


class TileLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: float) -> Tensor:
        shift = scale * (query.norm(dim=1).max() * key.norm(dim=1).max()).item()
        rows, columns = query.new_zeros(len(query)), query.new_zeros(len(key))
        for i in range(0, len(query), TILE):
            for j in range(0, len(key), TILE):
                e = torch.mm(query[i : i + TILE], key[j : j + TILE].T).mul_(scale).sub_(shift).exp_()
                rows[i : i + TILE] += e.sum(1)
                columns[j : j + TILE] += e.sum(0)
        ctx.save_for_backward(query, key, rows, columns)
        ctx.scale, ctx.shift = scale, shift
        positive = scale * (query * key).sum(1)
        return ((rows.log() + columns.log()) / 2 + shift - positive).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        query, key, rows, columns = ctx.saved_tensors
        a, b = 0.5 / rows, 0.5 / columns
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        for i in range(0, len(query), TILE):
            for j in range(0, len(key), TILE):
                g = torch.mm(query[i : i + TILE], key[j : j + TILE].T).mul_(ctx.scale).sub_(ctx.shift).exp_()
                g.mul_(a[i : i + TILE, None] + b[None, j : j + TILE])
                if i == j:
                    g.diagonal().sub_(1)
                grad_query[i : i + TILE].addmm_(g, key[j : j + TILE])
                grad_key[j : j + TILE].addmm_(g.T, query[i : i + TILE])
        factor = gradients[0] * ctx.scale / len(query)
        return grad_query * factor, grad_key * factor, None


def tile_loop_info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    query, key = (torch.nn.functional.normalize(vectors, dim=-1) for vectors in (query, key))
    loss: Tensor = TileLoop.apply(query, key, 1 / temperature)
    return loss
