"""What PCL and JCL share: the loss against a transcription of its formula, its refusals, and its ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtrast.methods import BackboneConfig
from voxtrast.methods.jcl import JCL, JCLConfig, JCLViews
from voxtrast.methods.parts.positional_contrast import ContrastConfig, PositionalContrast
from voxtrast.methods.pcl import PCL, PCLConfig, PCLViews

SLICES, SLABS = (16, 16), (8, 16, 16)


def formula(features: Tensor, positions: Tensor, threshold: float, temperature: float, scale: float) -> Tensor:
    """(tau/0.07) 1/2B sum_i [log sum_{a != i} exp(s_ia) - 1/|P(i)| sum_{j in P(i)} s_ij], for (2B, C)."""
    count = len(features)
    twice = [float(position) for position in positions] * 2
    total = features.new_zeros(())
    for i in range(count):
        similarities = {}
        for j in range(count):
            if j != i:
                cosine = (features[i] * features[j]).sum() / (features[i].norm() * features[j].norm())
                similarities[j] = cosine / temperature
        everything = torch.stack(list(similarities.values())).exp().sum().log()
        positives = [s for j, s in similarities.items() if abs(twice[j] - twice[i]) < threshold]
        total = total + everything - torch.stack(positives).sum() / len(positives)
    return scale * total / count


RANDOM = torch.tensor([0.12, 0.55, 0.2, 0.9, 0.5, 0.26])
BATCHES = {
    "random": RANDOM,
    "all positions equal": torch.full((6,), 0.5),
    "no positive but the own other view": torch.arange(6) / 6 + 0.01,
    "a single sample": torch.tensor([0.3]),
}


def assert_as_in_float64(contrast: PositionalContrast, features: Tensor, position: Tensor, expected: Tensor) -> None:
    """Value and gradient to 1e-6 of their size in float32."""
    leaf = features.float().detach().requires_grad_()
    loss = contrast.loss(leaf, contrast.positions(position))
    loss.backward()
    (gradient,) = torch.autograd.grad(expected, features)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert leaf.grad is not None
    assert (leaf.grad - gradient).norm() <= 1e-6 * max(gradient.norm().item(), 1.0)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_formula_of_the_paper(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    position = BATCHES[name]
    features = torch.randn(2 * len(position), 24).double().requires_grad_()
    contrast = PositionalContrast(ContrastConfig(threshold=0.1, temperature=temperature), SLICES)
    expected = formula(features, position, 0.1, temperature, temperature / 0.07)
    assert_as_in_float64(contrast, features, position, expected)


def test_with_own_positives_the_loss_is_the_formula_of_simclr() -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 24).double().requires_grad_()
    total = features.new_zeros(())
    for i in range(12):
        cosines = torch.nn.functional.cosine_similarity(features[i][None], features) / 0.1
        others = torch.cat((cosines[:i], cosines[i + 1 :]))
        total = total - torch.log(cosines[(i + 6) % 12].exp() / others.exp().sum())
    contrast = PositionalContrast(ContrastConfig(positives="own", loss_scale=1.0), SLICES)
    assert_as_in_float64(contrast, features, torch.full((6,), 0.5), total / 12)


def test_with_partitions_the_positives_are_those_of_the_same_quarter() -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 24).double().requires_grad_()
    position = torch.tensor([0.0, 0.24, 0.26, 0.49, 0.76, 1.0])
    contrast = PositionalContrast(ContrastConfig(positives="partition"), SLICES)
    assert contrast.positions(position).tolist() == [0, 0, 1, 1, 3, 3]
    expected = formula(features, torch.tensor([0.0, 0, 1, 1, 3, 3]), 0.5, 0.1, 0.1 / 0.07)
    assert_as_in_float64(contrast, features, position, expected)


def test_the_positives_of_an_item_are_counted() -> None:
    contrast = PositionalContrast(ContrastConfig(threshold=0.1), SLICES)
    # 0.12 and 0.2, 0.2 and 0.26, 0.55 and 0.5 are near; each near slice counts twice, and the own other view once.
    assert contrast.positives(RANDOM).item() == pytest.approx((6 * 1 + 2 * (1 + 2 + 1 + 1 + 1 + 0)) / 6)
    assert contrast.positives(torch.zeros(4)).item() == 7


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"positives": "slices"}, "method.positives: 'slices' is not one of position, own, partition"),
        ({"negatives": "all"}, "method.negatives: 'all' is not one of global, local"),
        ({"threshold": 1.0}, "method.threshold: expected more than 0 and less than 1, got 1.0; .*take 0.1"),
        ({"threshold": 0.0}, "method.threshold"),
        ({"temperature": 0.0}, "method.temperature: expected a finite number, more than 0, got 0.0"),
        ({"loss_scale": -1.0}, "method.loss_scale"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PositionalContrast(ContrastConfig(**changed), SLICES)


def test_micro_batches_and_batches_without_negatives_are_refused() -> None:
    contrast = PositionalContrast(ContrastConfig(), SLICES)
    contrast.check_training(2, 1, None)
    with pytest.raises(ValueError, match=r"train.accumulation: 2 micro-batches .* take train.accumulation=1"):
        contrast.check_training(8, 2, None)
    with pytest.raises(ValueError, match=r"train.global_batch: of 1 over 1 rank\(s\) .* take train.global_batch=2"):
        contrast.check_training(1, 1, None)


@pytest.mark.parametrize("positives", ["position", "partition"])
def test_volumes_whose_images_all_have_one_position_are_refused(positives: str) -> None:
    slices = PositionalContrast(ContrastConfig(positives=positives), SLICES)
    slices.check_volumes([(1, 64, 64), (2, 64, 64)])
    with pytest.raises(ValueError, match=r"method.positives: .* single slice; take method.positives=own"):
        slices.check_volumes([(1, 64, 64), (1, 80, 80)])
    slabs = PositionalContrast(ContrastConfig(positives=positives), SLABS)
    slabs.check_volumes([(8, 64, 64), (20, 64, 64)])
    with pytest.raises(ValueError, match=r"method.positives: .* crop is 8 deep, .* method.positives=own"):
        slabs.check_volumes([(8, 64, 64), (5, 64, 64)])
    PositionalContrast(ContrastConfig(positives="own"), SLABS).check_volumes([(8, 64, 64)])


def test_a_threshold_that_makes_everything_a_positive_is_refused() -> None:
    slabs = PositionalContrast(ContrastConfig(threshold=0.35), SLABS)
    slabs.check_volumes([(8, 64, 64), (16, 64, 64)])
    with pytest.raises(ValueError, match=r"method.threshold: of 0.35 .* 0.2 apart .*take method.threshold=0.05"):
        slabs.check_volumes([(8, 64, 64), (10, 64, 64)])


RANKS, SAMPLES = 2, 6
SMALL = BackboneConfig(features=[4, 8], encoder_blocks=[1], decoder_blocks=[1])


def built(name: str, negatives: str = "global", positives: str = "position") -> PCL | JCL:
    torch.manual_seed(0)
    chosen = {"negatives": negatives, "positives": positives, "channels": 8}
    if name == "pcl":
        method = PCL(PCLConfig(**chosen), SMALL, PCLViews(crop=[4, 8, 8]))
        with (
            torch.no_grad()
        ):  # at first all embeddings are nearly equal, and gradients are differences of large numbers
            method.projector[-1].bias -= method.embed(drawn(method)["x1"]).mean(0)
        return method
    return JCL(JCLConfig(**chosen, decoder_blocks=1), SMALL, JCLViews(crop=[4, 8, 8], dominant_scale=0.5))


def drawn(method: PCL | JCL) -> dict[str, Tensor]:
    torch.manual_seed(1)
    sizes = {name: view.size or method.views.crop for name, view in method.views.views.items()}
    return {name: torch.randn(SAMPLES, 1, *size) for name, size in sizes.items()} | {"position": RANDOM}


def outcome(method: PCL | JCL, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = torch.stack(list(method(batch, 0).values())).sum()
    total.backward()
    gradients = [parameter.grad.flatten() for parameter in method.parameters() if parameter.grad is not None]
    monitors = {name: value.detach().double() for name, value in method.monitors.items()}
    method.after_step(0)
    return total.detach(), torch.cat(gradients), monitors | {"window": method.embeddings.window.vectors[:SAMPLES]}


CASES = [("pcl", "global", "position"), ("pcl", "global", "own"), ("jcl", "global", "position")]


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = []
    for case in [*CASES, ("pcl", "local", "own")]:
        method = built(*case)
        method.group = dist.group.WORLD
        own = {name: value.chunk(RANKS)[rank] for name, value in drawn(method).items()}
        found.append(outcome(method, own))
        method.check_training(2 * RANKS, RANKS)
        with pytest.raises(ValueError, match=r"train.accumulation: 2 micro-batches"):
            method.check_training(8 * RANKS, 2 * RANKS)
    torch.save(found, Path(folder, f"rank{rank}"))
    with pytest.raises(ValueError, match=r"method.negatives=local a sample has no negatives; .*global_batch=4"):
        built("pcl", "local").contrast.check_training(2, RANKS, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process_in_loss_gradients_and_monitors(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    everywhere = list(zip(*(torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)), strict=True))
    for case, ranks in zip(CASES, everywhere, strict=False):
        method = built(*case)
        loss, gradients, monitors = outcome(method, drawn(method))
        torch.testing.assert_close(sum(each[0] for each in ranks) / RANKS, loss, rtol=1e-5, atol=1e-6)
        difference = sum(each[1] for each in ranks) / RANKS - gradients
        assert difference.norm() < 1e-5 * gradients.norm()
        for name, value in monitors.items():
            mean = sum(each[2][name] for each in ranks) / RANKS
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6)
    # Local negatives: each rank for itself, as published.
    for rank, (loss, _, _) in enumerate(everywhere[-1]):
        method = built("pcl", "local", "own")
        alone = {name: value.chunk(RANKS)[rank] for name, value in drawn(method).items()}
        torch.testing.assert_close(outcome(method, alone)[0], loss, rtol=1e-5, atol=1e-6)


def test_the_loss_of_identical_embeddings_grows_with_the_ranks_that_share_the_batch() -> None:
    contrast = PositionalContrast(ContrastConfig(loss_scale=1.0), SLICES)
    for samples in (2, 5, 32):
        assert contrast.collapsed(samples) == pytest.approx(math.log(2 * samples - 1))
        loss = contrast.loss(torch.ones(2 * samples, 4), torch.rand(samples))
        assert loss.item() == pytest.approx(math.log(2 * samples - 1), rel=1e-6)


def test_crops_that_show_a_small_part_of_a_plane_are_advised_against() -> None:
    slabs = PositionalContrast(ContrastConfig(), SLABS)
    assert slabs.advice([(40, 32, 30), (40, 500, 500), (9, 16, 16)]) is None  # the median has 32 x 30
    said = slabs.advice([(149, 149, 50)] * 3)
    assert said is not None
    assert said.startswith("views.crop: 16 x 16 is 3% of a plane of these volumes (median 149 x 50)")
    assert PositionalContrast(ContrastConfig(positives="own"), SLABS).advice([(149, 149, 50)]) is None
