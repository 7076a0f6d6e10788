from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from voxtrast.methods.parts.batch_norm import GlobalBatchNorm
from voxtrast.methods.parts.heads import Predictor

RANKS = 2


def test_one_process_computes_torch_s_batch_norm_with_its_gradients_and_running_statistics() -> None:
    torch.manual_seed(0)
    own, expected = GlobalBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    for norm in (own, expected):
        nn.init.constant_(norm.weight, 1.5)
        nn.init.constant_(norm.bias, -0.3)
    for _ in range(3):
        vectors = (2 * torch.randn(7, 5, dtype=torch.float64) + 3).requires_grad_()
        twin = vectors.detach().clone().requires_grad_()
        weights = torch.randn(7, 5, dtype=torch.float64)
        (own(vectors) * weights).sum().backward()
        (expected(twin) * weights).sum().backward()
        torch.testing.assert_close(vectors.grad, twin.grad, rtol=1e-9, atol=1e-12)
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(own, name).grad, getattr(expected, name).grad, rtol=1e-9, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(own, name), getattr(expected, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(own.eval()(vectors), expected.eval()(vectors), rtol=1e-12, atol=1e-12)


def test_outside_training_the_running_statistics_stay_and_one_sample_is_enough() -> None:
    norm = GlobalBatchNorm(4)
    with pytest.raises(ValueError, match=r"train\.global_batch: batch norm needs at least 2 samples"):
        norm(torch.randn(1, 4))
    norm.eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert torch.isfinite(norm(torch.randn(1, 4))).all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_statistics_of_low_precision_vectors_are_float32() -> None:
    vectors = (100 + torch.randn(64, 3)).bfloat16()
    found = GlobalBatchNorm(3)(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nn.BatchNorm1d(3)(vectors.float()), rtol=1e-4, atol=1e-4)


def predicted(vectors: torch.Tensor, group: object = None) -> tuple[torch.Tensor, Predictor]:
    torch.manual_seed(0)
    head = Predictor(6, 12).double()
    # A loss that every sample has for itself, unequal over the ranks.
    loss = (head(vectors, group) * torch.arange(6)).square().mean()
    loss.backward()
    return loss.detach(), head


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.manual_seed(1)
    vectors = torch.randn(8, 6, dtype=torch.float64).chunk(RANKS)[rank].clone().requires_grad_()
    loss, head = predicted(vectors, dist.group.WORLD)
    gradients = [parameter.grad for parameter in head.parameters()]
    torch.save([loss, vectors.grad, gradients, head.state_dict()], Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_ranks_have_the_statistics_and_gradients_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    torch.manual_seed(1)
    vectors = torch.randn(8, 6, dtype=torch.float64).requires_grad_()
    loss, head = predicted(vectors)
    losses, of_vectors, of_parameters, states = zip(
        *(torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)), strict=True
    )
    torch.testing.assert_close(sum(losses) / RANKS, loss)
    torch.testing.assert_close(torch.cat(of_vectors) / RANKS, vectors.grad)
    for parts, parameter in zip(zip(*of_parameters, strict=True), head.parameters(), strict=True):
        torch.testing.assert_close(sum(parts) / RANKS, parameter.grad)
    for name, value in head.state_dict().items():
        for state in states:
            torch.testing.assert_close(state[name], value)
