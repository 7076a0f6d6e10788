"""The kernels of `vector_regression_loss` and `warped_cosine_loss`, emulated, through the public functions.

The odd cases are those of the CPU: the very tests.
"""

from collections.abc import Callable, Iterator

import pytest
import test_vector_regression_loss as regression
import test_warped_cosine_loss as cosine
import torch
from accuracy import assert_as_accurate, assert_operator_accurate, gradients
from emulated import Emulated
from test_vector_regression_loss import (  # noqa: F401
    test_nan_in_a_weighted_voxel_shows_in_the_loss,
    test_sums_over_components_and_averages_over_weights,
)
from test_warped_cosine_loss import (  # noqa: F401
    test_a_single_voxel,
    test_any_layout_of_inputs,
    test_bad_features_that_nothing_reads_leave_no_trace,
    test_bad_features_with_weight_show_in_the_loss,
    test_bad_features_without_a_partner_do_not_count,
    test_beyond_the_border_values_and_most_gradients_match_float64,
    test_equal_maps_without_displacement_have_no_loss,
    test_only_the_gradients_that_are_asked_for,
    test_unusable_displacements_count_as_outside,
    test_zero_vectors_have_cosine_zero_and_zero_gradient,
)
from torch import Tensor
from warp_family import in_place_of_the_cpu

from voxtrast.kernels import (
    vector_regression_loss,
    vector_regression_loss_reference,
    warped_cosine_loss,
    warped_cosine_loss_reference,
)

ONE = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def _emulated(emulate) -> Iterator[None]:
    torch.set_num_threads(1)  # as the emulation; the fixture of all kernels' tests sets it back
    with in_place_of_the_cpu(emulate("warp_family")):
        yield


def by_atomics(*inputs: Tensor) -> Tensor:
    return warped_cosine_loss(*inputs, deterministic=False)


@pytest.mark.parametrize("sizes", [(7, 5), (1, 1), (6, 7, 5), (13, 17, 9)], ids=str)
def test_regression_and_its_gradients_match_float64(sizes: tuple[int, ...]) -> None:
    inputs = regression.make(sizes)
    assert_operator_accurate(vector_regression_loss, vector_regression_loss_reference, inputs, torch.tensor(1.7))


@pytest.mark.parametrize("function", [warped_cosine_loss, by_atomics])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(7, 5), (2, 9), (6, 7, 5), (13, 2, 8)], ids=str)
def test_cosine_and_its_gradients_match_float64(
    function: Callable[..., Tensor], sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = cosine.make(sizes, dtype=dtype)
    assert_operator_accurate(function, warped_cosine_loss_reference, inputs, torch.tensor(1.7))


@pytest.mark.parametrize("channels", [1, 8, 19])
def test_any_number_of_channels(channels: int) -> None:
    inputs = cosine.make((5, 6, 7), channels=channels)
    assert_operator_accurate(warped_cosine_loss, warped_cosine_loss_reference, inputs, torch.tensor(1.7))


FAMILY = [
    pytest.param(vector_regression_loss, regression.make, id="regression"),
    pytest.param(warped_cosine_loss, cosine.make, id="cosine"),
    pytest.param(by_atomics, cosine.make, id="cosine by atomics"),
]


@pytest.mark.parametrize(("function", "make"), FAMILY)
def test_an_empty_mask_gives_zero_with_zero_gradients(function, make) -> None:
    *tensors, mask = make((4, 5, 6))
    spoiled = [(tensor.detach() * torch.nan).requires_grad_() for tensor in tensors]
    loss, *found = gradients(function, (*spoiled[:-1], tensors[-1], mask * 0), ONE)
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@pytest.mark.parametrize(("function", "make"), FAMILY)
def test_voxels_without_weight_are_not_looked_at(function, make) -> None:
    *tensors, mask = make((4, 5, 6))
    clean = gradients(function, (*tensors, mask), ONE)
    # Of the cosine's, moving is read at other voxels than its own.
    spoiled = [
        tensor
        if function is not vector_regression_loss and position == 1
        else torch.where(mask == 0, torch.nan, tensor.detach()).requires_grad_()
        for position, tensor in enumerate(tensors)
    ]
    found = gradients(function, (*spoiled, mask), ONE)
    assert all(torch.equal(first, second) for first, second in zip(clean, found, strict=True))


def test_more_voxels_than_the_blocks_of_a_sum_take_in_one_turn() -> None:
    found: list[Tensor] = []
    for _ in range(2):
        prediction, target = torch.randn(2, 2, 1, 370, 380)
        inputs = prediction, target, torch.rand(2, 1, 370, 380) * (torch.rand(2, 1, 370, 380) > 0.5)
        wide = (tensor.double() for tensor in inputs)
        triple = vector_regression_loss(*inputs), vector_regression_loss_reference(*inputs)
        found.append(torch.stack([*(loss.double() for loss in triple), vector_regression_loss_reference(*wide)]))
    ours, plain, exact = torch.stack(found).unbind(1)
    assert_as_accurate(ours.float(), plain.float(), exact, factor=2)


@pytest.mark.parametrize(("function", "make"), FAMILY[:2])
def test_threads_in_any_order_give_the_same_bits(emulated_library, function, make) -> None:
    inputs = make((9, 10, 11))
    found = []
    for backwards in (False, True):
        run = Emulated(emulated_library("warp_family"), backwards=backwards)
        with in_place_of_the_cpu(run):
            found.append(gradients(function, inputs, ONE))
        run.release()
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
