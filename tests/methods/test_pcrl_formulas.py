"""PCRL v1: both losses against naive transcriptions of their formulas."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from small_pcrl import doubled, gradients, small_batch, small_pcrl, total, unit_rows
from torch import Tensor

from voxtrast.methods import Batch
from voxtrast.methods.pcrl import Pcrl


def naive_nce(a: Tensor, b: Tensor, bank: Tensor, m0: float, temperature: float) -> Tensor:
    """-log(e(b) / (e(b) + c)) - sum_j log(c / (e(n_j) + c)) with Z = n_data m0 and c = K / n_data, eps = 0."""
    data_count, size = 1234, len(bank)
    c = size / data_count
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(a)):
        positive = (a[i] @ b[i] / temperature).exp() / (data_count * m0)
        loss = loss - (positive / (positive + c)).log()
        for j in range(size):
            negative = (a[i] @ bank[j] / temperature).exp() / (data_count * m0)
            loss = loss - (c / (negative + c)).log()
    return loss / len(a)


def assert_gradients_within_rounding(leaves: Sequence[Tensor], doubles: Sequence[Tensor]) -> None:
    for leaf, double in zip(leaves, doubles, strict=True):
        assert double.grad is not None
        assert leaf.grad is not None
        assert (leaf.grad.double() - double.grad).norm() <= 1e-6 * double.grad.norm()


@pytest.mark.parametrize("case", ["random", "one sample", "all equal"])
def test_contrast_is_the_formula(case: str) -> None:
    method = small_pcrl()
    vectors = [unit_rows(1 if case == "one sample" else 5, 12, seed=seed) for seed in range(5)]
    if case == "all equal":
        vectors = [vectors[0][:1].expand(5, -1).contiguous()] * 5
        method.bank.vectors[:] = vectors[0][0]
    leaves = [each.clone().requires_grad_() for each in vectors]
    loss = method.contrast(*leaves, torch.tensor([1.7]))
    loss.backward()

    doubles = [each.double().requires_grad_() for each in vectors]
    q, k, q_mixed, k_mixed, k_mix = doubles
    bank = method.bank.vectors.double()
    expected = sum(
        naive_nce(a, b, bank, float(torch.tensor(1.7)), 0.2) for a, b in ((q, k), (q_mixed, k_mixed), (q_mixed, k_mix))
    )
    expected = expected / 3  # type: ignore[assignment]
    expected.backward()  # type: ignore[union-attr]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # type: ignore[union-attr]
    assert_gradients_within_rounding(leaves, doubles)


def naive_mse(image: Tensor, target: Tensor) -> Tensor:
    pairs = zip(image.flatten(), target.flatten(), strict=True)
    return torch.stack([(one - other) ** 2 for one, other in pairs]).sum() / image.numel()


@pytest.mark.parametrize("count", [1, 3])
def test_restoration_is_the_formula(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 1, 4, 5, generator=generator) for _ in range(8)]
    leaves = [image.clone().requires_grad_() for image in images[:4]]
    y1, y2, g1, g2 = images[4:]
    a1, a2 = 0.7, 0.55
    loss = small_pcrl().restoration(leaves, (y1, y2), (g1, g2), (a1, a2))
    loss.backward()

    doubles = [image.double().requires_grad_() for image in images[:4]]
    y1, y2, g1, g2 = (each.double() for each in (y1, y2, g1, g2))
    targets = (y1, a1 * y1 + (1 - a1) * y2, g1, a2 * g1 + (1 - a2) * g2)
    expected = sum(naive_mse(image, target) for image, target in zip(doubles, targets, strict=True)) / 4
    expected.backward()  # type: ignore[union-attr]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # type: ignore[union-attr]
    assert_gradients_within_rounding(leaves, doubles)


def naive_losses(method: Pcrl, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
    """Both losses, image by image and pass by pass, from the parts of the method alone."""
    axes = method.backbone.config.dimensions

    def without_transform(view: str, suffix: str, sample: int) -> Tensor:
        image = batch[f"{view}{suffix}"][sample, 0].numpy()
        image = np.rot90(image, -int(batch[f"{view}_quarter_turns"][sample]), axes=(axes - 2, axes - 1))
        flipped = [axis for axis in range(axes) if batch[f"{view}_flips"][sample, axis]]
        return torch.from_numpy(np.flip(image, flipped).copy())[None, None]

    def gated(maps: Sequence[Tensor], view: str, sample: int) -> list[Tensor]:
        turns = int(batch[f"{view}_quarter_turns"][sample])
        t = torch.tensor([*batch[f"{view}_flips"][sample].tolist(), *(float(turns == r) for r in range(4))])
        gate = method.gate(t.double())
        return [*maps[:-1], torch.stack([maps[-1][0, c] * gate[c] for c in range(len(gate))])[None]]

    def blend(share: float, one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
        return [share * a + (1 - share) * b for a, b in zip(one, other, strict=True)]

    def drawn(purpose: str) -> float:
        share = torch.rand((), generator=method.generator(step, purpose)).item()
        return max(share, 1 - share)

    def embedded(maps: Sequence[Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        features = maps[-1].flatten(2).mean(2)
        return head((features - centre) / (variance + 1e-8).sqrt() if method.config.standardise else features)

    def decoded(maps: Sequence[Tensor]) -> Tensor:
        return method.restore(method.backbone.decode(maps)[-1])

    count = len(batch["x1"])
    x1, x2, g1, g2 = (
        [without_transform(view, suffix, i) for i in range(count)] for suffix in ("", "_clean") for view in ("x1", "x2")
    )
    order = torch.randperm(count, generator=method.generator(step, "partners")).tolist()
    share, a1, a2 = drawn("mixing"), drawn("first alpha"), drawn("second alpha")
    mixed = [[share * each[i] + (1 - share) * each[order[i]] for i in range(count)] for each in (x1, x2, g1, g2)]
    network, twin = method.backbone, method.backbone_twin.network
    unit = torch.nn.functional.normalize
    qs, ks, mixed_qs, mixed_ks, k_mixes, errors = [], [], [], [], [], []
    with torch.no_grad():
        pooled = torch.cat([network.encode(image)[-1].flatten(2).mean(2) for image in x1])
        centre, variance = pooled.mean(0), (pooled - pooled.mean(0)).square().mean(0)
        raw = [embedded(twin.encode(image), method.projector_twin.network) for image in x2]  # type: ignore[operator]
    for i in range(count):
        f1, mixed_f1 = network.encode(x1[i]), network.encode(mixed[0][i])
        with torch.no_grad():
            f2, mixed_f2 = twin.encode(x2[i]), twin.encode(mixed[1][i])  # type: ignore[operator]
            mixed_ks.append(unit(embedded(mixed_f2, method.projector_twin.network)))
        qs.append(unit(embedded(f1, method.projector)))
        mixed_qs.append(unit(embedded(mixed_f1, method.projector)))
        ks.append(unit(raw[i]))
        k_mixes.append(unit(share * raw[i] + (1 - share) * raw[order[i]]))
        y1, y2 = batch["x1"][i : i + 1], batch["x2"][i : i + 1]
        first, second = gated(f1, "x1", i), gated(f2, "x2", i)
        errors += [
            (decoded(first) - y1).square().mean(),
            (decoded(blend(a1, first, second)) - (a1 * y1 + (1 - a1) * y2)).square().mean(),
            (decoded(mixed_f1) - mixed[2][i]).square().mean(),
            (decoded(blend(a2, mixed_f1, mixed_f2)) - (a2 * mixed[2][i] + (1 - a2) * mixed[3][i])).square().mean(),
        ]
    q, k, mixed_q, mixed_k, k_mix = (torch.cat(each) for each in (qs, ks, mixed_qs, mixed_ks, k_mixes))
    bank = method.bank.vectors
    m0 = torch.cat([torch.cat(((q * k).sum(1, keepdim=True), q @ bank.T), 1)]).div(0.2).exp().mean().item()
    pairs = ((q, k), (mixed_q, mixed_k), (mixed_q, k_mix))
    contrast = torch.stack([naive_nce(a, b, bank, m0, 0.2) for a, b in pairs]).mean()
    return contrast, torch.stack(errors).mean()


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("count", "standardise"), [(1, False), (3, False), (3, True)])
def test_both_losses_are_the_formulas_applied_image_by_image(dimensions: int, count: int, standardise: bool) -> None:
    method = small_pcrl(dimensions, standardise=standardise).double()
    for _ in range(2):  # a twin that lags behind
        with torch.no_grad():
            for parameter in (*method.backbone.parameters(), *method.projector.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = doubled(small_batch(count, dimensions))
    losses = method(batch, 5)
    total(losses).backward()
    found = gradients(method)
    method.zero_grad()
    contrast, restoration = naive_losses(method, batch, 5)
    (contrast + restoration).backward()
    assert losses["contrast"].item() == pytest.approx(contrast.item(), rel=1e-9)
    assert losses["restoration"].item() == pytest.approx(restoration.item(), rel=1e-9)
    for name, gradient in gradients(method).items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-6, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_weights_scale_the_terms_and_a_term_without_weight_is_not_computed() -> None:
    batch = small_batch()
    plain, weighted = small_pcrl()(batch, 0), small_pcrl(contrast_weight=0.5, restoration_weight=3)(batch, 0)
    assert weighted["contrast"].item() == pytest.approx(0.5 * plain["contrast"].item(), rel=1e-6)
    assert weighted["restoration"].item() == pytest.approx(3 * plain["restoration"].item(), rel=1e-6)
    method = small_pcrl(restoration_weight=0)
    method.backbone.decode = None  # type: ignore[assignment]
    assert set(method(batch, 0)) == {"contrast"}
