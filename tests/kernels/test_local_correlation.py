import importlib
import itertools
import math

import pytest
import torch
from accuracy import assert_operator_accurate, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from voxtrast.kernels import local_correlation, local_correlation_reference

local_correlation_module = importlib.import_module("voxtrast.kernels.local_correlation")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "radius", "units"),
    [
        ((7, 5), 1, 1),
        ((33, 47), 2, 3),
        ((1, 40), 3, 1),
        ((19, 1), 2, 2),
        ((9, 7, 18), 1, 2),
        ((6, 7, 33), 2, 1),
        ((5, 9, 17), 3, 3),
        ((3, 10, 20), 4, 1),
        ((4, 13, 9), 5, 1),
        ((3, 4, 5), 7, 2),
        ((1, 1, 1), 2, 1),
        ((2, 41), 20, 1),
    ],
    ids=str,
)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...], radius: int, units: int, dtype: torch.dtype) -> None:
    def with_options(function):
        return lambda query, key: function(query, key, radius=radius, units=units)

    inputs = make(sizes, channels=6, dtype=dtype)
    gradient = torch.randn(2, len(sizes), *sizes)
    assert_operator_accurate(
        with_options(local_correlation), with_options(local_correlation_reference), inputs, gradient
    )


@pytest.mark.parametrize("scale", [0.0, 30.0, -3.0])
def test_flat_and_sharp_softmaxes_match_float64(scale: float) -> None:
    def with_scale(function):
        return lambda query, key: function(query, key, radius=2, scale=scale)

    inputs = make((6, 9, 18), channels=8)
    assert_operator_accurate(
        with_scale(local_correlation), with_scale(local_correlation_reference), inputs, torch.randn(2, 3, 6, 9, 18)
    )


def test_a_radius_beyond_the_volume_is_that_of_the_volume() -> None:
    query, key = make((3, 4, 5))
    expected = local_correlation(query, key, radius=4)
    assert torch.equal(local_correlation(query, key, radius=1000), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_voxel_reaches_those_that_see_it_and_no_others(bad: float) -> None:
    query, key = make((5, 12, 40), batch=1)
    expected = gradients(lambda q, k: local_correlation(q, k, radius=2), (query, key), torch.ones(1, 3, 5, 12, 40))
    with torch.no_grad():
        key[0, 1, 2, 6, 20] = bad
    found = gradients(lambda q, k: local_correlation(q, k, radius=2), (query, key), torch.ones(1, 3, 5, 12, 40))
    # Infinity times a negative number is a logit like others: weight 0.
    plain = gradients(
        lambda q, k: local_correlation_reference(q, k, radius=2), (query, key), torch.ones(1, 3, 5, 12, 40)
    )
    assert found[0].isnan().any()
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    far = torch.ones(5, 12, 40, dtype=torch.bool)
    far[:, 2:11, 16:25] = False
    for ours, clean in zip(found, expected, strict=True):
        assert torch.equal(ours[..., far], clean[..., far])


def test_many_boxes_and_threads_give_the_same_bits() -> None:
    inputs = make((13, 40, 37), channels=8, batch=1)
    gradient = torch.randn(1, 3, 13, 40, 37)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(lambda q, k: local_correlation(q, k, radius=2, units=2), inputs, gradient))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last"])
def test_any_layout_of_inputs_and_gradient(layout: str) -> None:
    query, key = make((6, 7, 10))
    gradient = torch.randn(2, 3, 6, 7, 10)
    if layout == "strided":
        wide = torch.randn(2, 4, 6, 7, 20)
        tensors = wide[..., ::2], wide[..., 1::2], torch.randn(2, 3, 6, 7, 20)[..., ::2]
    elif layout == "expanded":
        tensors = query[:1].detach().expand(2, -1, -1, -1, -1), key.detach(), torch.randn(()).expand(gradient.shape)
    else:
        tensors = tuple(t.detach().to(memory_format=torch.channels_last_3d) for t in (query, key, gradient))
    inputs = [tensor.requires_grad_() for tensor in tensors[:2]]
    found = gradients(lambda q, k: local_correlation(q, k, radius=2), inputs, tensors[2])
    dense = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    expected = gradients(lambda q, k: local_correlation(q, k, radius=2), dense, tensors[2].contiguous())
    for ours, plain in zip(found, expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("asking", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(asking: tuple[bool, bool]) -> None:
    inputs = make((6, 7, 10))
    both = gradients(lambda q, k: local_correlation(q, k, radius=1), inputs, torch.ones(2, 3, 6, 7, 10))
    inputs = [tensor.detach().requires_grad_(ask) for tensor, ask in zip(inputs, asking, strict=True)]
    one = gradients(lambda q, k: local_correlation(q, k, radius=1), inputs, torch.ones(2, 3, 6, 7, 10))
    assert torch.equal(one[1], both[1] if asking[0] else both[2])


def test_double_backward_matches_float64() -> None:
    def with_options(function):
        return lambda query, key: function(query, key, radius=1, units=2)

    assert_second_order_accurate(
        with_options(local_correlation), with_options(local_correlation_reference), make((4, 3, 5))
    )


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, units: int) -> None:
    query, key = make((4, 3, 5), dtype=dtype)
    arguments = (query, key, 1, units, 0.5)
    torch.library.opcheck(torch.ops.voxtrast.local_correlation.default, arguments)
    displacement, log_sum_exp, mean = torch.ops.voxtrast.local_correlation(query.detach(), key.detach(), *arguments[2:])
    mean = mean if units > 1 else displacement
    for needed in [(True, True), (True, False), (False, True)]:
        gradient = torch.randn(displacement.shape)
        saved = (gradient, query.detach(), key.detach(), log_sum_exp, mean, *arguments[2:])
        torch.library.opcheck(torch.ops.voxtrast.local_correlation_backward.default, (*saved, *needed))


def test_the_saved_sums_are_those_of_the_reference() -> None:
    query, key = (tensor.detach() for tensor in make((5, 6, 20)))
    ours = torch.ops.voxtrast.local_correlation(query, key, 2, 2, 0.7)
    mean, logits = local_correlation_module._mean_offsets(query.double(), key.double(), 2, 2, 0.7)
    torch.testing.assert_close(ours[1].double(), logits.logsumexp(2), rtol=0, atol=4e-6)
    torch.testing.assert_close(ours[2].double(), mean.flatten(1, 2), rtol=0, atol=4e-6)


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


def test_the_written_out_gradient_of_the_reference_matches_float64() -> None:
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
