import math

import pytest
import torch
from accuracy import assert_accurate_over_draws, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import bank_info_nce, bank_info_nce_reference


def make(shape: tuple[int, ...], bank: tuple[int, ...], noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(shape)
    key = query + noise * torch.randn(shape)
    return query.requires_grad_(), key.requires_grad_(), torch.randn(bank).requires_grad_()


def form(function, **options):
    return lambda query, key, bank, temperature: function(query, key, bank, temperature=temperature, **options)


def forms(**options):
    return [form(function, **options) for function in (bank_info_nce, bank_info_nce_reference)]


@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.01])
@pytest.mark.parametrize("noise", [1.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "bank"), [((1, 3), (1, 3)), ((64, 20), (1000, 20)), ((2, 9, 17), (33, 17)), ((2, 9, 17), (2, 33, 17))]
)
def test_value_and_gradients_match_float64(
    shape: tuple[int, ...], bank: tuple[int, ...], noise: float, temperature: float
) -> None:
    tau = torch.tensor([temperature], requires_grad=True)
    assert_accurate_over_draws(*forms(), lambda: (*make(shape, bank, noise), tau), torch.tensor(1.0))


def test_it_is_cross_entropy_with_the_positive_first() -> None:
    query, key, bank = (functional.normalize(v.detach(), dim=-1) for v in make((30, 12), (200, 12)))
    logits = torch.cat(((query * key).sum(-1, keepdim=True), query @ bank.T), dim=1) / 0.2
    expected = functional.cross_entropy(logits, torch.zeros(30, dtype=torch.int64))
    torch.testing.assert_close(bank_info_nce(query, key, bank), expected)


def test_a_bank_that_asks_for_no_gradient_gets_none() -> None:
    query, key, bank = make((30, 12), (200, 12))
    expected = gradients(form(bank_info_nce), (query, key, bank, torch.tensor([0.2])), torch.tensor(1.0))
    found = gradients(form(bank_info_nce), (query, key, bank.detach(), torch.tensor([0.2])), torch.tensor(1.0))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected[:3], strict=True))


def test_weights_and_reductions() -> None:
    query, key, bank = make((2, 20, 8), (50, 8))
    weights = torch.rand(2, 20) * (torch.rand(2, 20) > 0.3)
    each = bank_info_nce(query, key, bank, reduction="none")
    assert each.shape == (2, 20)
    torch.testing.assert_close(bank_info_nce(query, key, bank, reduction="sum"), each.sum())
    torch.testing.assert_close(bank_info_nce(query, key, bank, weights=weights), (weights * each).sum() / weights.sum())


def test_zero_vectors_are_safe_when_normalised() -> None:
    query, key, bank = make((5, 4), (6, 4))
    with torch.no_grad():
        query[0] = key[1] = bank[2] = 0
    loss, *found = gradients(bank_info_nce, (query, key, bank), torch.tensor(1.0))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_in_the_loss(which: int, bad: float) -> None:
    vectors = [v.detach() for v in make((5, 4), (6, 4))]
    vectors[which][1, 1] = bad
    assert not bank_info_nce(*vectors).isfinite()


def test_low_precision_is_as_accurate_as_the_plain_form() -> None:
    for dtype in (torch.bfloat16, torch.float16):

        def draw(dtype=dtype):
            return [v.detach().to(dtype).requires_grad_() for v in make((40, 24), (300, 24))]

        assert_accurate_over_draws(bank_info_nce, bank_info_nce_reference, draw, torch.tensor(1.0))


def test_gradients_of_gradients() -> None:
    inputs = [v.detach().double().requires_grad_() for v in make((4, 3), (5, 3))]
    assert gradcheck(bank_info_nce, inputs)
    assert gradgradcheck(bank_info_nce, inputs)


def test_compiles_into_one_graph() -> None:
    inputs = make((20, 8), (50, 8))
    compiled = torch.compile(bank_info_nce, fullgraph=True, backend="aot_eager")
    expected = gradients(bank_info_nce, inputs, torch.tensor(1.0))
    for ours, theirs in zip(gradients(compiled, inputs, torch.tensor(1.0)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": torch.zeros(4, 4)}, ValueError, r"key: expected one key for each query"),
        ({"bank": torch.zeros(5, 3)}, ValueError, r"bank: expected shape \(N, 4\)"),
        ({"bank": torch.zeros(2, 5, 4)}, ValueError, r"bank: expected shape \(N, 4\)"),
        ({"bank": torch.zeros(0, 4)}, ValueError, r"bank: is empty"),
        ({"bank": torch.zeros(5, 4).int()}, TypeError, r"bank: .*torch.int32"),
        ({"weights": torch.zeros(5)}, ValueError, r"weights: expected shape \(3,\)"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a positive"),
        ({"reduction": ""}, ValueError, r"reduction: "),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"query": torch.zeros(3, 4), "key": torch.zeros(3, 4), "bank": torch.zeros(5, 4)}
    with pytest.raises(error, match=words):
        bank_info_nce(**{**good, **change})
