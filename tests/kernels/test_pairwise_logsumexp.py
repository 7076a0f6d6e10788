import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from accuracy import assert_accurate_over_draws, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from voxtrast.kernels import pairwise_logsumexp, pairwise_logsumexp_reference

# Odd sizes, one query, one key, more than a tile, more than a panel, many small problems.
SIZES = [(5, 7, 3), (1, 40, 20), (40, 1, 20), (200, 333, 64), (3, 33, 40, 17), (300, 260, 128), (2, 3, 8, 9, 5)]


def make(sizes: tuple[int, ...], length: float = 1.0) -> tuple[Tensor, Tensor]:
    """Queries and keys of one length, from sizes (..., N, M, C)."""
    *leading, rows, columns, channels = sizes
    shapes = (*leading, rows, channels), (*leading, columns, channels)
    made = (length * torch.nn.functional.normalize(torch.randn(shape), dim=-1) for shape in shapes)
    query, key = (vectors.requires_grad_() for vectors in made)
    return query, key


def joined(function, **options):
    """Rows and columns as one tensor, so that both get gradients."""

    def call(*inputs: Tensor) -> Tensor:
        *vectors, scale = inputs
        found = function(vectors[0], vectors[-1], scale=scale, **options)
        return torch.cat([each.flatten() for each in (found if isinstance(found, tuple) else (found,))])

    return call


@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.01])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...], columns: bool, temperature: float) -> None:
    scale = torch.tensor([1 / temperature], requires_grad=True)
    forms = [joined(function, columns=columns) for function in (pairwise_logsumexp, pairwise_logsumexp_reference)]
    gradient = torch.randn_like(forms[0](*make(sizes), scale))
    assert_accurate_over_draws(*forms, lambda: (*make(sizes), scale), gradient)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("shape", [(3, 3), (200, 64), (3, 33, 17), (700, 20)], ids=str)
def test_a_set_with_itself_without_its_diagonal(shape: tuple[int, ...], columns: bool, temperature: float) -> None:
    scale = torch.tensor([1 / temperature], requires_grad=True)
    options = {"columns": columns, "exclude_diagonal": True}
    forms = [joined(function, **options) for function in (pairwise_logsumexp, pairwise_logsumexp_reference)]
    gradient = torch.randn_like(forms[0](torch.randn(shape), scale))
    assert_accurate_over_draws(
        *forms, lambda: (torch.nn.functional.normalize(torch.randn(shape), dim=-1).requires_grad_(), scale), gradient
    )


