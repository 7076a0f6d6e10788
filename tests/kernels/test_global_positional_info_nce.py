"""Positional contrast over ranks against one process that holds all vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtrast.kernels import positional_info_nce

RANKS, COUNT = 2, 24
SHARED, OWN = (), (3,)  # leading dimensions of the positions


def batch(leading: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, COUNT, 12, generator=generator)
    features[1, 4] = 0
    positions = torch.rand(*leading, COUNT, generator=generator)
    positions[..., 5] = 7.0  # near nothing
    return features, positions, torch.rand(3, COUNT, generator=generator)


CASES = {
    "shared positions, sum": (SHARED, torch.float32, False),
    "own positions, weighed mean": (OWN, torch.float32, True),
    "bfloat16": (SHARED, torch.bfloat16, True),
}


def loss_and_gradients(
    inputs: Sequence[Tensor], dtype: torch.dtype, weighed: bool, **options: Any
) -> tuple[Tensor, ...]:
    features, positions, weights = inputs
    leaf, temperature = features.to(dtype).clone().requires_grad_(), torch.tensor([0.2], requires_grad=True)
    chosen = {"weights": weights} if weighed else {"reduction": "sum"}
    loss = positional_info_nce(leaf, positions, threshold=0.2, temperature=temperature, **chosen, **options)
    loss.backward()
    return loss.detach(), leaf.grad, temperature.grad


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    group, found = dist.group.WORLD, {}
    for name, (leading, dtype, weighed) in CASES.items():
        mine = [each.chunk(RANKS, dim=axis)[rank] for each, axis in zip(batch(leading), (1, -1, 1), strict=True)]
        found[name] = loss_and_gradients(mine, dtype, weighed, group=group)
    torch.save(found, Path(folder, f"rank{rank}"))
    for leading in (SHARED, OWN):
        features, positions, _ = batch(leading)
        with pytest.raises(ValueError, match=r"features: expected the same shape on every rank of group, got"):
            positional_info_nce(features[:, : 5 + rank], positions[..., : 5 + rank], threshold=0.2, group=group)
        with pytest.raises(ValueError, match=r"group: works in float32"):
            positional_info_nce(features.double(), positions, threshold=0.2, group=group)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, ...]]]:
    """Loss, gradients of the features and of the temperature, by case, of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_one_rank, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name: str, of_ranks: list[dict[str, tuple[Tensor, ...]]]) -> None:
    leading, dtype, weighed = CASES[name]
    loss, gradient, of_temperature = loss_and_gradients(batch(leading), dtype, weighed)
    losses, gradients, temperatures = zip(*(found[name] for found in of_ranks), strict=True)
    # Data parallel training takes the mean over the ranks; of sums, their sum.
    share = RANKS if weighed else 1
    torch.testing.assert_close(sum(losses) / share, loss)
    torch.testing.assert_close(torch.cat(gradients, dim=1) / share, gradient)
    torch.testing.assert_close(sum(temperatures) / share, of_temperature)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        positional_info_nce(torch.ones(3, 4), torch.ones(3), threshold=1.0, group="any")
