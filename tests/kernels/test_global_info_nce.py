"""InfoNCE over ranks against one process that holds all pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtrast.kernels import info_nce

RANKS, PAIRS = 2, 24


def pairs(problems: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(*problems, PAIRS, 12, generator=generator) for _ in range(2))
    return query, key, torch.rand(*problems, PAIRS, generator=generator)


def on_one_rank(rank: int, folder: str, problems: tuple[int, ...], symmetric: bool, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    query, key, weights = (each.chunk(RANKS, dim=len(problems))[rank] for each in pairs(problems))
    temperature = torch.tensor([0.2], requires_grad=True)
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
    chosen = {"weights": weights} if options.get("weighed") else {}
    loss = info_nce(*leaves, temperature=temperature, symmetric=symmetric, group=dist.group.WORLD, **chosen)
    loss.backward()
    torch.save([loss.detach(), *(leaf.grad for leaf in leaves), temperature.grad], Path(folder, f"rank{rank}"))
    if options.get("uneven"):
        with pytest.raises(ValueError, match=r"query: expected the same shape on every rank of group, got"):
            info_nce(query[..., : 5 + rank, :], key[..., : 5 + rank, :], group=dist.group.WORLD)
        with pytest.raises(ValueError, match=r"group: works in float32"):
            info_nce(query.double(), key.double(), group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("problems", "symmetric", "options"),
    [((), True, {"uneven": True}), ((), False, {}), ((3,), True, {"weighed": True})],
    ids=["symmetric", "one way", "several problems, weighed"],
)
def test_two_ranks_equal_one_process(
    problems: tuple[int, ...], symmetric: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path), problems, symmetric, options), nprocs=RANKS)
    query, key, weights = pairs(problems)
    temperature = torch.tensor([0.2], requires_grad=True)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    chosen = {"weights": weights} if options.get("weighed") else {}
    loss = info_nce(*leaves, temperature=temperature, symmetric=symmetric, **chosen)
    loss.backward()
    found = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    losses, queries, keys, temperatures = zip(*found, strict=True)
    # What data parallel training does: the mean over the ranks.
    torch.testing.assert_close(sum(losses) / RANKS, loss.detach())
    for parts, leaf in ((queries, leaves[0]), (keys, leaves[1])):
        torch.testing.assert_close(torch.cat(parts, dim=len(problems)) / RANKS, leaf.grad)
    torch.testing.assert_close(sum(temperatures) / RANKS, temperature.grad)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        info_nce(torch.ones(3, 4), torch.ones(3, 4), group="any")
