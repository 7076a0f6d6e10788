"""The Triton operators through the public functions, judged like the compiled ones of the CPU."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate_over_draws, gradients
from torch import Tensor

from voxtrast import kernels
from voxtrast.kernels import (
    bank_info_nce,
    bank_nce,
    info_nce,
    info_nce_reference,
    pairwise_logsumexp,
    positional_info_nce,
)

# NaN and infinities are given on purpose, and what is interpreted stands in for the operators of the CPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One shift serves both of the first two; at the last every row and column keeps its maximum.
TEMPERATURES = [0.2, 0.07, 0.01]
# Few numbers of channels: on a GPU each of them compiles kernels. The interpreter is slow: ordinary tests see every
# type and every temperature once, and no gradient of a temperature, which is one number a draw and wants many.
CASES = [
    pytest.param(dtype, temperature, False, id=f"{dtype}-{temperature}")
    for dtype, temperature in zip(DTYPES, TEMPERATURES, strict=True)
] + [
    pytest.param(dtype, temperature, True, id=f"{dtype}-{temperature}-thorough", marks=pytest.mark.slow)
    for dtype in DTYPES
    for temperature in TEMPERATURES
]
each_case = pytest.mark.parametrize(("dtype", "temperature", "thorough"), CASES, indirect=["dtype"])
OPERATORS = ("pairwise_logsumexp", "info_nce", "positional_info_nce", "bank_info_nce", "bank_nce")
Form = Callable[..., Tensor]


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The references multiply in this type, as anybody would write it; in float64 where they are asked to."""
    if request.param != torch.float32:

        def similarities(query: Tensor, key: Tensor, scale: float | Tensor) -> Tensor:
            if torch.float64 in (query.dtype, key.dtype):
                return scale * (query.double() @ key.double().mT)
            return scale * (query.to(request.param) @ key.to(request.param).mT).float()

        for name in OPERATORS:
            monkeypatch.setattr(
                importlib.import_module(f"voxtrast.kernels.{name}"), "similarities", similarities, False
            )
    return request.param


def drawn(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...], length: float = 1.0) -> list[Tensor]:
    return [(length * torch.randn(shape)).to(device, dtype).requires_grad_() for shape in shapes]


def tau(temperature: float, device: torch.device, thorough: bool) -> Tensor:
    return torch.tensor([temperature], device=device, requires_grad=thorough)


def forms(name: str, *more: Tensor, **options) -> tuple[Form, Form]:
    """An operator and its reference, as functions of differentiable tensors, the last of them the temperature."""

    def form(function: Form) -> Form:
        return lambda *tensors: function(*tensors[:-1], *more, temperature=tensors[-1], **options)

    return form(getattr(kernels, name)), form(getattr(kernels, f"{name}_reference"))


def assert_accurate(pair: tuple[Form, Form], draw: Callable[[], list[Tensor]], thorough: bool) -> None:
    output = pair[1](*draw())
    upstream = torch.linspace(0.5, 1.5, output.numel(), device=output.device).reshape(output.shape)
    assert_accurate_over_draws(*pair, draw, upstream, draws=8 if thorough else 2)


@each_case
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "any length"])
def test_info_nce(
    device: torch.device, dtype: torch.dtype, temperature: float, thorough: bool, normalize: bool
) -> None:
    for shape, symmetric in (((1, 17), True), ((37, 20), True), ((2, 20, 30), False)):

        def draw(shape: tuple[int, ...] = shape) -> list[Tensor]:
            pairs = drawn(device, dtype, shape, shape, length=1.0 if normalize else 0.4)
            return [*pairs, tau(temperature, device, thorough)]

        assert_accurate(forms("info_nce", symmetric=symmetric, normalize=normalize, reduction="none"), draw, thorough)


