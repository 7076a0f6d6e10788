import math

import pytest
import torch
from accuracy import assert_accurate_over_draws, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import bank_nce, bank_nce_reference


def make(shape: tuple[int, ...], bank: tuple[int, ...], noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(shape)
    key = query + noise * torch.randn(shape)
    return query.requires_grad_(), key.requires_grad_(), torch.randn(bank).requires_grad_()


def form(function, **options):
    options = {"normalizer": 1.3, **options}
    return lambda query, key, bank, temperature=0.2: function(query, key, bank, temperature=temperature, **options)


def forms(**options):
    return [form(function, **options) for function in (bank_nce, bank_nce_reference)]


@pytest.mark.parametrize("normalizer", [1.3, 1e-6, 1e20])
@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.01])
@pytest.mark.parametrize(
    ("shape", "bank"), [((1, 3), (1, 3)), ((64, 20), (1000, 20)), ((2, 9, 17), (33, 17)), ((2, 9, 17), (2, 33, 17))]
)
def test_value_and_gradients_match_float64(
    shape: tuple[int, ...], bank: tuple[int, ...], temperature: float, normalizer: float
) -> None:
    tau = torch.tensor([temperature], requires_grad=True)
    assert_accurate_over_draws(
        *forms(normalizer=normalizer), lambda: (*make(shape, bank), tau), torch.tensor(1.0), draws=24
    )


def test_it_is_the_official_form_without_its_epsilon() -> None:
    """PCRL's code: log(e(b) / (e(b) + c)) + sum log(c / (e(n) + c)), e = exp(s) / (n_data m0), c = K / n_data."""
    query, key, bank = (functional.normalize(v.detach(), dim=-1).double() for v in make((30, 12), (200, 12)))
    data, size, m0 = 1234.0, 200, 1.7
    chance = size / data
    positive = ((query * key).sum(-1) / 0.2).exp() / (data * m0)
    negative = (query @ bank.T / 0.2).exp() / (data * m0)
    expected = -((positive / (positive + chance)).log() + (chance / (negative + chance)).log().sum(-1)).mean()
    found = bank_nce(query.float(), key.float(), bank.float(), normalizer=m0)
    torch.testing.assert_close(found, expected.float())


def test_it_starts_at_log_of_the_bank_and_one_more() -> None:
    """With equal similarities everywhere, and their mean as the normaliser."""
    ones = torch.ones(4, 8)
    loss = bank_nce(ones, ones, torch.ones(16384, 8), normalizer=math.exp(1 / 0.2))
    assert loss.item() == pytest.approx(math.log(16384 + 1) + 16384 * math.log1p(1 / 16384), rel=1e-5)
    tensor = torch.tensor([math.exp(5.0)], requires_grad=True)
    again = bank_nce(ones.requires_grad_(), ones, torch.ones(16384, 8), normalizer=tensor)
    torch.testing.assert_close(again, loss)
    again.backward()
    assert tensor.grad is None


def test_weights_and_reductions() -> None:
    query, key, bank = make((2, 20, 8), (50, 8))
    weights = torch.rand(2, 20) * (torch.rand(2, 20) > 0.3)
    options = {"normalizer": 1.0}
    each = bank_nce(query, key, bank, reduction="none", **options)
    assert each.shape == (2, 20)
    torch.testing.assert_close(bank_nce(query, key, bank, reduction="sum", **options), each.sum())
    found = bank_nce(query, key, bank, weights=weights, **options)
    torch.testing.assert_close(found, (weights * each).sum() / weights.sum())


def test_zero_vectors_are_safe_when_normalised() -> None:
    query, key, bank = make((5, 4), (6, 4))
    with torch.no_grad():
        query[0] = key[1] = bank[2] = 0
    loss, *found = gradients(form(bank_nce), (query, key, bank), torch.tensor(1.0))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_in_the_loss(which: int, bad: float) -> None:
    vectors = [v.detach() for v in make((5, 4), (6, 4))]
    vectors[which][1, 1] = bad
    assert not form(bank_nce)(*vectors).isfinite()


def test_low_precision_is_as_accurate_as_the_plain_form() -> None:
    for dtype in (torch.bfloat16, torch.float16):

        def draw(dtype=dtype):
            return [v.detach().to(dtype).requires_grad_() for v in make((40, 24), (300, 24))]

        assert_accurate_over_draws(*forms(), draw, torch.tensor(1.0))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = make((300, 24), (2000, 24))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(form(bank_nce), inputs, torch.tensor(1.0)))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_gradients_of_gradients() -> None:
    inputs = [v.detach().double().requires_grad_() for v in make((4, 3), (5, 3))]
    assert gradcheck(form(bank_nce), inputs)
    assert gradgradcheck(form(bank_nce), inputs)


def test_opcheck() -> None:
    query, _, bank = make((2, 6, 4), (2, 9, 4))
    arguments = (query, bank, torch.tensor([2.0], requires_grad=True), torch.tensor([0.3]).double(), True)
    torch.library.opcheck(torch.ops.voxtrast.softplus_sums.default, arguments)
    plain = [tensor.detach() for tensor in arguments[:4]]
    for need_bank in (False, True):
        backward = (torch.ones(1, 1).expand(2, 6), *plain, True, need_bank)
        torch.library.opcheck(torch.ops.voxtrast.softplus_sums_backward.default, backward)


def test_compiles_into_one_graph() -> None:
    inputs = make((20, 8), (50, 8))
    compiled = torch.compile(form(bank_nce), fullgraph=True, backend="aot_eager")
    expected = gradients(form(bank_nce), inputs, torch.tensor(1.0))
    for ours, theirs in zip(gradients(compiled, inputs, torch.tensor(1.0)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bank": torch.zeros(5, 3)}, ValueError, r"bank: expected shape \(N, 4\)"),
        ({"normalizer": 0.0}, ValueError, r"normalizer: expected a positive finite number, got 0.0"),
        ({"normalizer": math.nan}, ValueError, r"normalizer: .*got nan"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer: .*shape \(1,\)"),
        ({"normalizer": torch.ones(1, device="meta")}, ValueError, r"normalizer: is on meta"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a positive"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"query": torch.zeros(3, 4), "key": torch.zeros(3, 4), "bank": torch.zeros(5, 4), "normalizer": 1.0}
    with pytest.raises(error, match=words):
        bank_nce(**{**good, **change})
