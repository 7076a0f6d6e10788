from dataclasses import replace
from importlib import resources

import pytest
import torch
from test_positional_contrast import formula
from torch import Tensor

from voxtrast.engine.config import load_config
from voxtrast.methods import BackboneConfig, View
from voxtrast.methods.pcl import PCL, PCLConfig, PCLViews
from voxtrast.methods.views import AffineRanges, BoxRanges

FLAT = BackboneConfig(dimensions=2, features=[4, 8], encoder_blocks=[1], decoder_blocks=[1])
SOLID = replace(FLAT, dimensions=3)
CROPS = {2: [8, 12], 3: [4, 8, 8]}


def small_pcl(dimensions: int = 3, norm: str = "instance", **config: object) -> PCL:
    torch.manual_seed(0)
    backbone = replace(SOLID if dimensions == 3 else FLAT, norm=norm)
    return PCL(PCLConfig(**{"channels": 16, **config}), backbone, PCLViews(crop=CROPS[dimensions]))


def small_batch(method: PCL, count: int = 5, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 1, *method.views.crop)
    views = {name: torch.randn(size, generator=generator) for name in ("x1", "x2")}
    return views | {"position": torch.tensor([0.1, 0.15, 0.5, 0.8, 0.82])[:count]}


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_the_contrast_is_the_formula_over_both_views_of_the_batch(dimensions: int, count: int) -> None:
    method = small_pcl(dimensions)
    batch = small_batch(method, count)
    loss = method(batch, 0)["contrast"]
    embeddings = method.embed(torch.cat((batch["x1"], batch["x2"]))).detach().double()
    expected = formula(embeddings, batch["position"], 0.1, 0.1, 0.1 / 0.07)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


