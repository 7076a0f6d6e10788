import math

import pytest
import torch
from accuracy import assert_operator_accurate, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from voxtrast.kernels import compose_displacement, compose_displacement_reference, warp

SIZES = [(7, 5), (1, 1), (6, 7, 5), (1, 1, 1), (13, 1, 8)]


def make(sizes: tuple[int, ...], batch: int = 2) -> tuple[Tensor, Tensor]:
    outer, inner = (2 * torch.randn(batch, len(sizes), *sizes) for _ in range(2))
    return outer.requires_grad_(), inner.requires_grad_()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...]) -> None:
    inputs = make(sizes)
    assert_operator_accurate(compose_displacement, compose_displacement_reference, inputs, torch.randn(inputs[0].shape))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_warp_and_sum(sizes: tuple[int, ...]) -> None:
    outer, inner = make(sizes)
    assert torch.equal(compose_displacement(outer, inner), warp(outer, inner) + inner)


def test_zero_on_either_side_is_neutral() -> None:
    outer, inner = make((6, 7, 5))
    assert torch.equal(compose_displacement(outer, torch.zeros_like(inner)), outer)
    assert torch.equal(compose_displacement(torch.zeros_like(outer), inner), inner)


def test_constant_fields_add_up_inside() -> None:
    outer = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    inner = torch.tensor([0.5, 1.25]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    assert torch.equal(compose_displacement(outer, inner)[..., :7, :7], (outer + inner)[..., :7, :7])


def test_low_precision_fields_are_computed_and_returned_in_float32() -> None:
    outer, inner = make((6, 7, 5))
    low = compose_displacement(outer.bfloat16(), inner.half())
    assert low.dtype == torch.float32
    assert torch.equal(low, compose_displacement(outer.bfloat16().float(), inner.half().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator = torch.ops.voxtrast.compose_displacement(outer.bfloat16(), inner.half())
        assert torch.equal(compose_displacement(outer, inner), compose_displacement(outer.detach(), inner.detach()))
    assert torch.equal(operator, low)


def test_nan_in_inner_stays_where_it_is() -> None:
    outer, inner = make((5, 6, 7))
    with torch.no_grad():
        inner[0, 1, 2, 3, 4] = math.nan
    composed, grad_outer, _ = gradients(compose_displacement, (outer, inner), torch.ones(outer.shape))
    assert composed.isnan().sum() == 1
    assert grad_outer.isfinite().all()


@pytest.mark.parametrize("asking", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(asking: tuple[bool, bool]) -> None:
    fields = make((6, 7))
    gradient = torch.randn(()).expand(fields[0].shape)
    both = gradients(compose_displacement, fields, gradient)
    inputs = [tensor.detach().requires_grad_(ask) for tensor, ask in zip(fields, asking, strict=True)]
    assert torch.equal(gradients(compose_displacement, inputs, gradient)[1], both[1] if asking[0] else both[2])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    fields = make((24, 25, 26))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(compose_displacement, fields, torch.ones(fields[0].shape)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_gradcheck_and_gradgradcheck_in_float64() -> None:
    for sizes in [(4, 3), (2, 2, 2)]:
        inputs = [tensor.detach().div(2).double().requires_grad_() for tensor in make(sizes, batch=1)]
        assert gradcheck(compose_displacement, inputs)
        assert gradgradcheck(compose_displacement, inputs)


def test_double_backward_matches_float64() -> None:
    assert_second_order_accurate(compose_displacement, compose_displacement_reference, make((5, 6, 4)))


def test_opcheck_with_strided_fields() -> None:
    outer, inner = make((5, 4, 6))
    torch.library.opcheck(torch.ops.voxtrast.compose_displacement.default, (outer, inner))
    strided = [tensor.detach().transpose(2, 4).contiguous().transpose(2, 4) for tensor in (outer, inner)]
    torch.library.opcheck(torch.ops.voxtrast.compose_displacement.default, strided)
    assert torch.equal(compose_displacement(*strided), compose_displacement(outer, inner))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(compose_displacement, fullgraph=True, backend="aot_eager")
    fields = make((5, 4, 6))
    gradient = torch.randn(fields[0].shape)
    found = gradients(compiled, fields, gradient)
    for ours, expected in zip(found, gradients(compose_displacement, fields, gradient), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("outer", "inner", "words"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), "outer: expected 2 components"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5), "inner: expected the shape of outer"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, device="meta"), "inner: is on meta"),
        (torch.zeros(0, 2, 4, 4), torch.zeros(0, 2, 4, 4), "outer: is empty"),
    ],
)
def test_wrong_arguments_are_named(outer: Tensor, inner: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compose_displacement(outer, inner)
