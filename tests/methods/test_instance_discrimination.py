import itertools

import pytest
import torch
from torch import Tensor

from voxtrast.methods import Backbone, BackboneConfig
from voxtrast.methods.parts.instance_discrimination import MomentumContrast, barlow_twins_loss, simsiam_loss

SMALL = BackboneConfig(dimensions=2, features=[4, 8, 8], encoder_blocks=[1], decoder_blocks=[1])


# The formulas, transcribed with loops in float64.


def dot(x: Tensor, y: Tensor) -> Tensor:
    return sum((a * b for a, b in zip(x, y, strict=True)), start=torch.zeros((), dtype=torch.float64))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return dot(x, y) / torch.sqrt(dot(x, x) * dot(y, y))


def moco_formula(queries: Tensor, keys: Tensor, bank: Tensor, temperature: float) -> Tensor:
    losses = []
    for query, key in zip(queries, keys, strict=True):
        positive = torch.exp(cosine(query, key.detach()) / temperature)
        negatives = [torch.exp(cosine(query, other) / temperature) for other in bank]
        losses.append(-torch.log(positive / (positive + torch.stack(negatives).sum())))
    return torch.stack(losses).sum() / len(losses)


def simsiam_formula(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    terms = [-(cosine(a, d.detach()) + cosine(b, c.detach())) / 2 for a, b, c, d in zip(p1, p2, z1, z2, strict=True)]
    return torch.stack(terms).sum() / len(terms)


def barlow_formula(z1: Tensor, z2: Tensor, off_diagonal: float) -> Tensor:
    def standardised(z: Tensor) -> Tensor:
        columns = []
        for column in z.T:
            centre = column.sum() / len(column)
            variance = sum((each - centre) ** 2 for each in column) / len(column)
            columns.append((column - centre) / torch.sqrt(variance + 1e-5))
        return torch.stack(columns, dim=1)

    one, two = standardised(z1), standardised(z2)
    total = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.product(range(z1.shape[1]), repeat=2):
        correlation = dot(one[:, i], two[:, j]) / len(z1)
        total = total + ((1 - correlation) ** 2 if i == j else off_diagonal * correlation**2)
    return total


def assert_same_gradient(found: Tensor, expected: Tensor, floor: float = 0.0) -> None:
    assert (found.double() - expected).norm() <= 1e-6 * max(expected.norm().item(), floor)


@pytest.mark.parametrize("case", ["random", "one_sample", "all_equal", "bank_of_the_key"])
def test_moco_is_the_formula(case: str) -> None:
    count = 1 if case == "one_sample" else 3
    torch.manual_seed(0)
    backbone = Backbone(SMALL)
    method = MomentumContrast(backbone, 8, 6, bank=5, temperature=0.2, momentum=0.9)
    x1, x2 = torch.randn(2, count, 1, 16, 16)
    if case == "all_equal":
        x1 = x2 = x1[:1].expand_as(x1)
    if case == "bank_of_the_key":
        method.bank.vectors.copy_(method.key(x2)[:1].expand(5, -1))
    _, query, loss = method(backbone, x1, x2)
    query.retain_grad()
    loss.backward()

    wide = query.detach().double().requires_grad_()
    expected = moco_formula(wide, method.key(x2).double(), method.bank.vectors.double(), 0.2)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradient(query.grad, wide.grad, floor=1.0 if case == "bank_of_the_key" else 0.0)


@pytest.mark.parametrize("case", ["random", "one_sample", "all_equal"])
def test_simsiam_is_the_formula(case: str) -> None:
    embeddings = torch.randn(4, 1 if case == "one_sample" else 3, 6, generator=torch.Generator().manual_seed(0))
    if case == "all_equal":
        embeddings = embeddings[:1, :1].expand(4, 3, 6).clone()
    narrow = [each.clone().requires_grad_() for each in embeddings]
    wide = [each.double().requires_grad_() for each in embeddings]
    loss, expected = simsiam_loss(*narrow), simsiam_formula(*wide)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(narrow[:2], wide[:2], strict=True):
        assert_same_gradient(found.grad, wanted.grad, floor=1.0 if case == "all_equal" else 0.0)
    assert all(each.grad is None for each in narrow[2:])  # the targets


@pytest.mark.parametrize("case", ["random", "same_views", "all_equal"])
def test_barlow_twins_is_the_formula(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 4, generator=generator)
    if case == "same_views":
        z2 = z1.clone()
    if case == "all_equal":
        z1, z2 = z1[:1].expand(5, 4).clone(), z2[:1].expand(5, 4).clone()
    narrow, wide = ([z.clone().to(kind).requires_grad_() for z in (z1, z2)] for kind in (torch.float32, torch.float64))
    loss, expected = barlow_twins_loss(*narrow, 0.005), barlow_formula(*wide, 0.005)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for found, wanted in zip(narrow, wide, strict=True):
        assert_same_gradient(found.grad, wanted.grad, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_barlow_twins_near_its_optimum_is_the_formula_under_autocast(dtype: torch.dtype) -> None:
    """1 - C_ii is small there: a correlation in bfloat16 leaves of it only its rounding."""
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(32, 6, generator=generator)
    z2 = (z1 + 0.02 * torch.randn(32, 6, generator=generator)).to(dtype).float()
    z1 = z1.to(dtype).float()
    narrow = [z.to(dtype).requires_grad_() for z in (z1, z2)]
    wide = [z.double().requires_grad_() for z in (z1, z2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, diagonal = barlow_twins_loss(*narrow, 0.005), barlow_twins_loss(*narrow, 0.0)
    expected, expected_diagonal = barlow_formula(*wide, 0.005), barlow_formula(*wide, 0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected_diagonal < 1e-4
    # float32 has C_ii to 6e-8, and 1 - C_ii is 2e-4 here; what bfloat16 embeddings get as gradient is rounded to 2^-9.
    limit = 2e-3 if dtype == torch.float32 else 8e-3
    assert diagonal.item() == pytest.approx(expected_diagonal.item(), rel=limit)
    found, wanted = torch.autograd.grad(diagonal, narrow), torch.autograd.grad(expected_diagonal, wide)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= limit * other.norm()


def test_simsiam_is_the_formula_under_autocast_in_float32() -> None:
    """Linear layers give bfloat16 there."""
    leaves = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = simsiam_loss(*leaves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(simsiam_formula(*leaves.double()).item(), rel=1e-6)
