"""The warp family on a GPU: what an emulation cannot show."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from voxtrast.kernels import _native, compose_displacement, vector_regression_loss, warp, warped_cosine_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
SIZES = [(70, 61), (33, 40, 29)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, channels: int = 11) -> list[Tensor]:
    """fixed, moving, displacement, target, mask"""
    maps = [torch.randn(2, channels, *sizes, device=CUDA).to(dtype).requires_grad_() for _ in range(2)]
    fields = [(3 * torch.randn(2, len(sizes), *sizes, device=CUDA)).requires_grad_() for _ in range(2)]
    points = torch.stack(torch.meshgrid(*(torch.arange(size, device=CUDA) for size in sizes), indexing="ij"))
    last = torch.tensor(sizes, device=CUDA).view(-1, *[1] * len(sizes)) - 1
    place = points + fields[0].detach()
    inside = ((place >= 0) & (place <= last)).all(1, keepdim=True)
    return [*maps, *fields, torch.rand(2, 1, *sizes, device=CUDA) * inside]


def step(
    fixed: Tensor, moving: Tensor, displacement: Tensor, target: Tensor, mask: Tensor, deterministic: bool = True
) -> list[Tensor]:
    """All operators, with all gradients that they have by themselves."""
    found = []
    for output, inputs in (
        (warp(moving, displacement, deterministic=deterministic), (moving, displacement)),
        (compose_displacement(target, displacement), (target, displacement)),
        (vector_regression_loss(displacement, target, mask), (displacement, target)),
        (
            warped_cosine_loss(fixed, moving, displacement, mask, deterministic=deterministic),
            (fixed, moving, displacement),
        ),
    ):
        upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
        found += [output.detach(), *torch.autograd.grad(output, inputs, upstream if output.dim() else None)]
    return found


def test_the_operators_are_compiled() -> None:
    names = "warp warp_backward compose_displacement vector_regression_loss vector_regression_loss_backward"
    for name in (*names.split(), "warped_cosine_loss", "warped_cosine_loss_backward"):
        assert _native.is_compiled(name, CUDA), name


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_gpu_and_a_cpu_agree(sizes: tuple[int, ...], dtype: torch.dtype, deterministic: bool) -> None:
    inputs = make(sizes, dtype)
    found = step(*inputs, deterministic=deterministic)
    expected = step(*(tensor.detach().cpu().requires_grad_(tensor.requires_grad) for tensor in inputs))
    for position, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        # Either side rounds once to the type of the result.
        allowed = 1e-5 if ours.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert ours.dtype == theirs.dtype
        assert (ours.cpu().double() - theirs.double()).norm() <= allowed * theirs.double().norm(), position


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_run_gives_the_same_bits(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(sizes, dtype)
    inputs[2] = (inputs[2].detach() * torch.linspace(0, 3, sizes[-1], device=CUDA)).requires_grad_()
    first = step(*inputs)
    for _ in range(5):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(step(*inputs), first, strict=True))


@pytest.mark.parametrize("place", [20.0, 20.25])
def test_a_million_points_into_one_cell(place: float) -> None:
    sizes = 100, 100, 100
    points = torch.stack(torch.meshgrid(*(torch.arange(100.0, device=CUDA) for _ in sizes), indexing="ij"))
    image, displacement = torch.zeros(1, 2, *sizes, device=CUDA, requires_grad=True), (place - points)[None]
    gradient = torch.randn(image.shape, device=CUDA)
    found = [torch.autograd.grad(warp(image, displacement), image, gradient)[0] for _ in range(2)]
    assert torch.equal(*found)
    total = found[0].double().sum((2, 3, 4))
    torch.testing.assert_close(total, gradient.double().sum((2, 3, 4)), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_waits_for_the_device(deterministic: bool) -> None:
    inputs = make(SIZES[1])
    step(*inputs)  # loads the library
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, deterministic=deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_the_step() -> None:
    inputs = make(SIZES[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.clone() for tensor in step(*inputs)]
        step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*inputs)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_compile_takes_the_losses(deterministic: bool) -> None:
    fixed, moving, displacement, target, mask = make(SIZES[0])

    def loss(fixed: Tensor, moving: Tensor, displacement: Tensor) -> Tensor:
        warped = warp(moving, compose_displacement(target, displacement), deterministic=deterministic)
        cosine = warped_cosine_loss(fixed, warped, displacement, mask, deterministic=deterministic)
        return cosine + vector_regression_loss(displacement, target, mask)

    inputs = fixed, moving, displacement
    values = [function(*inputs) for function in (torch.compile(loss, fullgraph=True), loss)]
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*(torch.autograd.grad(value, inputs) for value in values), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_another_stream_and_strided_tensors() -> None:
    fixed, moving, displacement, _, mask = make(SIZES[0])
    expected = warped_cosine_loss(fixed, moving, displacement, mask)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        strided = (
            tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (fixed, moving, displacement, mask)
        )
        found = warped_cosine_loss(*strided)
    stream.synchronize()
    assert torch.equal(found, expected)


def gigabytes() -> float:
    return torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else 0.0


@pytest.mark.skipif(gigabytes() < 40, reason="needs a GPU with 40 GB")
def test_more_than_two_to_the_31_elements() -> None:
    """The last channel of a map that the same displacement moves throughout."""
    image = torch.zeros(1, 260, 2900, 2900, device=CUDA, dtype=torch.bfloat16)
    assert image.numel() > 2**31
    image[0, -1] = torch.randn(2900, 2900, device=CUDA)
    displacement = torch.full((1, 2, 2900, 2900), 0.5, device=CUDA)
    alone = image[:, -1:].clone().requires_grad_()
    warped = warp(image.requires_grad_(), displacement)
    assert torch.equal(warped[:, -1:], warp(alone, displacement))
    gradient = torch.zeros_like(warped)
    gradient[0, -1] = torch.randn(2900, 2900, device=CUDA)
    (found,) = torch.autograd.grad(warped, image, gradient)
    (expected,) = torch.autograd.grad(warp(alone, displacement), alone, gradient[:, -1:])
    assert torch.equal(found[:, -1:], expected)


def test_scratch_memory_stays_within_eight_bytes_an_element() -> None:
    fixed, moving, displacement, _, mask = make((64, 64, 64), channels=16)
    function: list[Callable[[], Tensor]] = [
        lambda: warp(moving, displacement),
        lambda: warped_cosine_loss(fixed, moving, displacement, mask),
    ]
    for each in function:
        output = each()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(output, moving, torch.ones_like(output))
        gradients = 4 * (moving.numel() + output.numel())
        assert torch.cuda.max_memory_allocated() - before - gradients <= 8 * moving.numel()
