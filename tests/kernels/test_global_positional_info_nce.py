"""Positional contrast over ranks against one process that holds all vectors."""

from pathlib import Path

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


def on_one_rank(rank: int, folder: str, leading: tuple[int, ...], dtype: torch.dtype, weighed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    features, positions, weights = (
        each.chunk(RANKS, dim=axis)[rank] for each, axis in zip(batch(leading), (1, -1, 1), strict=True)
    )
    leaf = features.to(dtype).clone().requires_grad_()
    temperature = torch.tensor([0.2], requires_grad=True)
    chosen = {"weights": weights} if weighed else {"reduction": "sum"}
    group = dist.group.WORLD
    loss = positional_info_nce(leaf, positions, threshold=0.2, temperature=temperature, group=group, **chosen)
    loss.backward()
    torch.save([loss.detach(), leaf.grad, temperature.grad], Path(folder, f"rank{rank}"))
    with pytest.raises(ValueError, match=r"features: expected the same shape on every rank of group, got"):
        positional_info_nce(features[:, : 5 + rank], positions[..., : 5 + rank], threshold=0.2, group=group)
    with pytest.raises(ValueError, match=r"group: works in float32"):
        positional_info_nce(features.double(), positions, threshold=0.2, group=group)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("leading", "dtype", "weighed"),
    [(SHARED, torch.float32, False), (OWN, torch.float32, True), (SHARED, torch.bfloat16, True)],
    ids=["shared positions, sum", "own positions, weighed mean", "bfloat16"],
)
def test_two_ranks_equal_one_process(
    leading: tuple[int, ...], dtype: torch.dtype, weighed: bool, tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path), leading, dtype, weighed), nprocs=RANKS)
    features, positions, weights = batch(leading)
    leaf, temperature = features.to(dtype).requires_grad_(), torch.tensor([0.2], requires_grad=True)
    chosen = {"weights": weights} if weighed else {"reduction": "sum"}
    loss = positional_info_nce(leaf, positions, threshold=0.2, temperature=temperature, **chosen)
    loss.backward()
    found = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    losses, gradients, temperatures = zip(*found, strict=True)
    # Data parallel training takes the mean over the ranks; of sums, their sum.
    share = RANKS if weighed else 1
    torch.testing.assert_close(sum(losses) / share, loss.detach())
    torch.testing.assert_close(torch.cat(gradients, dim=1) / share, leaf.grad)
    torch.testing.assert_close(sum(temperatures) / share, temperature.grad)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"group: torch.distributed is not initialised"):
        positional_info_nce(torch.ones(3, 4), torch.ones(3), threshold=1.0, group="any")