@pytest.mark.parametrize("dtype", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize(("temperature", "noise"), [(0.07, 0.1), (0.01, 1.5)])
def test_a_converged_info_nce(device: torch.device, dtype: torch.dtype, temperature: float, noise: float) -> None:
    def draw() -> list[Tensor]:
        query = torch.eye(48) + 0.01 * torch.randn(48, 48)
        key = query + noise * torch.randn(48, 48) / 48**0.5
        pairs = (each.to(device, dtype).requires_grad_() for each in (query, key))
        return [*pairs, tau(temperature, device, False)]

    pair = forms("info_nce", symmetric=True, reduction="none")
    assert pair[0](*draw()).mean() < 1e-3
    assert_accurate(pair, draw, thorough=False)


def test_the_loss_of_16_bit_vectors_is_that_of_the_very_vectors(device: torch.device) -> None:
    """Making them unit length rounds nothing but float32."""
    for dtype in DTYPES[1:]:
        query, key = drawn(device, dtype, (60, 31), (60, 31))
        found = info_nce(query, key, temperature=0.02, reduction="none")
        exact = info_nce_reference(query.double(), key.double(), temperature=0.02, reduction="none")
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@each_case
@pytest.mark.parametrize("same", [True, False])
def test_pairwise_logsumexp(
    device: torch.device, dtype: torch.dtype, temperature: float, thorough: bool, same: bool
) -> None:
    def form(name: str, exclude: bool) -> Form:
        def rows_and_columns(query: Tensor, key: Tensor, temperature: Tensor) -> Tensor:
            options = {"scale": 1 / temperature, "exclude_diagonal": exclude, "columns": True}
            row, column = getattr(kernels, name)(query, query if same else key, **options)
            return torch.cat((row, column), dim=-1)

        return rows_and_columns

    def draw() -> list[Tensor]:
        return [*drawn(device, dtype, (2, 20, 24), (2, 33, 24), length=0.2), tau(temperature, device, thorough)]

    for exclude in (False, True):
        names = ("pairwise_logsumexp", "pairwise_logsumexp_reference")
        assert_accurate(tuple(form(name, exclude) for name in names), draw, thorough)


@each_case
def test_positional_info_nce(device: torch.device, dtype: torch.dtype, temperature: float, thorough: bool) -> None:
    cases = [
        ((2, 32, 20), torch.rand(16).repeat(2), 0.1),  # as JCL: positions shared by all problems
        ((2, 19, 18), torch.rand(2, 19), 0.35),
        ((50, 20), torch.rand(50), 0.03),
    ]
    for shape, positions, threshold in cases:
        pair = forms("positional_info_nce", positions.to(device), threshold=threshold, reduction="none")
        assert_accurate(
            pair, lambda shape=shape: [*drawn(device, dtype, shape), tau(temperature, device, thorough)], thorough
        )


@each_case
def test_banks(device: torch.device, dtype: torch.dtype, temperature: float, thorough: bool) -> None:
    def draw() -> list[Tensor]:
        return [*drawn(device, dtype, (20, 20), (20, 20), (50, 20)), tau(temperature, device, thorough)]

    assert_accurate(forms("bank_info_nce", reduction="none"), draw, thorough)
    assert_accurate(forms("bank_nce", normalizer=math.exp(0.1 / temperature), reduction="none"), draw, thorough)


@pytest.mark.parametrize("dtype", DTYPES[:2], indirect=True, ids=str)
def test_vectors_wider_than_a_block(device: torch.device, dtype: torch.dtype) -> None:
    def draw() -> list[Tensor]:
        return [*drawn(device, dtype, (20, 300), (20, 300)), tau(0.1, device, False)]

    assert_accurate(forms("info_nce", symmetric=True, reduction="none"), draw, thorough=False)


def test_upstream_gradients_of_any_size_keep_float16_in_range(device: torch.device) -> None:
    query, key = (each.detach() for each in drawn(device, torch.float16, (40, 20), (40, 20)))
    leaves = [each.requires_grad_() for each in (query, key)]

    def found(upstream: float) -> list[Tensor]:
        return gradients(lambda q, k: info_nce(q, k, reduction="sum"), leaves, torch.tensor(upstream, device=device))[
            1:
        ]

    one = found(1.0)
    for upstream in (2.0**-4, 2.0**8):  # what the gradients themselves can hold
        for gradient, expected in zip(found(upstream), one, strict=True):
            torch.testing.assert_close(gradient / upstream, expected, rtol=1e-3, atol=6e-8 / min(1, upstream))
    exact = gradients(
        lambda q, k: info_nce_reference(q, k, reduction="sum"), [each.double() for each in leaves], torch.tensor(1.0)
    )[1:]
    for gradient, expected in zip(one, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def test_an_upstream_gradient_may_have_any_strides(device: torch.device) -> None:
    query, key = drawn(device, torch.float32, (3, 20, 20), (3, 20, 20))
    weights = torch.rand(20, 3, device=device)
    for loss, reference in (forms("info_nce", reduction="none"), forms("info_nce", reduction="none", symmetric=True)):
        found, expected = (
            torch.autograd.grad((form(query, key, 0.2).mT * weights).sum(), (query, key)) for form in (loss, reference)
        )
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_losses_of_hundreds(device: torch.device) -> None:
    query, key = (each.detach() for each in drawn(device, torch.float32, (20, 20), (20, 20)))
    found = info_nce(query, -query, temperature=0.002, reduction="none")
    torch.testing.assert_close(found, info_nce_reference(query, -query, temperature=0.002, reduction="none"))
    assert info_nce(30 * query, 30 * key, normalize=False).isfinite()


def test_nothing_depends_on_chance(device: torch.device) -> None:
    query, key = drawn(device, torch.bfloat16, (100, 24), (100, 24))
    positions = torch.rand(100, device=device)
    for loss in (
        lambda: info_nce(query, key, symmetric=True),
        lambda: positional_info_nce(query, positions, threshold=0.2),
        lambda: bank_nce(query[:10], key[:10], key[10:], normalizer=1.0),
    ):
        one, other = (torch.autograd.grad(loss(), (query, key), allow_unused=True) for _ in range(2))
        assert all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_edges(device: torch.device) -> None:
    query, key = (each.detach() for each in drawn(device, torch.bfloat16, (20, 20), (20, 20)))
    assert info_nce(query[:1], key[:1], symmetric=True) == 0  # a single pair has no negatives
    assert pairwise_logsumexp(query[:1], query[:1], scale=3.0, exclude_diagonal=True) == -math.inf
    query[3] = key[5] = 0
    for temperature in (0.1, 0.01):
        inputs = [each.requires_grad_() for each in (query, key)]
        loss, *found = gradients(lambda q, k, t=temperature: info_nce(q, k, temperature=t), inputs, torch.tensor(1.0))
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found)
        assert not found[0][3].any()
        assert not found[1][5].any()
        for bad in (math.nan, math.inf, -math.inf):
            spoilt = query.detach().clone()
            spoilt[7, 2] = bad
            assert info_nce(spoilt, key, temperature=temperature, symmetric=True).isnan()
            assert info_nce(key, spoilt, temperature=temperature).isnan()
            assert bank_info_nce(key, key, spoilt, temperature=temperature).isnan()
            assert bank_nce(key, key, spoilt, temperature=temperature, normalizer=1.0).isnan()
            assert positional_info_nce(spoilt, torch.arange(20.0, device=device) // 2, threshold=0.5).isnan()


def test_opcheck(device: torch.device) -> None:
    query, key = drawn(device, torch.float32, (2, 6, 20), (2, 7, 20))
    scale = torch.tensor([5.0], device=device, requires_grad=True)
    shift = torch.tensor([1.0], device=device, dtype=torch.float64)
    torch.library.opcheck(torch.ops.voxtrast.info_nce.default, (query, key, scale, 1, True, True))
    torch.library.opcheck(torch.ops.voxtrast.pairwise_logsumexp.default, (query, key, scale, False, True, True, True))
    torch.library.opcheck(torch.ops.voxtrast.softplus_sums.default, (query, key, scale, shift, True))
    order = torch.randperm(6, device=device)[None]
    first, last = torch.arange(6, device=device)[None] // 2 * 2, torch.arange(6, device=device)[None] // 2 * 2 + 2
    torch.library.opcheck(torch.ops.voxtrast.positional_info_nce.default, (query, order, first, last, scale, True))
