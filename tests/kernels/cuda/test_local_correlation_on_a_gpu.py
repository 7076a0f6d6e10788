"""What an emulation cannot show: sizes, streams, graphs."""

import pytest
import torch
from torch import Tensor

from voxtrast.kernels import _native, local_correlation, local_correlation_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make(sizes: tuple[int, ...], channels: int = 8, batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, channels, *sizes, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]


def step(query: Tensor, key: Tensor, radius: int = 2, units: int = 1) -> list[Tensor]:
    found = local_correlation(query, key, radius=radius, units=units)
    return [found, *torch.autograd.grad(found.square().sum(), (query, key))]


def test_the_operators_are_compiled() -> None:
    assert _native.load_cuda()
    names = ("local_correlation", "local_correlation_backward")
    assert all(_native.is_compiled(name, torch.device("cuda")) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "channels", "units", "radius"),
    [
        ((40, 41, 70), 8, 1, 2),
        ((20, 9, 33), 32, 4, 1),
        ((16, 16, 16), 8, 1, 3),
        ((9, 12, 10), 8, 1, 4),
        ((6, 7, 8), 24, 2, 5),
        ((200, 333), 8, 1, 2),
    ],
)
def test_a_gpu_and_a_cpu_agree(
    sizes: tuple[int, ...], channels: int, units: int, radius: int, dtype: torch.dtype
) -> None:
    query, key = make(sizes, channels, batch=2, dtype=dtype)
    found = step(query, key, radius, units)
    leaves = [each.detach().cpu().double().requires_grad_() for each in (query, key)]
    expected = local_correlation_reference(*leaves, radius=radius, units=units)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), leaves)]
    # The gradients are rounded once, to the type of the maps.
    for position, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        allowed = 2e-6 if position == 0 else 4e-6 + torch.finfo(dtype).eps
        assert (ours.cpu().double() - theirs).norm() <= allowed * theirs.norm()


def test_the_same_bits_every_time() -> None:
    query, key = make((33, 34, 65), 16, batch=2)
    first, second = (step(query, key, units=2) for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_nothing_waits_for_the_device() -> None:
    query, key = make((20, 20, 20), 16)
    step(query, key, units=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for radius in (2, 4, 5):
            step(query, key, radius, units=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_the_step() -> None:
    query, key = make((24, 25, 40), 16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in step(query, key, units=2)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(query, key, units=2)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_more_than_two_to_the_31_numbers() -> None:
    """Equal products everywhere: inside, the displacement is 0; at the end of the volume it is known."""
    query = torch.zeros(3, 8, 512, 512, 352, device="cuda", dtype=torch.float16)
    assert query.numel() > 2**31
    found = local_correlation(query, query, radius=1)
    inside = found[:, :, 1:-1, 1:-1, 1:-1]
    assert inside.abs().max().item() < 1e-6
    torch.testing.assert_close(found[-1, :, -1, -1, -1], torch.full((3,), -0.5, device="cuda"))


def test_memory_is_that_of_the_maps() -> None:
    query, key = make((128, 128, 128))
    step(query.detach().requires_grad_(), key.detach().requires_grad_())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(query, key)
    # Displacement, its square and gradients, log-sum-exp and two gradients; the softmax alone would be 1 GB.
    assert torch.cuda.max_memory_allocated() - before < 320e6
