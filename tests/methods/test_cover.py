from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.kernels import vector_pyramid_reference
from voxtrast.methods import BackboneConfig, cover
from voxtrast.methods.cover import Cover, CoverConfig, CoverViews, Projection, UnitNorm
from voxtrast.methods.stages import Stage

SMALL = BackboneConfig(features=[8, 16, 16], encoder_blocks=[1], decoder_blocks=[1])


def small_cover(**config: object) -> Cover:
    torch.manual_seed(0)
    return Cover(CoverConfig(units=[2, 1, 1], **config), SMALL, CoverViews(crop=[16, 16, 16]))


def small_batch(count: int = 2, seed: int = 0, shift: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 1, 16, 16, 16)
    mask = (torch.rand(size, generator=generator) > 0.3).float()
    mask[0, :, :8] = 0  # samples with different numbers of valid voxels
    return {
        "fixed": torch.randn(size, generator=generator),
        "moving": torch.randn(size, generator=generator),
        "displacement": shift * torch.randn(count, 3, 16, 16, 16, generator=generator),
        "mask": mask,
    }


def test_parts_of_a_batch_with_their_shares_sum_to_the_whole() -> None:
    method = small_cover().double()
    whole = {key: value.double() for key, value in small_batch(count=3).items()}
    losses = method(whole, 0)
    sum(losses.values()).backward()  # type: ignore[union-attr]
    expected = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    expected_monitors = dict(method.monitors)
    method.zero_grad()

    parts = [{key: value[:1] for key, value in whole.items()}, {key: value[1:] for key, value in whole.items()}]
    counts = [method.counts(part)["valid_voxels"] for part in parts]
    assert counts[0] < counts[1] / 3
    total, monitors = 0.0, {}
    for part, count in zip(parts, counts, strict=True):
        part["share"] = {"valid_voxels": (2 * count / sum(counts))}
        loss = torch.stack(list(method(part, 0).values())).sum() / 2
        loss.backward()
        total += loss.item()
        for name, value in method.monitors.items():
            monitors[name] = monitors.get(name, 0) + value / 2
    assert total == pytest.approx(sum(losses.values()).item(), rel=1e-12)  # type: ignore[union-attr]
    for name in ("displacement_error", "zero_error", "unreachable_fraction"):
        assert monitors[name].item() == pytest.approx(expected_monitors[name].item(), rel=1e-6)
    for name, parameter in method.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_projecting_before_the_warp_is_what_the_paper_writes_behind_it() -> None:
    method = small_cover().double()
    torch.manual_seed(1)
    fixed, moving = torch.randn(2, 2, 1, 16, 16, 16, dtype=torch.float64)
    predicted = method._match(*method._maps(fixed, moving))

    def head_of(project: Projection, norm: UnitNorm) -> Callable[[Tensor], Tensor]:
        return lambda maps: norm.norm(functional.conv3d(maps, project.weight[..., None, None, None], norm.bias))

    _, maps = method.backbone(torch.cat((fixed, moving)))
    heads = [head_of(*pair) for pair in zip(method.projections, method.heads, strict=True)]
    views = [[each[:2] for each in maps], [each[2:] for each in maps]]
    expected = vector_pyramid_reference(*views, radius=2, units=[2, 1, 1], heads=heads)
    assert expected.abs().max() > 1  # points outside among them
    torch.testing.assert_close(predicted, expected, rtol=1e-9, atol=1e-9)


def test_every_trained_parameter_gets_a_gradient() -> None:
    method = small_cover()
    torch.stack(list(method(small_batch(), 0).values())).sum().backward()
    without = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("term", ["vector", "consistency"])
