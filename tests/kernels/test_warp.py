import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_operator_accurate, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import warp, warp_reference

SIZES = [(7, 5), (1, 1), (1, 9), (6, 1), (6, 7, 5), (1, 1, 1), (13, 1, 8), (5, 7, 1), (6, 1, 1), (9, 33, 17)]
LOW = [torch.bfloat16, torch.float16]


def make(sizes: tuple[int, ...], channels: int = 3, amplitude: float = 2.0, dtype: torch.dtype = torch.float32):
    image = torch.randn(2, channels, *sizes).to(dtype).requires_grad_()
    displacement = (amplitude * torch.randn(2, len(sizes), *sizes)).requires_grad_()
    return image, displacement


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    image, displacement = make(sizes, dtype=dtype)
    gradient = torch.randn(image.shape).to(dtype)
    assert_operator_accurate(warp, warp_reference, (image, displacement), gradient)


@pytest.mark.parametrize("channels", [1, 11])
def test_points_that_land_far_apart_match_float64(channels: int) -> None:
    image, displacement = make((40, 24, 23), channels=channels, amplitude=12.0)
    assert_operator_accurate(warp, warp_reference, (image, displacement), torch.randn(image.shape))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_zero_displacement_is_the_identity_bit_for_bit(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.randn(2, 3, *sizes).to(dtype)
    image.view(-1)[::4] = -0.0
    image.view(-1)[1::7] = math.inf
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    warped = warp(image, torch.zeros(2, len(sizes), *sizes))
    assert torch.equal(warped.view(bits), image.view(bits))


def spoil(image: Tensor) -> Tensor:
    """The same with infinities and NaN, one of them in the first voxel, which stands in for all that lie outside."""
    spoiled = image.detach().clone()
    for step, bad in [(7, math.nan), (11, math.inf), (13, -math.inf)]:
        spoiled.view(-1)[step - 7 :: step] = bad
    return spoiled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=str)
@pytest.mark.parametrize("function", [warp, warp_reference])
def test_zero_displacement_is_the_identity_whatever_the_voxels_hold(
    function: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    image = spoil(torch.randn(2, 3, 5, 6, 7).to(dtype))
    warped = function(image, torch.zeros(2, 3, 5, 6, 7))
    torch.testing.assert_close(warped, image, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [warp, warp_reference])
def test_a_bad_voxel_reaches_only_the_points_that_weigh_it(function: Callable[..., Tensor]) -> None:
    image, displacement = torch.randn(1, 1, 4, 5), torch.zeros(1, 2, 4, 5)
    displacement[:, 0, 2] = 0.5  # row 2 reads rows 2 and 3
    displacement[:, :, 1] = 50.0  # row 1 reads outside
    for bad in (math.nan, math.inf):
        image[0, 0, 0, 0] = image[0, 0, 3, 4] = bad
        spoiled = ~function(image, displacement).isfinite()
        assert spoiled.nonzero().tolist() == [[0, 0, 0, 0], [0, 0, 2, 4], [0, 0, 3, 4]]
        outside = torch.full_like(displacement, 50.0).requires_grad_()
        output, grad_image, grad_displacement = gradients(
            function, (image.clone().requires_grad_(), outside), torch.ones_like(image)
        )
        for zero in (output, grad_image, grad_displacement):
            assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("function", [warp, warp_reference])
def test_the_gradient_at_a_whole_voxel_is_the_forward_difference(function: Callable[..., Tensor]) -> None:
    image, displacement = torch.randn(1, 1, 4, 5), torch.zeros(1, 2, 4, 5, requires_grad=True)
    _, gradient = gradients(function, (image, displacement), torch.ones_like(image))
    for axis in range(2):
        difference = image.diff(dim=axis + 2, append=torch.zeros_like(image).narrow(axis + 2, 0, 1))
        torch.testing.assert_close(gradient[:, axis : axis + 1], difference, rtol=0, atol=0)


def test_component_0_moves_along_the_first_axis_by_voxels() -> None:
    image = torch.randn(1, 2, 6, 5, 4)
    for axis in range(3):
        displacement = torch.zeros(1, 3, 6, 5, 4)
        displacement[:, axis] = 2.0
        expected = functional.pad(image.movedim(axis + 2, -1)[..., 2:], (0, 2)).movedim(-1, axis + 2)
        assert torch.equal(warp(image, displacement), expected)


@pytest.mark.parametrize("sizes", [(9, 12), (8, 11, 10)], ids=str)
def test_equals_grid_sample_and_is_more_accurate(sizes: tuple[int, ...]) -> None:
    image, displacement = make(sizes)

    def by_grid_sample(image: Tensor, displacement: Tensor) -> Tensor:
        axes = [torch.arange(size, dtype=image.dtype) for size in sizes]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement
        extent = torch.tensor(sizes, dtype=image.dtype).sub(1).view(-1, *[1] * len(sizes))
        grid = (2 * points / extent - 1).movedim(1, -1).flip(-1)
        return functional.grid_sample(image, grid, align_corners=True)

    exact = by_grid_sample(image.double(), displacement.double())
    assert torch.allclose(warp(image.double(), displacement.double()), exact, rtol=0, atol=1e-12)
    ours = (warp(image, displacement) - exact).abs().max()
    theirs = (by_grid_sample(image, displacement) - exact).abs().max()
    assert ours <= theirs


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 1e10])
def test_unusable_displacements_read_zero_and_have_no_gradient(bad: float) -> None:
    image, displacement = make((5, 6, 7))
    with torch.no_grad():
        displacement[0, 1, 2] = bad
    output, grad_image, grad_displacement = gradients(warp, (image, displacement), torch.randn(image.shape))
    assert torch.equal(output[0, :, 2], torch.zeros_like(output[0, :, 2]))
    assert torch.equal(grad_displacement[0, :, 2], torch.zeros_like(grad_displacement[0, :, 2]))
    assert grad_image.isfinite().all()
    assert output.isfinite().all()


