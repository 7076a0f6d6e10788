"""InfoNCE over ranks against one process that holds all pairs."""

from collections.abc import Sequence
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


CASES = {
    "symmetric": ((), True, False),
    "one way": ((), False, False),
    "several problems, weighed": ((3,), True, True),
}


def loss_and_gradients(inputs: Sequence[Tensor], symmetric: bool, weighed: bool, **options: Any) -> tuple[Tensor, ...]:
    leaves = [each.clone().requires_grad_() for each in inputs[:2]]
    temperature = torch.tensor([0.2], requires_grad=True)
    chosen = {"weights": inputs[2]} if weighed else {}
    loss = info_nce(*leaves, temperature=temperature, symmetric=symmetric, **chosen, **options)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in (*leaves, temperature))


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {}
    for name, (problems, symmetric, weighed) in CASES.items():
        mine = [each.chunk(RANKS, dim=len(problems))[rank] for each in pairs(problems)]
        found[name] = loss_and_gradients(mine, symmetric, weighed, group=dist.group.WORLD)
    torch.save(found, Path(folder, f"rank{rank}"))
    query, key, _ = pairs(())
    with pytest.raises(ValueError, match=r"query: expected the same shape on every rank of group, got"):
        info_nce(query[: 5 + rank], key[: 5 + rank], group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"group: works in float32"):
        info_nce(query.double(), key.double(), group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, ...]]]:
    """Loss, gradients of both sides and of the temperature, by case, of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name: str, of_ranks: list[dict[str, tuple[Tensor, ...]]]) -> None:
    problems, symmetric, weighed = CASES[name]
    loss, *gradients, of_temperature = loss_and_gradients(pairs(problems), symmetric, weighed)
    losses, *parts, temperatures = zip(*(found[name] for found in of_ranks), strict=True)
    # What data parallel training does: the mean over the ranks.
    torch.testing.assert_close(sum(losses) / RANKS, loss)
    for part, gradient in zip(parts, gradients, strict=True):
        torch.testing.assert_close(torch.cat(part, dim=len(problems)) / RANKS, gradient)
    torch.testing.assert_close(sum(temperatures) / RANKS, of_temperature)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        info_nce(torch.ones(3, 4), torch.ones(3, 4), group="any")
