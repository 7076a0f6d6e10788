"""The CUDA kernels of local_correlation, run by the emulation, against the torch reference."""

import itertools
import math

import pytest
import torch
from accuracy import BACKWARD, FORWARD, assert_as_accurate
from emulated import TYPES, Emulated
from torch import Tensor

from voxtrast.kernels import local_correlation_reference


class Operator:
    """local_correlation and its backward on emulated CUDA."""

    def __init__(self, run: Emulated, radius: int, units: int = 1, scale: float | None = None, processors: int = 2):
        self.run, self.radius, self.units, self.scale, self.processors = run, radius, units, scale, processors

    def arguments(self, query: Tensor) -> tuple[int | float, ...]:
        batch, channels, *sizes = query.shape
        depth = channels // self.units
        scale = float(1 / math.sqrt(depth) if self.scale is None else self.scale)
        padded = (*sizes, 0, 0)[:3]
        return (batch, self.units, depth, len(sizes), *padded, self.radius, TYPES[query.dtype], self.processors, scale)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, *sizes = query.shape
        dimensions = len(sizes)
        mean = (0,) if self.units == 1 else (batch, self.units * dimensions, *sizes)
        shapes = ((batch, dimensions, *sizes), (batch, self.units, *sizes), mean)
        outputs = tuple(self.run.empty(*shape) for shape in shapes)
        query, key = (self.run.copy(tensor) for tensor in (query, key))
        self.run("local_correlation", query, key, *outputs, *self.arguments(query))
        return outputs

    def backward(self, gradient: Tensor, query: Tensor, key: Tensor, need: str = "qk") -> tuple[Tensor, Tensor]:
        displacement, log_sum_exp, mean = self.forward(query, key)
        inputs = [self.run.copy(tensor) for tensor in (gradient, query, key)]
        found = tuple(
            self.run.empty(*(query.shape if name in need else (0,)), dtype=query.dtype) for name in ("q", "k")
        )
        saved = log_sum_exp, displacement if self.units == 1 else mean
        self.run("local_correlation_backward", *inputs, *saved, *found, *self.arguments(query))
        return found

    def reference(self, query: Tensor, key: Tensor) -> Tensor:
        return local_correlation_reference(query, key, radius=self.radius, units=self.units, scale=self.scale)

    def check(self, query: Tensor, key: Tensor) -> None:
        """Value and both gradients."""
        gradient = torch.randn(query.shape[0], query.dim() - 2, *query.shape[2:])
        ours = [self.forward(query, key)[0], *self.backward(gradient, query, key)]
        plain, exact = (self.by_reference(gradient, query, key, dtype) for dtype in (query.dtype, torch.float64))
        for position, tensors in enumerate(zip(ours, plain, exact, strict=True)):
            assert_as_accurate(*tensors, factor=FORWARD if position == 0 else BACKWARD)

    def by_reference(self, gradient: Tensor, query: Tensor, key: Tensor, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key)]
        output = self.reference(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def make(sizes: tuple[int, ...], channels: int = 8, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, channels, *sizes).to(dtype) for _ in range(2)]


@pytest.fixture
def run(emulate) -> Emulated:
    return emulate("local_correlation")


@pytest.mark.parametrize("radius", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sizes", [(6, 9, 7), (7, 10)], ids=str)
def test_every_radius(run: Emulated, sizes: tuple[int, ...], radius: int) -> None:
    Operator(run, radius).check(*make(sizes, batch=1))


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (1, 1), (1, 5, 3), (3, 1, 2), (4, 2, 1), (1, 6), (5, 1), (2, 9, 35), (3, 34, 6), (2, 300)],
    ids=str,
)
def test_odd_sizes_and_sizes_of_one(run: Emulated, sizes: tuple[int, ...]) -> None:
    batch = max(1, 300 // math.prod(sizes))  # so many numbers that their errors can be judged
    Operator(run, 2).check(*make(sizes, batch=batch))


@pytest.mark.parametrize("sizes", [(2, 3, 2), (3, 2)], ids=str)
def test_a_window_larger_than_the_volume(run: Emulated, sizes: tuple[int, ...]) -> None:
    query, key = make(sizes)
    # Radius 3 sees everything already.
    expected = Operator(run, 3).reference(query.double(), key.double())
    for radius in (3, 4, 40, 2**40):
        found, *_ = Operator(run, radius).forward(query, key)
        assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize(("units", "depth"), [(1, 1), (2, 3), (4, 8), (2, 12)])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (5, 6)], ids=str)
def test_units_channels_and_types(
    run: Emulated, sizes: tuple[int, ...], units: int, depth: int, dtype: torch.dtype
) -> None:
    Operator(run, 1, units).check(*make(sizes, units * depth, dtype=dtype))


