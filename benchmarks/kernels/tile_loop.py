"""The honest rivals: symmetric InfoNCE by tiles in plain torch, with a constant shift and one exponential for both
directions. Thirty lines that anybody could write, for a CPU; and for a GPU, where the products are cuBLAS's in the
type of the inputs and torch.compile fuses what is done with each tile."""

from typing import Any

import torch
from torch import Tensor

from ..place import Place
from .peers import unit

TILE = 1024
TILES_TO_TRY = (1024, 2048, 4096, 8192)
ENOUGH = 65536  # vectors; a tile that is best for so many is best for more


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
    query, key = (torch.nn.functional.normalize(vectors.float(), dim=-1) for vectors in (query, key))
    loss: Tensor = TileLoop.apply(query, key, 1 / temperature)
    return loss


@torch.compile(dynamic=False)
def _sums(product: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    e = (product.float() * scale - scale).exp()  # unit vectors: no similarity is above the scale
    return e.sum(1), e.sum(0)


@torch.compile(dynamic=False)
def _shares(product: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
    e = (product.float() * scale - scale).exp()
    return (e * (a[:, None] + b[None, :])).to(product.dtype)


class CompiledTileLoop(torch.autograd.Function):
    """Of unit vectors. Products in their type, everything summed in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: float, tile: int) -> Tensor:
        rows, columns = (torch.zeros(len(vectors), device=query.device) for vectors in (query, key))
        for i in range(0, len(query), tile):
            for j in range(0, len(key), tile):
                of_rows, of_columns = _sums(query[i : i + tile] @ key[j : j + tile].T, scale)
                rows[i : i + tile] += of_rows
                columns[j : j + tile] += of_columns
        ctx.save_for_backward(query, key, rows, columns)
        ctx.scale, ctx.tile = scale, tile
        positive = scale * (query.float() * key.float()).sum(1)
        return ((rows.log() + columns.log()) / 2 + scale - positive).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        query, key, rows, columns = ctx.saved_tensors
        tile, count = ctx.tile, len(query)
        a, b = 0.5 * count / rows, 0.5 * count / columns  # times the count: shares near 1, which float16 can hold
        grad_query, grad_key = (torch.zeros_like(vectors, dtype=torch.float32) for vectors in (query, key))
        for i in range(0, count, tile):
            for j in range(0, count, tile):
                product = query[i : i + tile] @ key[j : j + tile].T
                share = _shares(product, ctx.scale, a[i : i + tile], b[j : j + tile])
                grad_query[i : i + tile] += share @ key[j : j + tile]
                grad_key[j : j + tile] += share.T @ query[i : i + tile]
        factor = gradients[0] * ctx.scale / count
        found = ((grad_query / count - key) * factor, (grad_key / count - query) * factor)
        return found[0].to(query.dtype), found[1].to(key.dtype), None, None


def compiled_tile_loop_info_nce(query: Tensor, key: Tensor, temperature: float, tile: int) -> Tensor:
    loss: Tensor = CompiledTileLoop.apply(unit(query), unit(key), 1 / temperature, tile)
    return loss


def best_tile(query: Tensor, key: Tensor, temperature: float, place: Place) -> int:
    """The fastest of TILES_TO_TRY for these vectors, or for the first 65,536 of them."""
    some = [vectors[:ENOUGH].detach().requires_grad_() for vectors in (query, key)]
    seconds = {}
    for tile in TILES_TO_TRY:
        if tile > len(some[0]):
            continue

        def step(tile: int = tile) -> None:
            compiled_tile_loop_info_nce(some[0], some[1], temperature, tile).backward()

        step()  # compiles
        seconds[tile] = min(place.seconds_of(step) for _ in range(2))
    return min(seconds, key=lambda tile: seconds[tile]) if seconds else TILES_TO_TRY[0]
