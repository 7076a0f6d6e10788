"""What an interpreter cannot show: sizes, streams, graphs."""

import math

import pytest
import torch
from torch import Tensor

from voxtrast.kernels import _native, bank_info_nce, bank_nce, info_nce, pairwise_logsumexp, positional_info_nce

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def pairs(count: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(count, channels, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]


def losses(query: Tensor, key: Tensor) -> Tensor:
    positions = torch.linspace(0, 1, len(query), device=query.device)
    bank = torch.flip(key.detach(), (0,))
    return torch.stack(
        (
            info_nce(query, key, symmetric=True),
            positional_info_nce(query, positions, threshold=0.05),
            bank_nce(query, key, bank, normalizer=2.0),
        )
    ).sum()


def test_the_operators_are_compiled() -> None:
    assert all(_native.is_compiled(name, torch.device("cuda")) for name in ("info_nce", "pairwise_backward"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1000, 4096])
def test_a_gpu_and_a_cpu_agree(count: int, dtype: torch.dtype) -> None:
    query, key = pairs(count, 64, dtype)
    found = torch.autograd.grad(losses(query, key), (query, key))
    others = [each.detach().cpu().requires_grad_() for each in (query, key)]
    expected = torch.autograd.grad(losses(*others), others)
    allowed = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.cpu() - theirs).float().norm() <= allowed * theirs.float().norm()


def test_nothing_waits_for_the_device() -> None:
    query, key = pairs(500, 32)
    losses(query, key).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses(query, key).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_the_step() -> None:
    query, key = pairs(700, 48)

    def step() -> list[Tensor]:
        loss = losses(query, key)
        return [loss, *torch.autograd.grad(loss, (query, key))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in step()]
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_torch_compile_takes_the_whole_step() -> None:
    query, key = pairs(300, 24)
    found, expected = torch.compile(losses, fullgraph=True)(query, key), losses(query, key)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (query, key)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-5)


def test_more_than_two_to_the_31_pairs() -> None:
    """Half of the vectors one way and half the other: every log-sum-exp is known."""
    count, scale = 65536, 5.0
    vectors = torch.zeros(count, 16, device="cuda", dtype=torch.bfloat16)
    vectors[:, 0] = torch.where(torch.arange(count, device="cuda") < count // 2, 1.0, -1.0)
    expected = math.log(count / 2 * (math.exp(scale) + math.exp(-scale)))
    row, column = pairwise_logsumexp(vectors, vectors.clone(), scale=scale, columns=True)
    for found in (row, column, pairwise_logsumexp(vectors, vectors, scale=scale)):
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0.0)


def test_a_bank_of_more_than_two_to_the_31_numbers() -> None:
    count, channels = 8_400_000, 256
    assert count * channels > 2**31
    bank = torch.empty(count, channels, device="cuda", dtype=torch.float16)
    for part in bank.split(400_000):
        part.copy_(torch.randn(part.shape, device="cuda"))
    query = torch.randn(40, channels, device="cuda", dtype=torch.float16)
    found = bank_info_nce(query, query, bank, temperature=0.2, normalize=False, reduction="none")
    parts = [(5.0 * (query.float() @ part.float().mT)).double().logsumexp(-1) for part in bank.split(400_000)]
    positive = 5.0 * query.double().square().sum(-1)
    expected = torch.nn.functional.softplus(torch.stack(parts).logsumexp(0) - positive, threshold=40)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_gradients_of_many_vectors() -> None:
    query, key = pairs(65536, 32)
    (found,) = torch.autograd.grad(info_nce(query, key, temperature=0.2, reduction="sum"), query)
    some = torch.arange(0, 65536, 8191, device="cuda")
    leaf = query.detach()[some].double().requires_grad_()
    unit, others = (torch.nn.functional.normalize(each, dim=-1) for each in (leaf, key.detach().double()))
    torch.nn.functional.cross_entropy(unit @ others.T / 0.2, some, reduction="sum").backward()
    assert (found[some].double() - leaf.grad).norm() <= 2e-2 * leaf.grad.norm()


def test_memory_grows_with_the_vectors_alone() -> None:
    query, key = pairs(65536, 64)
    info_nce(query[:100], key[:100], symmetric=True).backward()
    query.grad = key.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(query, key, symmetric=True).backward()
    # Inputs again and gradients in float32, partial sums; the matrix would be 17 GB.
    assert torch.cuda.max_memory_allocated() - before < 150e6
