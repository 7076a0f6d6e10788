import itertools

import pytest
import torch
from accuracy import assert_operator_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from voxtrast.kernels import local_correlation, local_correlation_reference


def make(sizes: tuple[int, ...], channels: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32):
    query, key = (torch.randn(batch, channels, *sizes).to(dtype).requires_grad_() for _ in range(2))
    return query, key


def by_definition(query: Tensor, key: Tensor, radius: int, units: int, scale: float) -> Tensor:
    """The formula, voxel by voxel and unit by unit."""
    batch, channels, *sizes = query.shape
    depth = channels // units
    result = torch.zeros(batch, len(sizes), *sizes, dtype=query.dtype)
    for b, j, point in itertools.product(range(batch), range(units), itertools.product(*map(range, sizes))):
        unit = slice(j * depth, (j + 1) * depth)
        logits, offsets = [], []
        for offset in itertools.product(range(-radius, radius + 1), repeat=len(sizes)):
            there = [p + o for p, o in zip(point, offset, strict=True)]
            if all(0 <= p < size for p, size in zip(there, sizes, strict=True)):
                logits.append(scale * (query[(b, unit, *point)] * key[(b, unit, *there)]).sum())
                offsets.append(torch.tensor(offset, dtype=query.dtype))
        result[(b, slice(None), *point)] += torch.stack(logits).softmax(0) @ torch.stack(offsets) / units
    return result


@pytest.mark.parametrize(
    ("sizes", "radius", "units"),
    [((5, 4), 1, 1), ((3, 6), 2, 2), ((2, 3, 4), 1, 2), ((1, 1), 1, 1), ((1, 1, 1), 2, 4), ((2, 1, 3), 3, 1)],
    ids=str,
)
def test_equals_the_definition(sizes: tuple[int, ...], radius: int, units: int) -> None:
    query, key = make(sizes)
    for scale in (None, 0.7):
        factor = (4 // units) ** -0.5 if scale is None else scale
        exact = by_definition(query.detach().double(), key.detach().double(), radius, units, factor)
        ours = local_correlation(query, key, radius=radius, units=units, scale=scale)
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), exact, rtol=0, atol=4e-6 * radius)
        double = local_correlation(query.double(), key.double(), radius=radius, units=units, scale=scale)
        assert torch.allclose(double, exact, rtol=0, atol=1e-13)


def test_finds_a_shift() -> None:
    key = torch.nn.functional.normalize(torch.randn(1, 32, 9, 9), dim=1)
    query = key.roll((1, -2), (2, 3))
    found = local_correlation(query, key, radius=2, scale=100.0)[:, :, 3:-3, 3:-3]
    expected = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1).expand_as(found)
    assert torch.allclose(found, expected, atol=1e-3)


def test_equal_products_give_the_centre_of_the_window_in_bounds() -> None:
    found = local_correlation(torch.zeros(1, 2, 5, 5), torch.zeros(1, 2, 5, 5), radius=1)
    assert found[0, 0, 0, 2].item() == pytest.approx(0.5)
    assert found[0, 0, 4, 2].item() == pytest.approx(-0.5)
    assert found[0, :, 2, 2].abs().max().item() < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = make((5, 6, 4), dtype=dtype)
    expected = local_correlation(query.float(), key.float(), radius=1, units=2)
    assert torch.equal(local_correlation(query, key, radius=1, units=2), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(local_correlation(query, key, radius=1, units=2), expected)


def test_gradients_match_float64() -> None:
    def function(query: Tensor, key: Tensor) -> Tensor:
        return local_correlation_reference(query, key, radius=2, units=2)

    def by_autograd(query: Tensor, key: Tensor) -> Tensor:
        # The same without the written-out gradient.
        padded = torch.nn.functional.pad(key, [2] * 6).unfold(2, 5, 1).unfold(3, 5, 1).unfold(4, 5, 1)
        inside = torch.nn.functional.pad(torch.ones(6, 7, 5), [2] * 6).unfold(0, 5, 1).unfold(1, 5, 1).unfold(2, 5, 1)
        logits = (query[..., None, None, None] * padded).unflatten(1, (2, 2)).sum(2) / 2**0.5
        share = logits.masked_fill(inside == 0, -torch.inf).flatten(-3).softmax(-1)
        offsets = torch.cartesian_prod(*[torch.arange(-2, 3, dtype=query.dtype)] * 3)
        return (share @ offsets).mean(1).movedim(-1, 1)

    inputs = make((6, 7, 5))
    assert_operator_accurate(function, by_autograd, inputs, torch.randn(2, 3, 6, 7, 5))


def test_gradcheck_and_gradgradcheck_in_float64() -> None:
    for sizes, radius, units in [((3, 2), 2, 2), ((2, 1, 2), 1, 1)]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in make(sizes, 2, batch=1)]

        def function(query: Tensor, key: Tensor, radius: int = radius, units: int = units) -> Tensor:
            return local_correlation(query, key, radius=radius, units=units)

        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def test_any_layout_and_any_number_of_threads() -> None:
    inputs = make((6, 7, 5))
    gradient = torch.randn(2, 3, 6, 7, 5)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(lambda q, k: local_correlation(q, k, radius=1), inputs, gradient))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    strided = [t.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_() for t in inputs]
    found = gradients(lambda q, k: local_correlation(q, k, radius=1), strided, gradient)
    for first, second in zip(results[0], found, strict=True):
        torch.testing.assert_close(first, second)


def test_compiles_into_one_graph() -> None:
    def function(query: Tensor, key: Tensor) -> Tensor:
        return local_correlation(query, key, radius=1, units=2)

    inputs = make((5, 6))
    gradient = torch.randn(2, 2, 5, 6)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        gradients(compiled, inputs, gradient), gradients(function, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(1, 4, 5)}, ValueError, "query: expected"),
        ({"query": torch.zeros(0, 4, 5, 5)}, ValueError, "query: is empty"),
        ({"key": torch.zeros(1, 4, 5, 6)}, ValueError, "key: expected the shape of query"),
        ({"key": torch.zeros(1, 4, 5, 5).int()}, TypeError, "key: .*torch.int32"),
        ({"key": torch.zeros(1, 4, 5, 5, device="meta")}, ValueError, "key: is on meta"),
        ({"radius": 0}, ValueError, "radius: expected at least 1 voxel, got 0"),
        ({"units": 3}, ValueError, "units: expected a divisor of the 4 channels of query, got 3"),
        ({"units": 0}, ValueError, "units: .* got 0"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
    ],
)
def test_wrong_arguments_are_named(change, error: type[Exception], words: str) -> None:
    good = {"query": torch.zeros(1, 4, 5, 5), "key": torch.zeros(1, 4, 5, 5), "radius": 1}
    with pytest.raises(error, match=words):
        local_correlation(**{**good, **change})