def test_log_sum_exp_and_the_mean_of_each_unit(run: Emulated) -> None:
    query, key = make((3, 4, 5), 8)
    _, log_sum_exp, mean = Operator(run, 1, 2).forward(query, key)
    for unit in range(2):
        own, other = (tensor[:, 4 * unit : 4 * unit + 4] for tensor in (query.double(), key.double()))
        expected = local_correlation_reference(own, other, radius=1)
        assert torch.allclose(mean[:, 3 * unit : 3 * unit + 3].double(), expected, rtol=0, atol=1e-6)
        padded = torch.nn.functional.pad(other, [1] * 6)
        window = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).flatten(-3)
        inside = torch.nn.functional.pad(torch.ones(3, 4, 5), [1] * 6).unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)
        logits = torch.einsum("bczyx,bczyxn->bzyxn", own, window) / 2
        logits = logits.masked_fill(inside.flatten(-3) == 0, -torch.inf)
        assert torch.allclose(log_sum_exp[:, unit].double(), logits.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("scale", [-30.0, 0.0, 1e-3, 5.0, 60.0])
def test_logits_of_any_size(run: Emulated, scale: float, channels: int) -> None:
    """Far beyond the range of exp, above and below the logit of offset 0."""
    query, key = make((6, 7, 8), channels, batch=4)
    Operator(run, 2, scale=scale).check(query, key)


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_huge_logits_find_the_largest(run: Emulated, scale: float, channels: int) -> None:
    query, key = torch.zeros(2, 1, channels, 5, 6, 7)
    query[:, 0] = 1
    key[:, 0] = torch.randperm(210).view(5, 6, 7)
    operator = Operator(run, 2, scale=scale)
    found, log_sum_exp, _ = operator.forward(query, key)
    assert torch.equal(found, operator.reference(query, key))
    largest = torch.nn.functional.max_pool3d(key[:, :1] * scale, 5, 1, 2)
    torch.testing.assert_close(log_sum_exp, largest)
    # The softmax is one number: nothing is left of <g, offset - mean> but its rounding.
    gradient = torch.randn(1, 3, 5, 6, 7)
    rounding = 4 * torch.finfo(torch.float32).eps * 2 * gradient.abs().sum(1).max() * abs(scale)
    grad_query, grad_key = operator.backward(gradient, query, key)
    assert grad_query.abs().max() <= rounding * key.abs().max()
    assert grad_key.abs().max() <= rounding * 125


def test_only_the_gradients_that_are_needed(run: Emulated) -> None:
    operator = Operator(run, 1)
    query, key = make((3, 4, 5))
    gradient = torch.randn(2, 3, 3, 4, 5)
    both = operator.backward(gradient, query, key)
    for position, need in enumerate("qk"):
        found = operator.backward(gradient, query, key, need)
        assert torch.equal(found[position], both[position])
        assert found[1 - position].numel() == 0


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_reach_those_who_see_them(run: Emulated, value: float, channels: int) -> None:
    operator = Operator(run, 1)
    for poisoned in range(2):
        inputs = make((5, 5, 6), channels, batch=1)
        inputs[poisoned][0, :, 2, 3, 2] = value
        found = [operator.forward(*inputs)[0], *operator.backward(torch.ones(1, 3, 5, 5, 6), *inputs)]
        expected = operator.by_reference(torch.ones(1, 3, 5, 5, 6), *inputs, torch.float32)
        for ours, reference in zip(found, expected, strict=True):
            # Where a weight of exactly 0 stands beside an infinity, the reference may stay finite.
            assert (reference.isfinite() | ~ours.isfinite()).all()
            assert torch.allclose(ours[ours.isfinite()], reference[ours.isfinite()], atol=1e-5)
            assert ours.isfinite().any()
        seen = torch.zeros(1, 1, 5, 5, 6)
        seen[0, 0, 2, 3, 2] = 1
        seen = torch.nn.functional.max_pool3d(seen, 5, 1, 2).bool().expand(1, 3, 5, 5, 6)
        assert found[0][~seen].isfinite().all()


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("processors", [0, 1, 7, 132])
def test_the_cut_into_blocks_changes_no_bit(run: Emulated, processors: int, channels: int) -> None:
    query, key = make((9, 5, 40), 2 * channels, batch=1)
    gradient = torch.randn(1, 3, 9, 5, 40)
    found = [
        [*operator.forward(query, key), *operator.backward(gradient, query, key)]
        for operator in (Operator(run, 2, 2, processors=count) for count in (2, processors))
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.slow
def test_volumes_of_many_tiles(run: Emulated) -> None:
    for sizes, radius, units in itertools.product([(13, 19, 67), (21, 37, 11), (40, 530)], (2, 3), (1, 2)):
        Operator(run, radius, units, processors=20).check(*make(sizes, 8 * units, batch=1))
