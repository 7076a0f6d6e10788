import math

import pytest
import torch
from accuracy import assert_accurate_over_draws, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import info_nce, info_nce_reference

SHAPES = [(2, 3), (1, 5), (300, 64), (3, 33, 17), (260, 70)]
TEMPERATURES = [0.2, 0.07, 0.01]


def make(shape: tuple[int, ...], noise: float | None = None) -> tuple[Tensor, Tensor]:
    """Pairs of vectors: independent ones, or equal ones with noise."""
    query = torch.randn(shape)
    key = torch.randn(shape) if noise is None else query + noise * torch.randn(shape)
    return query.requires_grad_(), key.requires_grad_()


def with_temperature(function, **options):
    return lambda query, key, temperature, *more: function(
        query, key, temperature=temperature, **dict(zip(("negatives", "weights"), more, strict=False)), **options
    )


def forms(**options):
    return [with_temperature(function, **options) for function in (info_nce, info_nce_reference)]


@pytest.mark.parametrize("upstream", ["mean", "sum"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_float64(
    shape: tuple[int, ...], temperature: float, symmetric: bool, upstream: str
) -> None:
    tau = torch.tensor([temperature], requires_grad=True)
    pair = forms(symmetric=symmetric, reduction=upstream)
    assert_accurate_over_draws(*pair, lambda: (*make(shape), tau), torch.tensor(1.0))


@pytest.mark.parametrize(("temperature", "noise"), [(0.2, 0.01), (0.07, 0.1), (0.01, 1.5)])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_a_converged_loss_and_its_gradients_match_float64(temperature: float, noise: float, symmetric: bool) -> None:
    tau = torch.tensor([temperature], requires_grad=True)

    def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        query = torch.eye(96) + 0.01 * torch.randn(96, 96)
        key = query + noise * torch.randn(96, 96) / 96**0.5
        return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(), tau

    pair = forms(symmetric=symmetric)
    if temperature < 0.2:  # above, even equal pairs have a loss
        assert pair[0](*draw()) < 1e-3
    for upstream in (1.0, 1.0 / 96):
        assert_accurate_over_draws(*pair, draw, torch.tensor(upstream))
    assert_accurate_over_draws(*pair, lambda: draw(torch.bfloat16), torch.tensor(1.0))


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_it_is_cross_entropy_of_the_similarities(symmetric: bool) -> None:
    query, key = (functional.normalize(vectors.detach(), dim=-1) for vectors in make((40, 16)))
    logits, targets = query @ key.T / 0.3, torch.arange(40)
    expected = functional.cross_entropy(logits, targets)
    if symmetric:
        expected = (expected + functional.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(info_nce(query, key, temperature=0.3, symmetric=symmetric), expected)
    assert info_nce(query[:1], key[:1]) == 0  # a single pair has no negatives


def test_more_negatives() -> None:
    tau = torch.tensor([0.1], requires_grad=True)
    for symmetric in (False, True):

        def draw():
            return (*make((2, 30, 12)), tau, torch.randn(2, 50, 12, requires_grad=True))

        assert_accurate_over_draws(*forms(symmetric=symmetric), draw, torch.tensor(1.0))
    query, key, _, negatives = draw()
    logits = torch.cat((query @ key.mT, query @ negatives.mT), dim=-1)
    expected = functional.cross_entropy(logits.flatten(0, 1), torch.arange(30).repeat(2))
    found = info_nce(query, key, negatives=negatives, temperature=1.0, normalize=False)
    torch.testing.assert_close(found, expected)


def test_weights_choose_what_counts_and_get_no_gradient() -> None:
    query, key = make((3, 40, 16))
    weights = torch.rand(3, 40) * (torch.rand(3, 40) > 0.3)
    weights.requires_grad_()
    each = info_nce(query, key, reduction="none")
    assert each.shape == (3, 40)
    share = weights.detach()
    torch.testing.assert_close(info_nce(query, key, weights=weights), (share * each).sum() / share.sum())
    torch.testing.assert_close(info_nce(query, key, weights=weights, reduction="sum"), (share * each).sum())
    chosen = weights > 0.5
    torch.testing.assert_close(info_nce(query, key, weights=chosen), each[chosen].mean())
    inputs = (query, key, torch.tensor([0.1]), None, share)
    for reduction in ("mean", "sum", "none"):
        ours, plain = (
            gradients(lambda q, k, form=form: form(q, k, *inputs[2:]), (query, key), torch.ones(()).expand(each.shape)
                      if reduction == "none" else torch.tensor(1.0))
            for form in forms(reduction=reduction)
        )  # fmt: skip
        for found, expected in zip(ours, plain, strict=True):
            torch.testing.assert_close(found, expected)
    info_nce(query, key, weights=weights).backward()
    assert weights.grad is None


def test_no_weight_at_all_gives_zero_with_zero_gradients() -> None:
    loss, *found = gradients(lambda q, k: info_nce(q, k, weights=torch.zeros(8)), make((8, 4)), torch.tensor(1.0))
    assert loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_zero_vectors_are_safe_when_normalised() -> None:
    query, key = make((20, 8))
    with torch.no_grad():
        query[3] = key[5] = 0
        query[4] = 1e-9
    for symmetric in (False, True):
        inputs = query, key, torch.tensor([0.1], requires_grad=True)
        loss, *found = gradients(with_temperature(info_nce, symmetric=symmetric), inputs, torch.tensor(1.0))
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found)
        assert not found[0][3:5].any()
        assert not found[1][5].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_nan_and_infinity_show_in_the_loss(bad: float, normalize: bool) -> None:
    query, key = (vectors.detach() for vectors in make((20, 8)))
    key[3, 2] = bad
    query.requires_grad_()
    loss = info_nce(query, key, normalize=normalize)
    assert not loss.isfinite()
    loss.backward()
    assert not query.grad.isfinite().all()


def test_a_norm_that_overflows_is_no_vector_of_zeros() -> None:
    query, key = (vectors.detach() for vectors in make((6, 4)))
    query[2] = 1e25
    for function in (info_nce, info_nce_reference):
        assert function(query, key).isnan()


def test_vectors_of_different_types_are_promoted() -> None:
    query, key = (vectors.detach().bfloat16() for vectors in make((20, 8)))
    negatives = torch.randn(30, 8)
    expected = info_nce(query.float(), key.float(), negatives=negatives)
    assert torch.equal(info_nce(query, key, negatives=negatives), expected)


def test_low_precision_vectors_give_a_float32_loss_as_accurate_as_the_plain_form() -> None:
    for dtype in (torch.bfloat16, torch.float16):

        def draw(dtype=dtype):
            return [v.detach().to(dtype).requires_grad_() for v in make((200, 40))]

        for symmetric in (False, True):
            for normalize in (False, True):
                options = {"symmetric": symmetric, "normalize": normalize, "temperature": 0.5}
                pair = [lambda q, k, f=f, o=options: f(q, k, **o) for f in (info_nce, info_nce_reference)]
                assert_accurate_over_draws(*pair, draw, torch.tensor(1.0))
        assert info_nce(*draw()).dtype == torch.float32


def test_a_large_upstream_gradient_and_a_small_one_scale_the_gradients() -> None:
    inputs = make((50, 16))
    base = gradients(info_nce, inputs, torch.tensor(1.0))[1:]
    for factor in (2.0**-100, 2.0**60):
        for scaled, plain in zip(gradients(info_nce, inputs, torch.tensor(factor))[1:], base, strict=True):
            torch.testing.assert_close(scaled / factor, plain, rtol=1e-6, atol=0)


def test_gradients_of_gradients() -> None:
    query, key = make((6, 4))
    inputs = [vectors.detach().double().requires_grad_() for vectors in (query, key)]
    temperature = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(with_temperature(info_nce, symmetric=True), (*inputs, temperature))
    assert gradgradcheck(with_temperature(info_nce, symmetric=True), (*inputs, temperature))
    single = (*make((30, 8)), torch.tensor([0.5], requires_grad=True))
    assert_second_order_accurate(*forms(symmetric=True), single)


def test_transforms_of_torch_func_go_through_the_reference() -> None:
    query, key = (vectors.detach() for vectors in make((10, 4)))
    found = torch.func.grad(lambda q: info_nce(q, key))(query)
    leaf = query.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(info_nce(leaf, key), leaf)[0])


def test_opcheck() -> None:
    query, key = make((2, 6, 4))
    more = torch.cat((key.detach(), torch.randn(2, 5, 4)), dim=1).requires_grad_()
    for symmetric in (False, True):
        for offset in (0, 3):
            arguments = (query, more, torch.tensor([2.0], requires_grad=True), offset, symmetric, offset == 0)
            torch.library.opcheck(torch.ops.voxtrast.info_nce.default, arguments)


def test_positives_may_start_later_among_the_keys() -> None:
    """What a rank needs, whose queries are a part of all."""
    query, key = (vectors.detach() for vectors in make((1, 40, 8)))
    scale = torch.tensor([2.0])
    whole = torch.ops.voxtrast.info_nce(query, key, scale, 0, False, True)[0]
    parts = [torch.ops.voxtrast.info_nce(query[:, s : s + 20], key, scale, s, False, True)[0] for s in (0, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph_for_any_size(backend: str) -> None:
    for symmetric in (False, True):
        form = with_temperature(info_nce, symmetric=symmetric)
        compiled = torch.compile(form, fullgraph=True, backend=backend, dynamic=True)
        for shape in ((20, 8), (33, 8)):
            inputs = (*make(shape), torch.tensor([0.2], requires_grad=True))
            expected = gradients(form, inputs, torch.tensor(1.0))
            for ours, theirs in zip(gradients(compiled, inputs, torch.tensor(1.0)), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(4)}, ValueError, r"query: expected"),
        ({"query": torch.zeros(0, 4), "key": torch.zeros(0, 4)}, ValueError, r"query: is empty"),
        ({"key": torch.zeros(5, 4)}, ValueError, r"key: expected one key for each query"),
        ({"key": torch.zeros(3, 4).int()}, TypeError, r"key: .*torch.int32"),
        ({"negatives": torch.zeros(5, 3)}, ValueError, r"negatives: expected shape \(N, 4\)"),
        ({"weights": torch.zeros(4)}, ValueError, r"weights: expected shape \(3,\)"),
        ({"weights": torch.zeros(3).int()}, TypeError, r"weights: .*torch.int32"),
        ({"temperature": 0.0}, ValueError, r"temperature: expected a positive finite number, got 0.0"),
        ({"temperature": math.inf}, ValueError, r"temperature: .*got inf"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature: .*shape \(1,\)"),
        ({"reduction": "average"}, ValueError, r"reduction: .*'average'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"query": torch.zeros(3, 4), "key": torch.zeros(3, 4)}
    with pytest.raises(error, match=words):
        info_nce(**{**good, **change})
