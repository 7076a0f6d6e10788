"""MAE: what is hidden, what is restored, and that ranks and micro-batches hide the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from voxtrast.methods import BackboneConfig, View
from voxtrast.methods.mae import Mae, MaeConfig, MaeViews
from voxtrast.methods.method import Batch

SOLID = BackboneConfig(dimensions=3, features=[4, 8], encoder_blocks=[1], decoder_blocks=[1])
CROPS = {2: [8, 16], 3: [8, 16, 8]}


def small_mae(dimensions: int = 3, **config: object) -> Mae:
    torch.manual_seed(0)
    backbone = replace(SOLID, dimensions=dimensions)
    return Mae(MaeConfig(**{"block_voxels": 4, **config}), backbone, MaeViews(crop=CROPS[dimensions]))


def small_batch(method: Mae, count: int = 4) -> Batch:
    return {"x": torch.randn(count, 1, *method.views.crop, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_share_is_hidden_in_whole_blocks_of_each_sample_and_other_ones(dimensions: int) -> None:
    method = small_mae(dimensions)
    shown = method.draw(50, step=3)
    assert shown.shape == (50, 1, *CROPS[dimensions])
    assert (shown.flatten(1).float().mean(dim=1) == 0.25).all()
    grid = shown[:, :, ::4, ::4] if dimensions == 2 else shown[:, :, ::4, ::4, ::4]
    whole = grid
    for axis in range(2, grid.ndim):
        whole = whole.repeat_interleave(4, dim=axis)
    assert torch.equal(whole, shown)
    assert len({tuple(each.flatten().tolist()) for each in grid}) > 10
    assert grid.float().mean(dim=0).sub(0.25).abs().max() < 0.25  # every block is hidden now and then
    assert not torch.equal(method.draw(50, step=4), shown)
    assert torch.equal(method.draw(50, step=3), shown)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_loss_is_the_mean_squared_error_of_hidden_voxels_restored_from_the_others(dimensions: int) -> None:
    method = small_mae(dimensions, restorative_weight=3.0)
    batch = small_batch(method)
    shown = method.draw(4, step=0)
    _, maps = method.backbone(torch.where(shown, batch["x"], torch.zeros(())))
    error = (method.restoration_head(maps[-1]) - batch["x"]).square()
    expected = 3 * (error * ~shown).sum() / (~shown).sum()
    assert method(batch, 0)["restorative"].item() == pytest.approx(expected.item(), rel=1e-5)
    error_of_mean = batch["x"][~shown].var(correction=0)
    assert method.monitors["loss_over_mean"].item() == pytest.approx((expected / 3 / error_of_mean).item(), rel=1e-5)


def test_what_is_hidden_is_not_seen() -> None:
    method = small_mae()
    method.eval()
    batch = small_batch(method)
    shown = method.draw(4, step=0)
    changed = {"x": torch.where(shown, batch["x"], batch["x"] + 5)}
    assert torch.equal(method.inspect(batch)["restored"], method.inspect(changed)["restored"])
    assert not torch.equal(method.inspect(batch)["features"], method.inspect(changed)["features"])


def test_an_image_of_any_size_is_inspected_with_the_share_hidden() -> None:
    method = small_mae()
    found = method.inspect({"x": torch.ones(1, 1, 10, 22, 6)})
    assert {name: tuple(each.shape[2:]) for name, each in found.items()} == dict.fromkeys(found, (10, 22, 6))
    assert 0.6 < (found["input"] == 0).float().mean() < 0.9
    assert torch.equal(found["restored"][found["input"] == 1], found["target"][found["input"] == 1])


def test_validation_hides_the_same_blocks_at_every_step() -> None:
    method = small_mae().eval()
    batch = small_batch(method)
    first, later = (method(batch, step)["restorative"].item() for step in (3, 9))
    assert first == later
    assert method.train()(batch, 9)["restorative"].item() != first


def test_micro_batches_hide_what_the_whole_batch_does() -> None:
    method = small_mae()
    whole = small_batch(method)
    parts: list[Batch] = [{"x": whole["x"][:2]}, {"x": whole["x"][2:]}]
    method.exchange([whole], 7)
    method.exchange(parts, 7)
    assert torch.equal(torch.cat([part["shown"] for part in parts]), whole["shown"])
    losses: list[Tensor] = [method(part, 7)["restorative"] for part in parts]
    assert torch.stack(losses).mean().item() == pytest.approx(method(whole, 7)["restorative"].item(), rel=1e-5)


def test_every_trained_parameter_gets_a_gradient() -> None:
    method = small_mae()
    method(small_batch(method), 0)["restorative"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert method.untrained() == []


def test_a_small_image_is_learned_by_heart() -> None:
    method = small_mae()
    smooth = torch.linspace(-1, 1, 16).view(1, 1, 1, 16, 1).expand(2, 1, 8, 16, 8)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for step in range(80):
        loss = method({"x": smooth}, step)["restorative"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert method.monitors["loss_over_mean"] < 0.2


@pytest.mark.parametrize(
    ("config", "view", "message"),
    [
        (
            {"block_voxels": 3},
            View(),
            r"method\.block_voxels: 3 does not divide .*\[8, 16, 8\]; take one of 1, 2, 4, 8",
        ),
        ({"hidden_share": 0.01}, View(), r"method\.hidden_share: 0\.01 of 16 blocks hides 0 of them"),
        ({"hidden_share": 1.0}, View(), r"hides 16 of them; expected a share that hides some and leaves some"),
        ({}, View(size=[8, 9, 8]), r"views\.view\.size: expected 3 multiples of 2"),
    ],
)
def test_settings_that_hide_nothing_or_do_not_divide_are_refused(
    config: dict[str, object], view: View, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mae(MaeConfig(**{"block_voxels": 4, **config}), SOLID, MaeViews(crop=[8, 16, 8], view=view))