def test_a_set_with_itself_equals_a_copy_of_it() -> None:
    vectors = torch.randn(300, 20)
    one, other = (vectors.clone().requires_grad_() for _ in range(2))
    found = gradients(joined(pairwise_logsumexp, columns=True), (one, torch.tensor([0.7])), torch.ones(600))
    pair = gradients(joined(pairwise_logsumexp, columns=True), (one, other, torch.tensor([0.7])), torch.ones(600))
    torch.testing.assert_close(found[0], pair[0])
    torch.testing.assert_close(found[1], pair[1] + pair[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = (vectors.detach().to(dtype).requires_grad_() for vectors in make((40, 70, 24)))
    scale = torch.tensor([10.0], requires_grad=True)
    found = gradients(joined(pairwise_logsumexp, columns=True), (query, key, scale), torch.ones(110))
    wide = [vectors.detach().float().requires_grad_() for vectors in (query, key)]
    expected = gradients(joined(pairwise_logsumexp, columns=True), (*wide, scale), torch.ones(110))
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found[1:3], expected[1:3], strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(pairwise_logsumexp(query, key, scale=10.0), found[0][:40])


def test_a_negative_scale_and_vectors_of_any_length() -> None:
    for length, factor in ((0.1, -3.0), (30.0, -0.5), (1e-3, 1e6), (0.0, 1.0)):
        scale = torch.tensor([factor], requires_grad=True)
        for exclude in (False, True):
            options = {"columns": True, "exclude_diagonal": exclude}
            forms = [joined(function, **options) for function in (pairwise_logsumexp, pairwise_logsumexp_reference)]

            def draw(length=length, scale=scale):
                return (*make((50, 60, 16), length), scale)

            assert_accurate_over_draws(*forms, draw, torch.randn(110))


def test_the_constant_shift_and_the_running_maximum_meet_without_a_step() -> None:
    query, key = make((64, 64, 32))
    values = [pairwise_logsumexp(query, key, scale=scale) / scale for scale in (41.58, 41.59, 41.6, 42.0, 42.3)]
    for one, other in itertools.pairwise(values):
        assert (one - other).abs().max() < 0.02 * math.log(64) / 41
        assert (other <= one).all()  # falls with the scale, as a power mean does


def test_a_row_without_any_pair_is_minus_infinity_with_zero_gradients() -> None:
    for length in (1.0, 100.0):
        query, key = make((1, 1, 8), length)
        row, *found = gradients(joined(pairwise_logsumexp, exclude_diagonal=True), (query, key, torch.ones(1)),
                                torch.ones(1))  # fmt: skip
        assert row.item() == -math.inf
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_a_single_pair_is_its_similarity() -> None:
    for length in (1.0, 30.0):
        query, key = make((1, 1, 5), length)
        scale = torch.tensor([3.0], requires_grad=True)
        found = gradients(joined(pairwise_logsumexp, columns=True), (query, key, scale), torch.ones(2))
        expected = (3 * (query * key).sum()).expand(2), 6 * key, 6 * query, 2 * (query * key).sum().reshape(1)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4e-7, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_wherever_they_take_part(bad: float) -> None:
    query, key = (vectors.detach() for vectors in make((200, 300, 20)))
    query[7, 3] = bad
    found = pairwise_logsumexp(query, key, scale=5.0, columns=True)
    expected = pairwise_logsumexp_reference(query, key, scale=5.0, columns=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        torch.testing.assert_close(ours[ours.isfinite()], theirs[ours.isfinite()])
    assert not found[0][7].isfinite()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for inputs in ((*make((700, 900, 40)), torch.tensor([3.0])), (*make((50, 20, 30, 8)), torch.tensor([90.0]))):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradient = torch.ones_like(joined(pairwise_logsumexp, columns=True)(*inputs))
            results.append(gradients(joined(pairwise_logsumexp, columns=True), inputs, gradient))
        for other in results[1:]:
            assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


PEAK = """
import pathlib, torch
from voxtrast.kernels import pairwise_logsumexp, pairwise_logsumexp_reference

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def peak_mb(function, count):
    q, k = (torch.randn(count, 16, requires_grad=True) for _ in range(2))
    function(q[:100], k[:100], scale=0.1).sum().backward()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    sum(lse.sum() for lse in function(q, k, scale=0.1, columns=True)).backward()
    return (status("VmHWM") - before) / 1024

print(peak_mb(pairwise_logsumexp, 20000), peak_mb(pairwise_logsumexp_reference, 4000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_memory_grows_with_the_vectors_and_not_with_the_pairs() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, encoding="utf-8", errors="replace", timeout=120
    )
    assert run.returncode == 0, run.stderr
    ours, plain = map(float, run.stdout.split())
    assert ours < 32  # the matrix would take 1600 MB
    assert plain > 64  # and is seen: 4000 x 4000 in the plain form


# All other tests take the best path that the processor has; the long ones try each.
@pytest.mark.parametrize(
    "path", ["portable", *(pytest.param(path, marks=pytest.mark.slow) for path in ("avx512", "avx2"))]
)
def test_every_path_of_the_compiled_code_is_as_accurate(path: str) -> None:
    """A processor without a path takes the next one, which is then measured twice."""
    tests = "test_value_and_gradients_match_float64 or test_a_set_with_itself_without or low_precision or any_length"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests],
        env=os.environ | {"VOXTRAST_CPU": path},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
    )
    assert run.returncode == 0, run.stdout


def test_a_number_as_scale_is_not_rounded_for_float64() -> None:
    query, key = (torch.randn(size, 4, dtype=torch.float64) for size in (5, 7))
    found, expected = (each(query, key, scale=1 / 0.07) for each in (pairwise_logsumexp, pairwise_logsumexp_reference))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_gradcheck_and_gradgradcheck_in_float64() -> None:
    query, key = (vectors.detach().double().requires_grad_() for vectors in make((4, 5, 3)))
    scale = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(joined(pairwise_logsumexp, columns=True), (query, key, scale))
    assert gradgradcheck(joined(pairwise_logsumexp, columns=True), (query, key, scale))


def test_second_order_gradients_match_float64() -> None:
    inputs = (*make((20, 30, 8)), torch.tensor([3.0], requires_grad=True))
    forms = [joined(function, columns=True) for function in (pairwise_logsumexp, pairwise_logsumexp_reference)]
    assert_second_order_accurate(*forms, inputs)


def test_opcheck_with_strided_vectors() -> None:
    query, key = make((2, 6, 9, 4))
    scale = torch.tensor([2.0], requires_grad=True)
    operator = torch.ops.voxtrast.pairwise_logsumexp.default
    torch.library.opcheck(operator, (query, key, scale, False, False, True, False))
    torch.library.opcheck(operator, (query, query, scale, True, True, False, True))
    strided = [vectors.detach().transpose(1, 2).contiguous().transpose(1, 2) for vectors in (query, key)]
    torch.library.opcheck(operator, (*strided, scale.detach(), False, False, True, True))
    assert torch.equal(pairwise_logsumexp(*strided, scale=2.0), pairwise_logsumexp(query, key, scale=2.0))
    row, column = operator(*strided, scale.detach(), False, False, True, False)
    upstream = [torch.randn(1, 1).expand(lse.shape) for lse in (row, column)]
    of_rows, of_columns = (row, upstream[0]), (column, upstream[1])
    for exclude, normalize, need_key in ((False, True, False), (True, False, True)):
        flags = (3, False, exclude, normalize, need_key)
        arguments = (*strided, scale.detach(), *of_rows, *of_columns, torch.randn(2, 6), *flags)
        torch.library.opcheck(torch.ops.voxtrast.pairwise_backward.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph_for_any_size(backend: str) -> None:
    compiled = torch.compile(joined(pairwise_logsumexp, columns=True), fullgraph=True, backend=backend, dynamic=True)
    for sizes in ((20, 30, 8), (50, 33, 8)):
        inputs = (*make(sizes), torch.tensor([3.0], requires_grad=True))
        gradient = torch.randn(sizes[0] + sizes[1])
        found = gradients(compiled, inputs, gradient)
        for ours, expected in zip(
            found, gradients(joined(pairwise_logsumexp, columns=True), inputs, gradient), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(4)}, ValueError, r"query: expected \(..., N, C\)"),
        ({"query": torch.zeros(0, 4)}, ValueError, r"query: is empty"),
        ({"query": torch.zeros(3, 4).int()}, TypeError, r"query: .*torch.int32"),
        ({"key": torch.zeros(5, 3)}, ValueError, r"key: expected shape \(N, 4\)"),
        ({"key": torch.zeros(2, 5, 4)}, ValueError, r"key: expected shape \(N, 4\)"),
        ({"key": torch.zeros(5, 4, device="meta")}, ValueError, r"key: is on meta"),
        ({"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: .*shape \(1,\)"),
        ({"scale": torch.ones(1, device="meta")}, ValueError, r"scale: is on meta"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"query": torch.zeros(3, 4), "key": torch.zeros(5, 4), "scale": 1.0}
    with pytest.raises(error, match=words):
        pairwise_logsumexp(**{**good, **change})


def test_more_than_two_to_the_31_pairs() -> None:
    """Half of the vectors one way and half the other: every log-sum-exp is known."""
    count, scale = 46_400, 5.0
    assert count**2 > 2**31
    vectors = torch.zeros(count, 4)
    vectors[:, 0] = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)
    expected = math.log(count / 2 * (math.exp(scale) + math.exp(-scale)))
    row, column = pairwise_logsumexp(vectors, vectors.clone(), scale=scale, columns=True)
    for found in (row, column):
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0.0)
