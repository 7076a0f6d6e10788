"""The kernels of `warp` and `compose_displacement`, emulated, through the public functions.

The odd cases are those of the CPU: the very tests.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import assert_as_accurate, assert_operator_accurate, gradients
from emulated import Emulated
from test_compose_displacement import (  # noqa: F401
    test_equals_warp_and_sum,
    test_nan_in_inner_stays_where_it_is,
    test_zero_on_either_side_is_neutral,
)
from test_warp import (  # noqa: F401
    LOW,
    make,
    test_a_bad_voxel_reaches_only_the_points_that_weigh_it,
    test_any_layout_of_inputs_and_gradient,
    test_component_0_moves_along_the_first_axis_by_voxels,
    test_only_the_gradients_that_are_asked_for,
    test_points_outside_give_positive_zero,
    test_the_gradient_at_a_whole_voxel_is_the_forward_difference,
    test_unusable_displacements_read_zero_and_have_no_gradient,
    test_zero_displacement_is_the_identity_bit_for_bit,
    test_zero_displacement_is_the_identity_whatever_the_voxels_hold,
)
from torch import Tensor
from warp_family import in_place_of_the_cpu

from voxtrast.kernels import compose_displacement, compose_displacement_reference, warp, warp_reference

SIZES = [(7, 5), (1, 1), (1, 9), (6, 7, 5), (1, 1, 1), (13, 1, 8), (5, 11, 23)]
EVERY_TYPE = pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)


@pytest.fixture(autouse=True)
def _emulated(emulate) -> Iterator[None]:
    torch.set_num_threads(1)  # as the emulation; the fixture of all kernels' tests sets it back
    with in_place_of_the_cpu(emulate("warp_family")):
        yield


def by_atomics(image: Tensor, displacement: Tensor) -> Tensor:
    return warp(image, displacement, deterministic=False)


EITHER_WAY = pytest.mark.parametrize("function", [warp, by_atomics])


@EITHER_WAY
@EVERY_TYPE
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(
    function: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    image, displacement = make(sizes, dtype=dtype)
    gradient = torch.randn(image.shape).to(dtype)
    assert_operator_accurate(function, warp_reference, (image, displacement), gradient)


@pytest.mark.parametrize("channels", [1, 8, 9, 20])
def test_any_number_of_channels(channels: int) -> None:
    inputs = make((4, 5, 6), channels=channels)
    assert_operator_accurate(warp, warp_reference, inputs, torch.randn(inputs[0].shape))


@pytest.mark.parametrize("sizes", [(7, 5), (1, 1, 1), (13, 1, 8), (6, 7, 5)], ids=str)
def test_composition_and_its_gradients_match_float64(sizes: tuple[int, ...]) -> None:
    outer, inner = (2 * torch.randn(2, len(sizes), *sizes) for _ in range(2))
    inputs = outer.requires_grad_(), inner.requires_grad_()
    assert_operator_accurate(compose_displacement, compose_displacement_reference, inputs, torch.randn(outer.shape))


def to_one_place(sizes: tuple[int, ...], place: float) -> Tensor:
    """A displacement that sends every point to the same."""
    points = torch.stack(torch.meshgrid(*(torch.arange(float(size)) for size in sizes), indexing="ij"))
    return (place - points).repeat(2, *[1] * points.dim())


@EITHER_WAY
@EVERY_TYPE
@pytest.mark.parametrize("sizes", [(31, 33), (11, 9, 10)], ids=str)
def test_all_points_into_one_voxel_or_cell(
    function: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    image, _ = make(sizes, channels=9, dtype=dtype)
    gradient = torch.randn(image.shape).to(dtype)
    for place in (3.0, 3.25):
        displacement = to_one_place(sizes, place).requires_grad_()
        assert_operator_accurate(function, warp_reference, (image, displacement), gradient)


def gradient_of_image(gradient: Tensor, displacement: Tensor) -> Tensor:
    image = torch.zeros_like(gradient).requires_grad_()
    return torch.autograd.grad(warp(image, displacement), image, gradient)[0]


def exact_gradient_of_image(gradient: Tensor, displacement: Tensor) -> Tensor:
    image = torch.zeros_like(gradient, dtype=torch.float64).requires_grad_()
    return torch.autograd.grad(warp_reference(image, displacement.double()), image, gradient.double())[0]


def to_few_places(sizes: tuple[int, ...]) -> Tensor:
    """A displacement that sends four points along each axis to one voxel."""
    points = torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij"))
    return (points // 4 - points).float().repeat(2, *[1] * points.dim())


def cancelling(sizes: tuple[int, int, int]) -> Tensor:
    """Numbers whose sum, over any 4 x 4 x 4 of them, is small beside most of them: not even float64 may reorder it."""
    first, second, _ = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    large = torch.where(second % 2 == 0, 3.0, -3.0)
    return torch.where(first % 4 < 2, large, 1e-12 * torch.randn(2, 3, *sizes))


@pytest.mark.parametrize("long", [False, True])
def test_points_in_any_order_give_the_same_bits(emulated_library, long: bool) -> None:
    """Of the sums alone: threads that run backwards fill the lists the other way round."""
    sizes = 12, 12, 12
    displacement = to_one_place(sizes, 5.0) if long else to_few_places(sizes)
    gradient, found = cancelling(sizes), []
    one_voxel = gradient[0, 0, :4, :4, :4].double().flatten()
    assert one_voxel.cumsum(0)[-1].float() != one_voxel.flip(0).cumsum(0)[-1].float()
    for backwards in (False, True):
        run = Emulated(emulated_library("warp_family"), backwards=backwards)
        with in_place_of_the_cpu(run):
            found.append(gradient_of_image(gradient, displacement))
        run.release()
    assert torch.equal(*found)


@pytest.mark.parametrize("sizes", [(20, 21), (8, 9, 10)], ids=str)
def test_small_gradients_survive_beside_large_ones(sizes: tuple[int, ...]) -> None:
    """Each voxel is as accurate as its own contributions allow, over the whole range of float32."""
    gradient, displacement = torch.randn(2, 3, *sizes), torch.randn(2, len(sizes), *sizes)
    displacement = (64 * displacement).round() / 64  # weights are exact
    gradient *= torch.where(torch.arange(sizes[-1]) < sizes[-1] // 2, 1e20, 1e-20)
    gradient[:, 1] *= torch.tensor(1e-20)  # down to subnormal numbers
    found, exact = gradient_of_image(gradient, displacement), exact_gradient_of_image(gradient, displacement)
    sizes_of_terms = exact_gradient_of_image(gradient.abs(), displacement)
    assert ((found.double() - exact).abs() <= 2**-22 * sizes_of_terms + 64 * 2**-149).all()
    assert (sizes_of_terms[exact != 0] < 1e-18).any()


@EVERY_TYPE
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_gradients_that_are_not_finite_reach_what_they_weigh_and_nothing_else(scale: float, dtype: torch.dtype) -> None:
    """Beside the long way round, all points into one cell, which the threads of a block share."""
    for displacement in (torch.randn(2, 2, 18, 19), to_one_place((18, 19), 3 + scale)):
        gradient = torch.randn(2, 2, 18, 19).to(dtype)
        gradient[0, 0, 5, 5] = math.nan
        gradient[0, 1, 7, 3] = math.inf
        gradient[1, 0, 2, 1] = -math.inf
        gradient[1, 1, 2, 1:8] = torch.tensor([math.inf, -math.inf]).repeat(4)[:7]
        for field in (displacement, 0 * displacement):
            nan, above, below = (
                exact_gradient_of_image(marked.float(), field) > 0
                for marked in (gradient.isnan(), gradient == math.inf, gradient == -math.inf)
            )
            expected = exact_gradient_of_image(torch.nan_to_num(gradient, 0, 0, 0), field)
            expected[above], expected[below], expected[nan | above & below] = math.inf, -math.inf, math.nan
            found = gradient_of_image(gradient, field).double()
            tolerance = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_the_largest_gradients_sum_to_infinity_and_not_to_anything_else() -> None:
    gradient = torch.full((2, 1, 17, 18), 3e38)
    found = gradient_of_image(gradient, to_one_place((17, 18), 2.0))
    assert (found[:, :, 2, 2] == math.inf).all()
    assert found.isfinite().sum() == found.numel() - 2


def test_displacements_far_outside_give_zero_gradients() -> None:
    image, displacement = make((5, 6, 7))
    for far in (-1e3, 1e3, -1e9, 1e9, 7.0, -7.0):
        found = gradients(warp, (image, (0 * displacement + far).detach().requires_grad_()), torch.ones(image.shape))
        assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in found)


def test_more_cells_than_one_group_in_each_volume() -> None:
    image, displacement = make((60, 61), channels=1)
    exact = exact_gradient_of_image(image.detach(), displacement.detach())
    plain = torch.autograd.grad(warp_reference(image, displacement), image, image.detach())[0]
    assert_as_accurate(gradient_of_image(image.detach(), displacement.detach()), plain, exact, factor=3)