def test_a_stage_without_a_term_does_not_compute_it(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, both, called = small_cover(), small_cover()(small_batch(), 0), []
    for name in ("vector_pyramid", "vector_regression_loss", "warped_cosine_loss"):
        kernel = getattr(cover, name)
        monkeypatch.setattr(cover, name, lambda *a, n=name, k=kernel, **b: called.append(n) or k(*a, **b))
    method.set_stages([Stage(terms={term: 1})], 10)
    losses = method(small_batch(), 0)
    assert set(losses) == {term}
    assert losses[term].item() == pytest.approx(both[term].item(), rel=1e-6)
    needed = {"vector": ["vector_pyramid", "vector_regression_loss"], "consistency": ["warped_cosine_loss"]}
    assert called == needed[term]
    displacement = {"displacement_error", "zero_error", "unreachable_fraction"}
    assert displacement & set(method.monitors) == (displacement if term == "vector" else set())
    assert "valid_fraction" in method.monitors
    method.inspect(small_batch())  # has the displacement in any stage


def test_a_batch_without_valid_voxels_has_no_loss_and_no_gradient() -> None:
    method = small_cover()
    batch = small_batch() | {"mask": torch.zeros(2, 1, 16, 16, 16)}
    total = torch.stack(list(method(batch, 0).values())).sum()
    total.backward()
    assert total.item() == 0
    assert all(torch.isfinite(p.grad).all() and not p.grad.any() for p in method.parameters() if p.grad is not None)


def test_a_transform_beyond_the_pyramids_reach_is_refused() -> None:
    method = small_cover()  # reach 2 * 7 = 14 voxels
    assert method.preflight([small_batch()])["unreachable_fraction"] == 0
    with pytest.raises(ValueError, match=r"reaches \(14 voxels"):
        method.preflight([small_batch(), small_batch(shift=30.0)])
    with pytest.raises(ValueError, match="no voxel"):
        method.preflight([small_batch() | {"mask": torch.zeros(2, 1, 16, 16, 16)}])


def test_the_unreachable_share_is_counted_over_valid_voxels() -> None:
    method = small_cover(max_unreachable=0.5)
    batch = small_batch(count=1, shift=0.0)
    batch["mask"][:] = 1
    batch["mask"][..., 12:] = 0
    batch["displacement"][:, 1, ..., :3] = 14.5  # a quarter of the valid voxels
    batch["displacement"][:, 1, ..., 3:6] = 14.0  # just within reach
    batch["displacement"][:, 1, ..., 12:] = 99.0  # not valid
    assert method.preflight([batch])["unreachable_fraction"] == pytest.approx(0.25)


def test_consistency_is_zero_for_features_that_follow_the_field() -> None:
    batch = small_batch(shift=0.0)
    batch["moving"] = batch["fixed"]
    assert small_cover()(batch, 0)["consistency"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "views", "named"),
    [
        (CoverConfig(units=[1, 1]), CoverViews(crop=[16, 16, 16]), "method.units"),
        (CoverConfig(units=[1, 1, 1]), CoverViews(crop=[16, 18, 16]), "views.crop"),
        (CoverConfig(units=[1, 1, 1]), CoverViews(crop=[16, 16]), "views.crop"),
        (CoverConfig(units=[1, 1, 1], radius=0), CoverViews(crop=[16, 16, 16]), "method.radius"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_named(
    config: CoverConfig, views: CoverViews, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Cover(config, SMALL, views)


def test_two_dimensions() -> None:
    torch.manual_seed(0)
    backbone = BackboneConfig(dimensions=2, features=[8, 16, 16], norm="group", encoder_blocks=[1], decoder_blocks=[1])
    method = Cover(CoverConfig(units=[2, 1, 1]), backbone, CoverViews(crop=[16, 24]))
    batch = {
        "fixed": torch.randn(2, 1, 16, 24),
        "moving": torch.randn(2, 1, 16, 24),
        "displacement": torch.randn(2, 2, 16, 24),
        "mask": torch.ones(2, 1, 16, 24),
    }
    total = torch.stack(list(method(batch, 0).values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert method.inspect(batch)["displacement"].shape == (2, 2, 16, 24)


def test_the_spread_of_the_voxel_features_is_watched_and_a_collapse_warned_of() -> None:
    method = small_cover()
    with torch.no_grad():
        for step in range(12):
            method(small_batch(seed=step), step)
            method.after_step(step)
        assert method.embeddings.window.pushed.item() == 12 * 2 * 8
        assert 0.1 < method.monitors["embedding_std"].item() < 1
        assert 1 < method.monitors["effective_rank"].item() <= 8
        kept = method.embeddings.window.vectors.clone()
        method.eval()
        method(small_batch(), 12)
        method.after_step(12)
        assert torch.equal(method.embeddings.window.vectors, kept)
        assert "embedding_std" not in method.monitors
    found = [line for step in range(100) if (line := method.warning(step, {"monitor/embedding_std": 0.001}))]
    assert len(found) == 1
    assert "optimizer.learning_rate" in found[0]


@pytest.mark.parametrize(
    ("architecture", "features", "crop"),
    [
        ("swin_unetr", [12], [32, 64]),
        ("residual_unet_s", [], [16, 16, 32]),
        ("resnet18_unet", [], [32, 64]),
        pytest.param("swin_unetr", [12], [32, 32, 64], marks=pytest.mark.slow),
        pytest.param("residual_unet_m", [], [32, 32, 64], marks=pytest.mark.slow),
    ],
)
def test_any_backbone_takes_a_step(architecture: str, features: list[int], crop: list[int]) -> None:
    torch.manual_seed(0)
    backbone = BackboneConfig(architecture=architecture, dimensions=len(crop), features=features)
    method = Cover(CoverConfig(units=[1] * backbone.levels), backbone, CoverViews(crop=crop))
    batch = {name: torch.randn(1, 1, *crop) for name in ("fixed", "moving")}
    batch |= {"displacement": torch.randn(1, len(crop), *crop), "mask": torch.ones(1, 1, *crop)}
    optimizer = torch.optim.SGD(method.parameter_groups(0.0), lr=1e-3)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        losses.append(torch.stack(list(method(batch, step).values())).sum())
        losses[-1].backward()
        assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    assert losses[1] < losses[0]


def test_the_watched_voxels_of_a_sample_follow_each_other_however_the_batch_is_cut() -> None:
    whole, parts = small_cover(), small_cover()
    batch = small_batch(count=4)
    with torch.no_grad():
        whole(batch, 0)
        for first in (0, 1):
            parts({key: value[2 * first : 2 * first + 2] for key, value in batch.items()}, 0)
    for method in (whole, parts):
        method.after_step(0)
    torch.testing.assert_close(parts.embeddings.window.vectors[:32], whole.embeddings.window.vectors[:32])
