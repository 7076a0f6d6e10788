"""PCRL v1: its formulas, the official bugs that it does not repeat, and that any cut of a batch is the same."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtrast.engine.config import load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.runs import build_method
from voxtrast.methods import BackboneConfig, Batch
from voxtrast.methods.parts import rigid
from voxtrast.methods.pcrl import Pcrl, PcrlConfig, PcrlViews, collapsed_contrast
from voxtrast.methods.views import View

SIZES = {2: (8, 8), 3: (4, 8, 8)}
RANKS = 2


def small_pcrl(dimensions: int = 3, norm: str = "instance", **config: Any) -> Pcrl:
    torch.manual_seed(0)
    backbone = BackboneConfig(
        dimensions=dimensions, features=[8, 16], encoder_blocks=[1], decoder_blocks=[1], norm=norm
    )
    view = View(flips=[0.5] * dimensions, quarter_turns=True, clean=True)
    options = {"bank_size": 37, "embedding": 12, "gate_hidden": 6} | config
    return Pcrl(PcrlConfig(**options), backbone, PcrlViews(list(SIZES[dimensions]), view, view))


def small_batch(count: int = 4, dimensions: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    batch: Batch = {}
    for view in ("x1", "x2"):
        batch[view] = torch.randn(count, 1, *SIZES[dimensions], generator=generator)
        batch[f"{view}_clean"] = torch.randn(count, 1, *SIZES[dimensions], generator=generator)
        batch[f"{view}_flips"] = torch.randint(2, (count, dimensions), generator=generator)
        batch[f"{view}_quarter_turns"] = torch.randint(4, (count,), generator=generator)
    return batch


def doubled(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def rows(batch: Batch, chosen: slice) -> Batch:
    return {name: value[chosen].clone() for name, value in batch.items()}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(method: Pcrl) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


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


def unit_rows(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


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
    for leaf, double in zip(leaves, doubles, strict=True):
        assert double.grad is not None
        assert leaf.grad is not None
        assert (leaf.grad.double() - double.grad).norm() <= 1e-6 * double.grad.norm()


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
    for leaf, double in zip(leaves, doubles, strict=True):
        assert double.grad is not None
        assert leaf.grad is not None
        assert (leaf.grad.double() - double.grad).norm() <= 1e-6 * double.grad.norm()


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


def test_every_trained_parameter_gets_a_gradient() -> None:
    method = small_pcrl()
    total(method(small_batch(), 0)).backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None for p in (*method.backbone_twin.parameters(), *method.projector_twin.parameters()))


def trained_step(method: Pcrl, batches: list[Batch], step: int) -> tuple[float, dict[str, Tensor]]:
    method.exchange(batches, step)
    found = 0.0
    for batch in batches:
        loss = total(method(batch, step)) / len(batches)
        loss.backward()
        found += loss.item()
    method.after_step(step)
    return found, gradients(method)


@pytest.mark.parametrize("standardise", [False, True])
def test_parts_of_a_batch_sum_to_the_whole(standardise: bool) -> None:
    one, cut = (small_pcrl(2 + standardise, standardise=standardise).double() for _ in range(2))
    whole = doubled(small_batch(dimensions=2 + standardise))
    for step in range(2):  # the second meets a bank with keys, and the normaliser of the first
        loss, expected = trained_step(one, [{**whole}], step)
        found, of_parts = trained_step(cut, [rows(whole, slice(0, 2)), rows(whole, slice(2, 4))], step)
        assert found == pytest.approx(loss, rel=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(of_parts[name], gradient, rtol=1e-7, atol=1e-11)
    assert one.normalizer.item() == pytest.approx(cut.normalizer.item(), rel=1e-12)
    for name in ("bank.vectors", "standard.mean", "standard.variance"):
        torch.testing.assert_close(cut.state_dict()[name], one.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert cut.bank.place.item() == one.bank.place.item() == 2 * 3 * 4


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    method = small_pcrl(standardise=True).double()
    method.group = dist.group.WORLD
    whole = doubled(small_batch())
    for step in range(2):
        found = trained_step(method, [rows(whole, slice(i, i + 1)) for i in (rank, RANKS + rank)], step)
    torch.save([*found, method.bank.vectors, method.normalizer], Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_ranks_with_two_micro_batches_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    whole, method = doubled(small_batch()), small_pcrl(standardise=True).double()
    for step in range(2):
        loss, expected = trained_step(method, [{**whole}], step)
    losses, of_ranks, banks, normalizers = zip(*(torch.load(tmp_path / f"rank{r}") for r in range(RANKS)), strict=True)
    assert sum(losses) / RANKS == pytest.approx(loss, rel=1e-9)
    for name, gradient in expected.items():
        mean = sum(each[name] for each in of_ranks) / RANKS
        torch.testing.assert_close(mean, gradient, rtol=1e-7, atol=1e-11)
    for bank, normalizer in zip(banks, normalizers, strict=True):
        torch.testing.assert_close(bank, method.bank.vectors, rtol=1e-9, atol=1e-12)
        assert normalizer.item() == pytest.approx(method.normalizer.item(), rel=1e-12)


def test_the_normaliser_is_measured_on_the_first_training_batch_and_is_part_of_the_checkpoint() -> None:
    method = small_pcrl()
    assert method.normalizer.item() == 0
    method(small_batch(), 0)
    measured = method.normalizer.item()
    assert measured > 0
    method.after_step(0)
    method(small_batch(seed=1), 1)
    assert method.normalizer.item() == measured
    assert method.state_dict()["normalizer"].item() == measured


@pytest.mark.parametrize("standardise", [False, True])
def test_the_normaliser_before_training_is_each_batch_s_own_and_is_forgotten(standardise: bool) -> None:
    method = small_pcrl(standardise=standardise).eval()
    batch = small_batch()
    first = method(batch, 0)["contrast"].item()
    assert method.normalizer.item() == 0
    method(small_batch(seed=1), 0)
    assert method(batch, 0)["contrast"].item() == first
    # The same from parts: the mean over all of them.
    parts = [rows(batch, slice(0, 2)), rows(batch, slice(2, 4))]
    method.exchange(parts, 0)
    found = sum(method(part, 0)["contrast"].item() for part in parts) / 2
    assert found == pytest.approx(first, rel=1e-5)
    assert method.normalizer.item() == 0


def test_evaluation_runs_and_changes_no_state() -> None:
    method = small_pcrl(norm="batch", standardise=True)
    for step in range(2):
        method(small_batch(), step)
        method.after_step(step)
    method.eval()
    before = copy.deepcopy(method.state_dict())
    parts = [small_batch(), small_batch(seed=1)]
    method.exchange(parts, 2)
    assert all(torch.isfinite(total(method(part, 2))) for part in parts)
    assert method.bank.push() == 0
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_taken_in_the_middle_continues_to_the_same_next_loss(steps: int) -> None:
    method = small_pcrl()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        total(method(small_batch(seed=step), step)).backward()
        optimizer.step()
        method.after_step(step)
    other = small_pcrl()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    batch = small_batch(seed=steps)
    assert total(other(batch, steps)).item() == total(method(batch, steps)).item()


def test_standardised_features_follow_the_running_statistics_and_stand_still_within_a_step() -> None:
    method = small_pcrl(standardise=True)
    first = method.backbone.encode(method._images(small_batch())[:, 0])[-1].flatten(2).mean(2)
    method(small_batch(), 0)
    torch.testing.assert_close(method.standard.mean, first.mean(0))
    torch.testing.assert_close(method.standard.variance, first.var(0, correction=0))
    method.after_step(0)
    other = small_batch(seed=1)
    seen = method.backbone.encode(method._images(other)[:, 0])[-1].flatten(2).mean(2)
    stayed = copy.deepcopy(method.standard.state_dict())
    method(other, 1)
    assert all(torch.equal(value, stayed[name]) for name, value in method.standard.state_dict().items())
    method.after_step(1)
    torch.testing.assert_close(method.standard.mean, torch.cat((first, seen)).mean(0))
    torch.testing.assert_close(method.standard.variance, torch.cat((first, seen)).var(0, correction=0))


def test_three_kinds_of_keys_go_into_the_bank_after_the_step_and_no_term_meets_them_before() -> None:
    method = small_pcrl()
    before = method.bank.vectors.clone()
    first = method(small_batch(), 0)["contrast"].item()
    assert torch.equal(method.bank.vectors, before)
    method.after_step(0)
    assert method.bank.place.item() == 3 * 4
    pushed = method.bank.vectors[:12]
    torch.testing.assert_close(pushed.norm(dim=1), torch.ones(12))
    assert not torch.equal(pushed[:4], pushed[4:8])
    assert not torch.equal(pushed[4:8], pushed[8:])
    assert torch.equal(method.bank.vectors[12:], before[12:])
    assert method(small_batch(), 0)["contrast"].item() != first


def test_the_bank_begins_uniform_within_the_root_of_three_over_its_channels() -> None:
    vectors = small_pcrl(bank_size=4000).bank.vectors
    limit = math.sqrt(3 / 12)
    assert 0.99 * limit < vectors.abs().max() <= limit
    assert vectors.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_the_mixed_branches_restore_has_the_geometry_of_their_input(dimensions: int) -> None:
    """Official bug: the target there is the crop before the flips and turns that its input has."""
    method = small_pcrl(dimensions)
    batch = small_batch(dimensions=dimensions)
    assert batch["x1_quarter_turns"].any()
    assert batch["x1_flips"].any()
    plain = torch.randn_like(batch["x1"])
    for view in ("x1", "x2"):  # no change of appearance: input and target are the same image
        turned = rigid.apply(plain, batch[f"{view}_flips"], batch[f"{view}_quarter_turns"])
        batch[view] = batch[f"{view}_clean"] = turned
    images = method._images(batch)
    for index in range(4):
        assert torch.equal(images[:, index], plain)


def test_the_conditioned_branch_restores_the_view_as_published_or_its_clean_version() -> None:
    batch = small_batch()
    for target, expected in (("augmented", "x1"), ("clean", "x1_clean")):
        y1, _ = small_pcrl(target=target)._conditioned_targets(batch)
        assert torch.equal(y1, batch[expected])
    with pytest.raises(ValueError, match=r"method\.target: 'noisy' is not one of augmented, clean"):
        small_pcrl(target="noisy")


def test_draws_are_the_same_for_every_part_and_differ_from_step_to_step() -> None:
    method, other = small_pcrl(), small_pcrl()
    other.seed = 1
    draws = [tuple(method._share(step, p) for p in ("mixing", "first alpha", "second alpha")) for step in range(50)]
    assert draws[0] == tuple(small_pcrl()._share(0, p) for p in ("mixing", "first alpha", "second alpha"))
    assert len({value for draw in draws for value in draw}) == 150
    assert all(0.5 <= value <= 1 for draw in draws for value in draw)
    assert other._share(0, "mixing") != draws[0][0]
    assert sorted(method._order(0, 9).tolist()) == list(range(9))


def test_the_twin_s_decoder_is_never_run() -> None:
    method = small_pcrl()
    method.backbone_twin.network.network.decoder = None  # type: ignore[union-attr, assignment]
    assert torch.isfinite(total(method(small_batch(), 0)))


def test_the_twin_follows_with_its_momentum() -> None:
    method = small_pcrl(momentum=0.9)
    before = method.projector_twin.network[0].weight.clone()  # type: ignore[index]
    with torch.no_grad():
        method.projector[0].weight.add_(1)
    method.after_step(0)
    torch.testing.assert_close(method.projector_twin.network[0].weight, before + 0.1)  # type: ignore[index]


def test_a_batch_norm_has_passes_of_their_own_and_refuses_micro_batches() -> None:
    method = small_pcrl(norm="batch")
    images = []
    method.backbone.network.encoder.register_forward_hook(lambda _, inputs, __: images.append(len(inputs[0])))
    method(small_batch(), 0)
    assert images == [4, 4]  # x1, and then the mixed ones
    method.check_training(4, 1)
    with pytest.raises(ValueError, match=r"train\.accumulation.*backbone\.norm=group"):
        method.check_training(4, 2)
    small_pcrl().check_training(4, 2)


def test_the_monitor_measures_the_contrast_against_the_least_that_equal_keys_allow() -> None:
    method = small_pcrl()
    key = unit_rows(1, 12, seed=0)
    method.bank.vectors[:] = key
    across = unit_rows(1, 12, seed=1)
    across = torch.nn.functional.normalize(across - (across @ key.T) * key)
    losses = []
    for cosine in np.linspace(-1, 1, 401):
        q = cosine * key + math.sqrt(1 - cosine**2) * across
        losses.append(method.contrast(q, key, q, key, key, torch.tensor([1.7])).item())
    assert min(losses) == pytest.approx(collapsed_contrast(37), rel=1e-4)
    assert min(losses) >= collapsed_contrast(37) - 1e-5
    loss = method(small_batch(), 0)["contrast"].item()
    assert method.monitors["loss_over_collapse"].item() == pytest.approx(loss / collapsed_contrast(37))


def test_what_does_not_fit_together_is_refused_by_its_name() -> None:
    backbone = BackboneConfig(features=[8, 16])
    clean = View(clean=True)
    turned = View(clean=True, quarter_turns=True)
    wrong: list[tuple[str, PcrlConfig, BackboneConfig, PcrlViews]] = [
        (r"views\.crop.*multiples of 2.*\[8, 8, 8\]", PcrlConfig(), backbone, PcrlViews([7, 8, 8])),
        (r"views\.crop.*equal last two sides, got \[8, 6\]; take \[4, 6, 6\]", PcrlConfig(), backbone,
         PcrlViews([4, 8, 6], turned, clean)),
        (r"views\.x2\.clean", PcrlConfig(), backbone, PcrlViews([4, 8, 8], clean, View())),
        (r"views\.x1\.size", PcrlConfig(), backbone, PcrlViews([4, 8, 8], View(clean=True, size=[8, 8, 8]), clean)),
        (r"views\.crop.*bottleneck", PcrlConfig(), backbone, PcrlViews([2, 2, 2])),
        (r"backbone\.input_channels", PcrlConfig(), BackboneConfig(features=[8, 16], input_channels=3),
         PcrlViews([4, 8, 8])),
        (r"method\.temperature", PcrlConfig(temperature=0), backbone, PcrlViews([4, 8, 8])),
        (r"method\.bank_size", PcrlConfig(bank_size=0), backbone, PcrlViews([4, 8, 8])),
        (r"method\.momentum", PcrlConfig(momentum=1), backbone, PcrlViews([4, 8, 8])),
    ]  # fmt: skip
    for named, config, network, views in wrong:
        with pytest.raises(ValueError, match=named):
            Pcrl(config, network, views)
    with pytest.raises(ValueError, match=r"method\.bank_size.*take at least 39"):
        small_pcrl().check_training(13, 1)


def test_views_of_the_data_plane_are_turned_back_onto_each_other(tiny_store: Path) -> None:
    views = PcrlViews([16, 24, 24], View(flips=[0.5] * 3, quarter_turns=True, clean=True), View(clean=True))
    method = Pcrl(PcrlConfig(), BackboneConfig(features=[8, 16]), views)
    store = Store(tiny_store)
    with ViewPipeline(store, store.cases, method.views, seed=0, global_batch=8, threads=1) as batches:
        [batch] = next(batches)
    assert batch["x1_flips"].any()
    assert batch["x1_quarter_turns"].unique().numel() > 1
    x1, x2, g1, g2 = method._images(batch).unbind(1)
    assert torch.equal(x1, x2)
    assert torch.equal(g1, g2)
    assert torch.equal(x1, g1)
    assert not torch.equal(batch["x1"], batch["x2"])


def test_the_tiny_recipe_trains_a_step_and_gives_away_all_that_it_trained() -> None:
    config = load_config("pcrl-tiny")
    method = build_method(config)
    method.check_training(config.train.global_batch, 1)
    assert method.untrained() == []
    assert set(method.transferable()) <= {name.removeprefix("backbone.network.") for name in method.state_dict()}
    assert any(name.startswith("decoder.") for name in method.transferable())