def test_points_outside_give_positive_zero() -> None:
    outside = warp(torch.randn(1, 1, 4, 4), torch.full((1, 2, 4, 4), 50.0))
    assert torch.equal(outside.view(torch.int32), torch.zeros(1, 1, 4, 4, dtype=torch.int32))


@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last"])
def test_any_layout_of_inputs_and_gradient(layout: str) -> None:
    image, displacement = make((6, 7, 5))
    gradient = torch.randn(2, 3, 6, 7, 5)
    if layout == "strided":
        wide = torch.randn(2, 3, 6, 7, 10)
        tensors = wide[..., ::2], displacement.detach().transpose(2, 4).contiguous().transpose(2, 4), wide[..., 1::2]
    elif layout == "expanded":
        tensors = image[:1].detach().expand(2, -1, -1, -1, -1), displacement[:, :1].detach().expand(-1, 3, -1, -1, -1)
        tensors = *tensors, torch.randn(()).expand(gradient.shape)
    else:
        tensors = tuple(t.detach().to(memory_format=torch.channels_last_3d) for t in (image, displacement, gradient))
    inputs = [tensor.requires_grad_() for tensor in tensors[:2]]
    found = gradients(warp, inputs, tensors[2])
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    for ours, expected in zip(found, gradients(warp, dense, tensors[2].contiguous()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("asking", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(asking: tuple[bool, bool]) -> None:
    image, displacement = make((6, 7))
    both = gradients(warp, (image, displacement), torch.ones(image.shape))
    inputs = [tensor.detach().requires_grad_(ask) for tensor, ask in zip((image, displacement), asking, strict=True)]
    one = gradients(warp, inputs, torch.ones(image.shape))
    assert torch.equal(one[1], both[1] if asking[0] else both[2])


@pytest.mark.parametrize("amplitude", [2.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, amplitude: float) -> None:
    image, displacement = make((24, 25, 26), channels=5, dtype=dtype, amplitude=amplitude)
    gradient = torch.randn(image.shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(warp, (image, displacement), gradient))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


# All other tests take the best path that the processor has; the long ones try each.
@pytest.mark.parametrize(
    "path", ["portable", *(pytest.param(path, marks=pytest.mark.slow) for path in ("avx512", "avx2"))]
)
def test_every_path_of_the_compiled_code_is_as_accurate(path: str) -> None:
    """A processor without a path takes the next one, which is then measured twice."""
    tests = "test_value_and_gradients or test_points_that_land or bit_for_bit"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests],
        env=os.environ | {"VOXTRAST_CPU": path},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("sizes", [(4, 3), (2, 2, 3)], ids=str)
def test_gradcheck_and_gradgradcheck_in_float64(sizes: tuple[int, ...]) -> None:
    image, displacement = make(sizes, channels=2, amplitude=1.0)
    inputs = [tensor.detach()[:1].double().requires_grad_() for tensor in (image, displacement)]
    assert gradcheck(warp, inputs)
    assert gradgradcheck(warp, inputs)


def test_double_backward_matches_float64() -> None:
    assert_second_order_accurate(warp, warp_reference, make((5, 6, 4)))


def test_double_backward_takes_partial_derivatives_where_the_displacement_depends_on_the_image() -> None:
    image, displacement = make((5, 6, 4))

    def through(function):
        return lambda image, displacement: function(image, displacement + 0.1 * image)

    assert_second_order_accurate(through(warp), through(warp_reference), (image, displacement))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    image, displacement = make((5, 4, 6), dtype=dtype)
    torch.library.opcheck(torch.ops.voxtrast.warp.default, (image, displacement))
    torch.library.opcheck(torch.ops.voxtrast.warp.default, (image.detach(), displacement))
    arguments = torch.randn(image.shape).to(dtype), image.detach(), displacement.detach()
    for needed in [(True, True), (True, False), (False, True), (True, True, False)]:
        torch.library.opcheck(torch.ops.voxtrast.warp_backward.default, (*arguments, *needed))


def test_on_the_cpu_the_option_of_speed_changes_nothing() -> None:
    image, displacement = make((5, 4, 6))
    gradient = torch.randn(image.shape)

    def fast(image: Tensor, displacement: Tensor) -> Tensor:
        return warp(image, displacement, deterministic=False)

    for function in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        found = gradients(function, (image, displacement), gradient)
        for ours, expected in zip(found, gradients(warp, (image, displacement), gradient), strict=True):
            assert torch.equal(ours, expected)
    torch.library.opcheck(torch.ops.voxtrast.warp.default, (image, displacement, False))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend: str) -> None:
    def function(image: Tensor, displacement: Tensor) -> Tensor:
        return 2 * warp(image.relu(), displacement)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for sizes in [(5, 4, 6), (7, 3, 5)]:
        image, displacement = make(sizes)
        gradient = torch.randn(image.shape)
        found = gradients(compiled, (image, displacement), gradient)
        for ours, expected in zip(found, gradients(function, (image, displacement), gradient), strict=True):
            torch.testing.assert_close(ours, expected)


def test_autocast_leaves_the_image_and_keeps_displacements_in_float32() -> None:
    image, displacement = make((6, 7, 5), dtype=torch.bfloat16)
    expected = warp(image, displacement)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(warp(image, displacement), expected)
        assert torch.equal(torch.ops.voxtrast.warp(image, displacement), expected)
        assert warp(image.float(), displacement).dtype == torch.float32
        low = torch.ops.voxtrast.warp(image, displacement.bfloat16())
        low.float().sum().backward()
    assert torch.equal(low, warp(image, displacement.bfloat16()))
    assert displacement.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("image", "displacement", "error", "words"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), ValueError, r"image: expected \(B, C, H, W\).*\(1, 2, 3\)"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), ValueError, r"displacement: expected shape \(1, 2, 4, 4\)"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5), ValueError, r"got \(1, 2, 4, 5\)"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4), ValueError, r"displacement: expected shape"),
        (torch.zeros(0, 2, 4, 4), torch.zeros(0, 2, 4, 4), ValueError, r"image: is empty"),
        (torch.zeros(1, 2, 4, 0), torch.zeros(1, 2, 4, 0), ValueError, r"image: is empty"),
        (torch.zeros(1, 2, 4, 4).int(), torch.zeros(1, 2, 4, 4), TypeError, r"image: .*torch.int32; cast it"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4).long(), TypeError, r"displacement: .*torch.int64"),
        (torch.zeros(1, 2, 4, 4), None, TypeError, r"displacement: expected a tensor, got NoneType"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, device="meta"), ValueError, r"displacement: is on meta"),
    ],
)
def test_wrong_arguments_are_named(image, displacement, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        warp(image, displacement)


def test_the_operator_itself_refuses_float64() -> None:
    with pytest.raises(RuntimeError, match="image must be float32, bfloat16 or float16"):
        torch.ops.voxtrast.warp(torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 2, 2, 2))
    with pytest.raises(RuntimeError, match="displacement must be float32"):
        torch.ops.voxtrast.warp(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2).double())