def test_the_weight_multiplies_the_loss() -> None:
    method, doubled = small_pcl(), small_pcl(contrast_weight=2.0)
    batch = small_batch(method)
    assert doubled(batch, 0)["contrast"].item() == pytest.approx(2 * method(batch, 0)["contrast"].item(), rel=1e-6)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_trained_parameter_gets_a_gradient_and_the_decoder_none(dimensions: int) -> None:
    method = small_pcl(dimensions)
    method(small_batch(method), 0)["contrast"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    untrained = set(method.untrained())
    assert untrained == {name for name in method.transferable() if name.startswith("decoder.")}
    assert not any(
        parameter.requires_grad for name, parameter in method.named_parameters() if ".decoder." in name
        and ".decoder.encoder." not in name
    )  # fmt: skip


def test_both_views_share_one_forward_and_its_batch_statistics() -> None:
    """The official code runs one forward a view, and each has statistics of its own."""
    method = small_pcl(2, norm="batch")
    seen: list[int] = []
    method.backbone.network.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    batch = small_batch(method)
    loss = method(batch, 0)["contrast"]
    assert seen == [10]
    swapped = method(batch | {"x1": batch["x2"], "x2": batch["x1"]}, 0)["contrast"]
    assert swapped.item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_batch_brings_the_position_and_no_order_of_slices_counts() -> None:
    """The official position is the place in the order of files that were read."""
    method = small_pcl()
    batch = small_batch(method)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = {name: value[order] for name, value in batch.items()}
    assert method(shuffled, 0)["contrast"].item() == pytest.approx(method(batch, 0)["contrast"].item(), rel=1e-5)
    moved = batch | {"position": batch["position"].roll(1)}
    assert method(moved, 0)["contrast"].item() != pytest.approx(method(batch, 0)["contrast"].item(), rel=1e-4)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_evaluation_changes_no_state(norm: str) -> None:
    method = small_pcl(norm=norm).eval()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method(small_batch(method), 0)
    method.after_step(0)
    torch.testing.assert_close(dict(method.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def train(method: PCL, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(method.parameters(), 0.05)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = method(small_batch(method, seed=step), step)["contrast"]
        loss.backward()
        optimizer.step()
        method.after_step(step)
        losses.append(loss.item())
    return losses


def test_a_state_taken_in_the_middle_continues_to_the_same_loss_and_monitors() -> None:
    method, resumed = small_pcl(), small_pcl()
    train(method, range(3))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in method.state_dict().items()})
    assert train(resumed, range(3, 5)) == train(method, range(3, 5))
    assert torch.equal(resumed.embeddings.window.vectors, method.embeddings.window.vectors)
    assert resumed.embeddings.window.pushed.item() == 5 * 5


def test_a_view_in_3d_with_a_place_of_its_own_is_refused() -> None:
    views = PCLViews(crop=[4, 8, 8], view=View(box=BoxRanges(sides=[[4, 8, 8]])))
    with pytest.raises(ValueError, match=r"views.view.box: in 3-D .* method.positives=own"):
        PCL(PCLConfig(), SOLID, views)
    PCL(PCLConfig(positives="own"), SOLID, views)
    PCL(PCLConfig(), FLAT, PCLViews(crop=[8, 8], view=View(box=BoxRanges(sides=[[8, 8]]))))


@pytest.mark.parametrize("size", [[7, 8], [8, 8, 8]])
def test_a_view_of_a_size_of_its_own_that_does_not_fit_is_named(size: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^views\.view\.size: expected 2 multiples of 2"):
        PCL(PCLConfig(), FLAT, PCLViews(crop=[8, 8], view=View(size=size)))
    PCL(PCLConfig(), FLAT, PCLViews(crop=[7, 7], view=View(size=[8, 8])))  # what the network sees is the view


@pytest.mark.parametrize(
    ("backbone", "crop", "message"),
    [
        (SOLID, [8, 8], r"views.crop: expected 3 multiples of 2 .* got \[8, 8\]; take as many numbers"),
        (SOLID, [4, 8, 9], r"views.crop: expected 3 multiples of 2 .* take \[4, 8, 10\]"),
        (SOLID, [2, 2, 2], r"views.crop: .* a single voxel, .* take \[2, 2, 4\] or fewer levels"),
        (replace(FLAT, input_channels=3), [8, 8], "backbone.input_channels: a store has one channel, got 3; take 1"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_named(
    backbone: BackboneConfig, crop: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PCL(PCLConfig(), backbone, PCLViews(crop=crop))


def test_a_single_voxel_at_the_last_level_is_fine_without_instance_norm() -> None:
    method = PCL(PCLConfig(), replace(SOLID, norm="group"), PCLViews(crop=[2, 2, 2]))
    assert method(small_batch(method), 0)["contrast"].isfinite()


def test_both_views_are_drawn_alike_from_one_declaration() -> None:
    view = View(affine=AffineRanges(rotation_degrees=7.0))
    spec = PCL(PCLConfig(), SOLID, PCLViews(crop=[4, 8, 8], view=view)).views
    assert spec.views == {"x1": view, "x2": view}
    assert spec.crop == (4, 8, 8)


def test_the_features_that_a_report_draws_have_the_size_of_the_view() -> None:
    for dimensions in (2, 3):
        method = small_pcl(dimensions)
        found = method.inspect(small_batch(method))["features"]
        assert found.shape == (5, 8, *CROPS[dimensions])


@pytest.mark.parametrize("recipe", ["pcl-tiny", "pcl-3d", "pcl-2d-paper"])
def test_the_recipes_build_a_method_that_takes_their_batch(recipe: str) -> None:
    config = load_config(recipe)
    with torch.device("meta"):
        method = PCL(config.method, config.backbone, config.views)
    method.check_training(config.train.global_batch, 1)
    method.check_volumes([(64, 512, 512)])


RECIPES = sorted(
    file.name.removesuffix(".yaml")
    for file in resources.files("voxtrast.methods.recipes").iterdir()
    if file.name.startswith(("pcl-", "jcl-"))
)


def test_the_published_learning_rate_that_collapses_is_in_no_recipe() -> None:
    """Users report the loss frozen at its collapse value with 0.1; 0.01 is what worked for them."""
    assert {"pcl-tiny", "pcl-3d", "pcl-2d-paper", "jcl-tiny", "jcl-3d", "jcl-2d-paper"} <= set(RECIPES)
    for recipe in RECIPES:
        config = load_config(recipe)
        rates = [config.optimizer.learning_rate, *(stage.learning_rate or 0.0 for stage in config.stages)]
        assert max(rates) <= 0.01, recipe
    paper = load_config("pcl-2d-paper").optimizer
    assert (paper.name, paper.learning_rate) == ("sgd", 0.01)
