import math

import pytest
import torch
from accuracy import assert_accurate_over_draws, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import positional_info_nce, positional_info_nce_reference

TEMPERATURES = [0.2, 0.07, 0.01]


def form(function, positions: Tensor, **options):
    return lambda features, temperature: function(features, positions, temperature=temperature, **options)


def forms(positions: Tensor, **options):
    return [form(f, positions, **options) for f in (positional_info_nce, positional_info_nce_reference)]


def make(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("threshold", [0.001, 0.1, 0.35, 2.0])
def test_value_and_gradients_match_float64(threshold: float, temperature: float) -> None:
    tau = torch.tensor([temperature], requires_grad=True)
    cases = [
        ((3, 5), torch.tensor([0.2, 0.21, 0.9])),
        ((9, 32, 20), torch.rand(16).repeat(2)),  # as JCL: positions shared by all problems
        ((4, 31, 12), torch.rand(4, 31)),
        ((700, 20), torch.rand(700)),
    ]
    for shape, positions in cases:
        pair = forms(positions, threshold=threshold)
        assert_accurate_over_draws(*pair, lambda shape=shape: (make(*shape), tau), torch.tensor(1.0))


@pytest.mark.parametrize(("temperature", "noise"), [(0.2, 0.02), (0.07, 0.3), (0.01, 1.5)])
def test_a_converged_loss_and_its_gradients_match_float64(temperature: float, noise: float) -> None:
    """Two views of each slice and no other positive: the loss goes to zero."""

    def draw():
        return ((torch.eye(48).repeat(2, 1) + noise * torch.randn(96, 48) / 48**0.5).requires_grad_(), tau)

    tau = torch.tensor([temperature], requires_grad=True)
    pair = forms(torch.arange(48.0).repeat(2), threshold=0.5)
    for upstream in (1.0, 1.0 / 96):
        assert_accurate_over_draws(*pair, draw, torch.tensor(upstream))


def test_it_is_the_formula_of_pcl() -> None:
    features, positions = functional.normalize(make(20, 8).detach(), dim=-1), torch.rand(20)
    total, temperature = 0.0, 0.3
    for i in range(20):
        s = [(features[i] @ features[j]).item() / temperature for j in range(20)]
        positives = [j for j in range(20) if j != i and abs(positions[j] - positions[i]) < 0.2]
        if positives:
            lse = math.log(sum(math.exp(s[j]) for j in range(20) if j != i))
            total += lse - sum(s[j] for j in positives) / len(positives)
    found = positional_info_nce(features, positions, threshold=0.2, temperature=temperature, reduction="sum")
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_two_views_and_a_threshold_of_a_half_are_nt_xent() -> None:
    one, other = (functional.normalize(make(24, 8).detach(), dim=-1) for _ in range(2))
    both = torch.cat((one, other))
    logits = (both @ both.T / 0.2).fill_diagonal_(-torch.inf)
    expected = functional.cross_entropy(logits, torch.arange(48).roll(24))
    found = positional_info_nce(both, torch.arange(24.0).repeat(2), threshold=0.5, temperature=0.2)
    torch.testing.assert_close(found, expected)


def test_ties_at_the_threshold_are_decided_by_the_predicate_in_float32() -> None:
    """Multiples of a tenth: a search for position + threshold would say otherwise for some of them."""
    positions = (torch.arange(200) % 40) / 40
    features = make(200, 4).detach()
    for threshold in (0.025, 0.1, 0.3, 0.7):
        ours, plain = (
            f(features, positions, threshold=threshold, reduction="none")
            for f in (positional_info_nce, positional_info_nce_reference)
        )
        torch.testing.assert_close(ours, plain)


def test_the_order_of_the_vectors_does_not_matter() -> None:
    features, positions, order = make(50, 6).detach(), torch.rand(50), torch.randperm(50)
    each = positional_info_nce(features, positions, threshold=0.1, reduction="none")
    again = positional_info_nce(features[order], positions[order], threshold=0.1, reduction="none")
    torch.testing.assert_close(again, each[order])


def test_vectors_without_positives_have_no_loss_and_no_part_in_the_mean() -> None:
    features, positions = make(3, 5, 4), torch.tensor([0.0, 0.01, 0.5, 0.9, math.nan])
    each = positional_info_nce(features, positions, threshold=0.1, reduction="none")
    assert (each[:, 2:] == 0).all()
    torch.testing.assert_close(positional_info_nce(features, positions, threshold=0.1), each[:, :2].mean())
    loss, *found = gradients(
        lambda x: positional_info_nce(x, positions, threshold=0.001), (features,), torch.tensor(1.0)
    )
    assert loss == 0
    assert torch.equal(found[0], torch.zeros_like(features))


def test_weights_choose_whose_loss_counts() -> None:
    features, positions, weights = make(2, 30, 8), torch.rand(30), torch.rand(2, 30)
    weights[:, ::3] = 0
    positions[0] = 9.0  # without positives
    each = positional_info_nce(features, positions, threshold=0.2, reduction="none")
    share = weights.clone()
    share[:, 0] = 0
    found = positional_info_nce(features, positions, threshold=0.2, weights=weights)
    torch.testing.assert_close(found, (share * each).sum() / share.sum())
    pair = forms(positions, threshold=0.2, weights=weights, reduction="none")
    tau = torch.tensor([0.1], requires_grad=True)
    assert_accurate_over_draws(*pair, lambda: (make(2, 30, 8), tau), torch.ones(()).expand(2, 30))


def test_zero_vectors_are_safe_when_normalised() -> None:
    features = make(20, 6)
    with torch.no_grad():
        features[3] = 0
    function = form(positional_info_nce, torch.arange(10.0).repeat(2), threshold=0.5)
    loss, found, _ = gradients(function, (features, torch.tensor([0.1], requires_grad=True)), torch.tensor(1.0))
    assert loss.isfinite()
    assert found.isfinite().all()
    assert not found[3].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_show_in_the_loss(bad: float) -> None:
    features = make(20, 6).detach()
    features[3, 2] = bad
    for normalize in (False, True):
        loss = positional_info_nce(features, torch.arange(10.0).repeat(2), threshold=0.5, normalize=normalize)
        assert not loss.isfinite()


def test_low_precision_is_as_accurate_as_the_plain_form() -> None:
    for dtype in (torch.bfloat16, torch.float16):

        def draw(dtype=dtype):
            return (make(5, 32, 24).detach().to(dtype).requires_grad_(),)

        pair = [lambda x, f=f: f(x, torch.arange(16.0).repeat(2) / 16, threshold=0.2) for f in
                (positional_info_nce, positional_info_nce_reference)]  # fmt: skip
        assert_accurate_over_draws(*pair, draw, torch.tensor(1.0))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for features in (make(900, 12), make(60, 32, 12)):
        positions = torch.rand(features.shape[-2])
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            function = form(positional_info_nce, positions, threshold=0.1)
            results.append(gradients(function, (features, torch.tensor([0.1])), torch.tensor(1.0)))
        for other in results[1:]:
            assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_gradients_of_gradients() -> None:
    positions = torch.rand(7)
    inputs = (torch.randn(7, 3, dtype=torch.float64, requires_grad=True),
              torch.tensor([0.5], dtype=torch.float64, requires_grad=True))  # fmt: skip
    assert gradcheck(form(positional_info_nce, positions, threshold=0.4), inputs)
    assert gradgradcheck(form(positional_info_nce, positions, threshold=0.4), inputs)
    single = (make(20, 6), torch.tensor([0.5]))
    assert_second_order_accurate(*forms(torch.rand(20), threshold=0.3), single)


def test_opcheck() -> None:
    features, scale = make(2, 6, 4), torch.tensor([2.0], requires_grad=True)
    order = torch.tensor([[3, 1, 0, 2, 5, 4]])
    first, last = torch.tensor([[0, 0, 1, 3, 4, 5]]), torch.tensor([[2, 3, 3, 4, 5, 6]])
    for problems in (1, 2):
        ranges = [each.repeat(problems, 1) for each in (order, first, last)]
        arguments = (features, *ranges, scale, problems == 1)
        torch.library.opcheck(torch.ops.voxtrast.positional_info_nce.default, arguments)
        _, lse = torch.ops.voxtrast.positional_info_nce(*arguments)
        upstream = torch.ones(1, 1).expand(2, 6)
        backward = (upstream, features.detach(), *ranges, scale.detach(), lse.detach(), problems == 1)
        torch.library.opcheck(torch.ops.voxtrast.positional_info_nce_backward.default, backward)


def test_compiles_into_one_graph() -> None:
    positions = torch.rand(20)
    function = form(positional_info_nce, positions, threshold=0.2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = (make(3, 20, 8), torch.tensor([0.2], requires_grad=True))
    expected = gradients(function, inputs, torch.tensor(1.0))
    for ours, theirs in zip(gradients(compiled, inputs, torch.tensor(1.0)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"features": torch.zeros(4)}, ValueError, r"features: expected"),
        ({"features": torch.zeros(1, 4), "positions": torch.zeros(1)}, ValueError, r"features: .*at least 2 vectors"),
        ({"features": torch.zeros(3, 4).long()}, TypeError, r"features: .*torch.int64"),
        ({"positions": torch.zeros(4)}, ValueError, r"positions: expected shape \(3,\)"),
        ({"positions": torch.zeros(3).long()}, TypeError, r"positions: .*torch.int64"),
        ({"positions": torch.zeros(3, device="meta")}, ValueError, r"positions: is on meta"),
        ({"threshold": 0.0}, ValueError, r"threshold: expected more than 0"),
        ({"threshold": math.nan}, ValueError, r"threshold: expected more than 0"),
        ({"weights": torch.zeros(4)}, ValueError, r"weights: expected shape \(3,\)"),
        ({"temperature": -1.0}, ValueError, r"temperature: expected a positive finite number"),
        ({"reduction": "all"}, ValueError, r"reduction: .*'all'"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"features": torch.zeros(3, 4), "positions": torch.zeros(3), "threshold": 0.1}
    with pytest.raises(error, match=words):
        positional_info_nce(**{**good, **change})
