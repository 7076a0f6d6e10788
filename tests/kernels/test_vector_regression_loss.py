import math

import pytest
import torch
from accuracy import assert_operator_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from voxtrast.kernels import vector_regression_loss, vector_regression_loss_reference

SIZES = [(7, 5), (1, 1), (6, 7, 5), (1, 1, 1), (33, 17, 19)]


def make(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    prediction, target = (3 * torch.randn(2, len(sizes), *sizes) for _ in range(2))
    mask = torch.rand(2, 1, *sizes) * (torch.rand(2, 1, *sizes) > 0.4)
    mask.view(-1)[0] = 1
    return prediction.requires_grad_(), target.requires_grad_(), mask


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...]) -> None:
    gradient = torch.tensor(1.7)
    assert_operator_accurate(vector_regression_loss, vector_regression_loss_reference, make(sizes), gradient)


def test_sums_over_components_and_averages_over_weights() -> None:
    prediction = torch.zeros(1, 3, 1, 1, 2)
    target = torch.tensor([[1.0, 10.0], [-2.0, 20.0], [3.0, -30.0]]).view(1, 3, 1, 1, 2)
    mask = torch.tensor([3.0, 1.0]).view(1, 1, 1, 1, 2)
    assert vector_regression_loss(prediction, target, mask).item() == (3 * 6 + 60) / 4
    assert vector_regression_loss(prediction, target, mask > 2).item() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_mask_gives_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    prediction, target, mask = make((4, 5, 6))
    with torch.no_grad():
        prediction[0, 0, 0, 0, 0] = math.nan
    inputs = [prediction.detach().to(dtype).requires_grad_(), target.detach().to(dtype).requires_grad_(), mask * 0]
    loss, *found = gradients(vector_regression_loss, inputs, torch.tensor(1.0))
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_voxels_without_weight_are_not_looked_at(bad: float, dtype: torch.dtype) -> None:
    prediction, target, mask = (tensor.detach().to(dtype) for tensor in make((4, 5, 6)))
    clean = gradients(vector_regression_loss, (prediction.requires_grad_(), target, mask), torch.tensor(1.0))
    spoiled = torch.where(mask == 0, bad, prediction.detach())
    found = gradients(vector_regression_loss, (spoiled.requires_grad_(), target, mask), torch.tensor(1.0))
    assert all(torch.equal(first, second) for first, second in zip(clean, found, strict=True))


def test_nan_in_a_weighted_voxel_shows_in_the_loss() -> None:
    prediction, target, mask = make((4, 5))
    spoiled = torch.where(mask == 0, prediction.detach(), math.nan)
    assert vector_regression_loss(spoiled, target, mask).isnan()


def test_mask_gets_no_gradient() -> None:
    prediction, target, mask = make((4, 5))
    mask.requires_grad_()
    for dtype in (torch.float32, torch.float64):
        vector_regression_loss(prediction.to(dtype), target.to(dtype), mask).backward()
    assert mask.grad is None


def test_the_sum_of_the_mask_asks_for_no_gradient() -> None:
    loss, mask_sum = torch.ops.voxtrast.vector_regression_loss(*make((4, 5)))
    assert (loss.requires_grad, mask_sum.requires_grad) == (True, False)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = make((40, 41, 42))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(vector_regression_loss, inputs, torch.tensor(1.0)))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_low_precision_is_computed_in_float32() -> None:
    prediction, target, mask = make((4, 5, 6))
    low = prediction.bfloat16(), target.half(), mask.half()
    expected = vector_regression_loss(*(tensor.float() for tensor in low))
    assert torch.equal(vector_regression_loss(*low), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.ops.voxtrast.vector_regression_loss(*low)[0], expected)
    assert expected.dtype == torch.float32


def test_gradcheck_and_gradgradcheck_in_float64() -> None:
    prediction, target, mask = make((3, 2, 2))
    inputs = [prediction.detach().double().requires_grad_(), target.detach().double().requires_grad_(), mask]
    assert gradcheck(vector_regression_loss, inputs)
    assert gradgradcheck(vector_regression_loss, inputs)


def test_double_backward_in_float32_is_zero_for_the_fields_and_exact_for_the_upstream_gradient() -> None:
    prediction, target, mask = make((3, 4, 5))
    upstream = torch.tensor(2.0, requires_grad=True)
    loss = vector_regression_loss(prediction, target, mask)
    (first,) = torch.autograd.grad(loss, prediction, upstream, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (upstream, prediction), materialize_grads=True)
    torch.testing.assert_close(second[0], first.square().sum())
    assert torch.equal(second[1], torch.zeros_like(prediction))


def test_opcheck_with_strided_fields() -> None:
    prediction, target, mask = make((5, 4, 6))
    torch.library.opcheck(torch.ops.voxtrast.vector_regression_loss.default, (prediction, target, mask))
    strided = [t.detach().transpose(2, 4).contiguous().transpose(2, 4) for t in (prediction, target, mask)]
    torch.library.opcheck(torch.ops.voxtrast.vector_regression_loss.default, strided)
    scalars = torch.tensor(1.5), mask.sum()
    torch.library.opcheck(
        torch.ops.voxtrast.vector_regression_loss_backward.default, (scalars[0], *strided, scalars[1])
    )
    expanded = target[:1].detach().expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(
        vector_regression_loss(strided[0], expanded, strided[2]),
        vector_regression_loss_reference(strided[0], expanded, strided[2]),
    )


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(vector_regression_loss, fullgraph=True, backend="aot_eager")
    inputs = make((5, 4, 6))
    found = gradients(compiled, inputs, torch.tensor(1.0))
    for ours, expected in zip(found, gradients(vector_regression_loss, inputs, torch.tensor(1.0)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prediction": torch.zeros(2, 3, 4)}, ValueError, "prediction: expected"),
        ({"prediction": torch.zeros(1, 3, 0, 4, 4)}, ValueError, "prediction: is empty"),
        ({"target": torch.zeros(1, 2, 4, 4, 4)}, ValueError, r"target: expected the shape of prediction"),
        ({"target": torch.zeros(1, 3, 4, 4, 4).int()}, TypeError, r"target: .*torch.int32"),
        ({"mask": torch.zeros(1, 3, 4, 4, 4)}, ValueError, r"mask: expected shape \(1, 1, 4, 4, 4\)"),
        ({"mask": torch.zeros(1, 1, 4, 4, 4, device="meta")}, ValueError, r"mask: is on meta"),
        ({"mask": torch.zeros(1, 1, 4, 4, 4).byte()}, TypeError, r"mask: .*torch.uint8"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], error: type[Exception], words: str) -> None:
    good = {
        "prediction": torch.zeros(1, 3, 4, 4, 4),
        "target": torch.zeros(1, 3, 4, 4, 4),
        "mask": torch.zeros(1, 1, 4, 4, 4),
    }
    with pytest.raises(error, match=words):
        vector_regression_loss(**{**good, **change})
