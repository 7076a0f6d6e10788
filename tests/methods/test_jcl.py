import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_positional_contrast import formula
from torch import Tensor
from torch.nn import functional

from voxtrast.engine.config import load_config
from voxtrast.engine.data.view_checks import check_spec
from voxtrast.methods import BackboneConfig, View
from voxtrast.methods.jcl import JCL, JCLConfig, JCLViews, consistency, per_place
from voxtrast.methods.parts.monitors import embedding_std
from voxtrast.methods.stages import Stage
from voxtrast.methods.views import AffineRanges, AppearanceRanges, Blur, ElasticRanges, InPaint

FLAT = BackboneConfig(dimensions=2, features=[4, 6, 8], encoder_blocks=[1], decoder_blocks=[1])
SOLID = replace(FLAT, dimensions=3, features=[4, 8])
POSITION = torch.tensor([0.1, 0.15, 0.5, 0.8, 0.82])
SETTINGS = {
    2: (FLAT, [32, 48], 2, 0.25),  # as published: two blocks of the decoder, a quarter of the size
    3: (SOLID, [8, 8, 16], 1, 0.5),
}


def small_jcl(dimensions: int = 3, norm: str = "instance", **config: object) -> JCL:
    torch.manual_seed(0)
    backbone, crop, blocks, scale = SETTINGS[dimensions]
    chosen = JCLConfig(**{"decoder_blocks": blocks, "channels": 16, **config})
    return JCL(chosen, replace(backbone, norm=norm), JCLViews(crop=crop, dominant_scale=scale))


def small_batch(method: JCL, count: int = 5, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    views = {
        name: torch.randn(count, 1, *(view.size or method.views.crop), generator=generator)
        for name, view in method.views.views.items()
    }
    return views | {"position": POSITION[:count]}


def branches(method: JCL, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The maps of the paper's figure, view by view."""
    found = {}
    for kind in "iv":
        found[kind + "a"] = method.backbone.encode(batch[kind + "1"])[-1]
        maps = method.backbone.encode(batch[kind + "2"])
        found[kind + "d"], found[kind + "decoded"] = maps[-1], method.backbone.decode(maps)[-1]
    return found


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_the_three_losses_are_the_formulas_of_the_paper(dimensions: int, count: int) -> None:
    method = small_jcl(dimensions)
    batch = small_batch(method, count)
    losses = method(batch, 0)
    maps = {name: value.detach() for name, value in branches(method, batch).items()}
    auxiliary = method.auxiliary_projector(maps["va"].flatten(2).mean(-1))
    dominant = method.dominant_projector(maps["vdecoded"].flatten(2).mean(-1))
    images = torch.cat((auxiliary, dominant)).double()
    pixels = torch.cat((method.pixel_projector(maps["ia"]), maps["idecoded"])).double().flatten(2)
    scale = 0.1 / 0.07
    expected = {"global": formula(images, POSITION[:count], 0.1, 0.1, scale)}
    places = [formula(pixels[:, :, s], POSITION[:count], 0.1, 0.1, scale) for s in range(pixels.shape[2])]
    expected["dense"] = 0.5 * sum(places) / len(places)
    down = functional.interpolate(
        maps["ia"].double(), scale_factor=0.5**method.config.decoder_blocks, mode="bilinear" if dimensions == 2 else
        "trilinear"
    )  # fmt: skip
    differences = [abs(a - b) for a, b in zip(down.flatten().tolist(), maps["id"].flatten().tolist(), strict=True)]
    expected["consistency"] = torch.tensor(sum(differences) / len(differences))
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(
    "position",
    [POSITION, torch.full((5,), 0.5), torch.arange(5) / 5],
    ids=["random", "all positions equal", "no positive but the own other view"],
)
def test_the_dense_loss_is_the_formula_in_value_and_gradient(position: Tensor) -> None:
    torch.manual_seed(0)
    method = small_jcl()
    maps = torch.randn(10, 12, 2, 3, 2)
    leaf, precise = maps.clone().requires_grad_(), maps.double().requires_grad_()
    method.contrast.loss(per_place(leaf), position).backward()
    total = sum(
        formula(precise[:, :, a, b, c], position, 0.1, 0.1, 0.1 / 0.07)
        for a in range(2) for b in range(3) for c in range(2)
    ) / 12  # fmt: skip
    total.backward()
    found = method.contrast.loss(per_place(maps), position)
    assert found.item() == pytest.approx(total.item(), rel=1e-6)
    assert (leaf.grad - precise.grad).norm() <= 1e-6 * precise.grad.norm()


def test_the_consistency_is_the_formula_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    auxiliary, dominant = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 4, 2)
    leaves = [auxiliary.clone().requires_grad_(), dominant.clone().requires_grad_()]
    precise = [auxiliary.double().requires_grad_(), dominant.double().requires_grad_()]
    consistency(*leaves).backward()
    total = precise[0].new_zeros(())
    for b in range(2):
        for c in range(3):
            for h in range(4):
                for w in range(2):
                    # Linear at a factor of two with cells aligned: the mean of the cells that a place covers.
                    cells = precise[0][b, c, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
                    total = total + (cells.sum() / 4 - precise[1][b, c, h, w]).abs()
    total = total / 48
    total.backward()
    assert consistency(auxiliary, dominant).item() == pytest.approx(total.item(), rel=1e-6)
    for leaf, right in zip(leaves, precise, strict=True):
        assert (leaf.grad - right.grad).norm() <= 1e-6 * right.grad.norm()


def test_a_consistent_encoder_has_no_consistency_loss() -> None:
    flat = torch.full((2, 3, 8, 8), 0.7)
    assert consistency(flat, flat[..., :2, :2]).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_standardised_the_global_loss_is_the_formula_of_maps_relative_to_those_of_earlier_steps(
    dimensions: int,
) -> None:
    method = small_jcl(dimensions, standardise=True)
    expected, past = [], None
    for step in range(2):
        batch = small_batch(method, seed=step)
        maps = {name: value.detach().double() for name, value in branches(method, batch).items()}
        pooled = [maps[name].flatten(2).mean(-1) for name in ("va", "vdecoded")]
        relative = pooled  # in the first step nothing is known
        if past is not None:
            relative = [
                (features - before.mean(0)) / (before.var(0, correction=0) + 1e-8).sqrt()
                for features, before in zip(pooled, past, strict=True)
            ]
        heads = [copy.deepcopy(head)[1:].double() for head in (method.auxiliary_projector, method.dominant_projector)]
        images = torch.cat([head(features) for head, features in zip(heads, relative, strict=True)])
        expected.append(formula(images, POSITION, 0.1, 0.1, 0.1 / 0.07).item())
        assert method(batch, step)["global"].item() == pytest.approx(expected[-1], rel=1e-5)
        method.after_step(step)
        past = pooled
    assert expected[0] != pytest.approx(expected[1], rel=0.01)


def test_standardised_embeddings_behind_instance_norm_do_not_begin_as_one() -> None:
    spread = {}
    for standardise in (False, True):
        method = small_jcl(standardise=standardise)
        for step in range(2):
            method(small_batch(method, seed=step), step)
            method.after_step(step)
        spread[standardise] = embedding_std(method.embeddings.window.vectors[5:10]).item()
    assert spread[True] > 4 * spread[False]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_trained_parameter_gets_a_gradient(dimensions: int) -> None:
    method = small_jcl(dimensions)
    torch.stack(list(method(small_batch(method), 0).values())).sum().backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name


def test_blocks_of_the_decoder_that_are_not_trained_are_named() -> None:
    """The official code saves its blocks 3 and 4 at their initial values as pretrained."""
    features = [4, 4, 4, 8]
    method = JCL(JCLConfig(decoder_blocks=2), replace(FLAT, features=features), JCLViews(crop=[64, 64]))
    initial = {name: tensor.clone() for name, tensor in method.transferable().items()}
    torch.stack(list(method(small_batch(method), 0).values())).sum().backward()
    torch.optim.SGD(method.parameters(), 0.1).step()
    kept = {name for name, tensor in method.transferable().items() if torch.equal(tensor, initial[name])}
    untrained = set(method.untrained())
    assert untrained
    assert untrained <= kept
    assert untrained == {name for name in initial if name.startswith(("decoder.stages.2", "decoder.transpconvs.2"))}


def test_two_forwards_serve_all_four_views_and_only_trained_blocks_run() -> None:
    """The official code runs four, and all blocks of the decoder."""
    features = [4, 4, 4, 8]
    method = JCL(JCLConfig(decoder_blocks=2), replace(FLAT, features=features), JCLViews(crop=[64, 64]))
    encoded, ran = [], []
    method.backbone.network.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(inputs[0].shape))
    for index, stage in enumerate(method.backbone.network.decoder.stages):
        stage.register_forward_hook(lambda *_, index=index: ran.append(index))
    method(small_batch(method), 0)
    assert encoded == [(10, 1, 64, 64), (10, 1, 16, 16)]
    assert ran == [0, 1]


def test_the_image_vector_of_the_dominant_branch_comes_from_the_decoder() -> None:
    """As in the code and in equation 4 of the paper, which another equation contradicts."""
    method = small_jcl()
    batch = small_batch(method)
    gradients = torch.autograd.grad(
        method(batch, 0)["global"], list(method.backbone.network.decoder.transpconvs[0].parameters())
    )
    assert all(gradient.any() for gradient in gradients)


def test_the_denominator_runs_over_both_branches() -> None:
    """As in the code; the paper's runs over the other branch alone."""
    method = small_jcl(loss_scale=1.0)
    features = torch.randn(8, 4)
    found = method.contrast.loss(features.repeat(2, 1), torch.arange(8) / 8)
    unit = functional.normalize(features, dim=1)
    similarity = (unit @ unit.T / 0.1).double()
    both = torch.log(2 * similarity.exp().sum(1) - similarity.diagonal().exp()) - similarity.diagonal()
    other = torch.log(similarity.exp().sum(1)) - similarity.diagonal()
    assert found.item() == pytest.approx(both.mean().item(), rel=1e-6)
    assert found.item() > other.mean().item() + 0.01


@pytest.mark.parametrize(
    ("terms", "needless"), [(["global"], ("i1", "i2")), (["dense"], ("v1", "v2")), (["consistency"], ("v1", "v2"))]
)
def test_what_no_active_term_needs_is_not_computed(terms: list[str], needless: tuple[str, ...]) -> None:
    method = small_jcl()
    batch = small_batch(method)
    whole = method(batch, 0)
    method.set_stages([Stage(terms={name: {"start": 1.0} for name in terms})], 10)
    ran: list[int] = []
    method.backbone.network.decoder.stages[0].register_forward_hook(lambda *_: ran.append(1))
    losses = method({name: value for name, value in batch.items() if name not in needless}, 0)
    assert set(losses) == set(terms)
    assert len(ran) == (terms != ["consistency"])
    own = {"global": 1.0, "dense": 0.5, "consistency": 1.0}
    for name in terms:
        assert losses[name].item() == pytest.approx(whole[name].item() / own[name], rel=1e-5)


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_evaluation_changes_no_state(norm: str) -> None:
    method = small_jcl(norm=norm, standardise=True).eval()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method(small_batch(method), 0)
    method.after_step(0)
    torch.testing.assert_close(dict(method.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def train(method: JCL, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(method.parameters(), 0.01)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = torch.stack(list(method(small_batch(method, seed=step), step).values())).sum()
        loss.backward()
        optimizer.step()
        method.after_step(step)
        losses.append(loss.item())
    return losses


def test_a_state_taken_in_the_middle_continues_to_the_same_loss_and_monitors() -> None:
    method, resumed = small_jcl(standardise=True), small_jcl(standardise=True)
    train(method, range(3))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in method.state_dict().items()})
    assert train(resumed, range(3, 5)) == train(method, range(3, 5))
    assert torch.equal(resumed.embeddings.window.vectors, method.embeddings.window.vectors)
    assert torch.equal(resumed.dense_embeddings.window.vectors, method.dense_embeddings.window.vectors)


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    method = small_jcl(standardise=True)
    method.group = dist.group.WORLD
    torch.save(two_steps(method, slice(2 * rank, 2 * rank + 2)), Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


def two_steps(method: JCL, rows: slice) -> list[dict[str, Tensor]]:
    for step in range(2):
        method.zero_grad()
        batch = {name: value[rows] for name, value in small_batch(method, 4, seed=step).items()}
        losses = method(batch, step)
        torch.stack(list(losses.values())).sum().backward()
        method.after_step(step)
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return [{name: loss.detach() for name, loss in losses.items()}, gradients, dict(method.named_buffers())]


@pytest.mark.slow  # starts two processes
def test_with_instance_norm_two_ranks_are_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=2)
    losses, gradients, buffers = two_steps(small_jcl(standardise=True), slice(0, 4))
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    for place, expected in enumerate((losses, gradients)):
        for name, value in expected.items():
            mean = (ranks[0][place][name] + ranks[1][place][name]) / 2
            assert (mean - value).norm() <= 1e-5 * value.norm(), name
    standards = [name for name in buffers if "projector" in name]
    assert len(standards) == 6
    for rank in ranks:
        for name in standards:
            torch.testing.assert_close(rank[2][name], buffers[name], rtol=1e-5, atol=1e-8, msg=name)


def test_the_small_views_are_drawn_with_their_lengths_scaled() -> None:
    varying = View(
        affine=AffineRanges(translation_voxels=8.0, scale=[0.7, 1.3]),
        elastic=ElasticRanges(spacing_voxels=28.0, magnitude_voxels=[3.2, 13.0]),
        flips=[0.5, 0.5],
    )
    appearance = AppearanceRanges(
        order=["blur", "in_paint"], blur=Blur([1.0, 3.0]), in_paint=InPaint(side_voxels=[[8, 16], [2, 3]])
    )
    views = JCLViews(crop=[64, 32], varying=varying, invariant=View(appearance=appearance))
    spec = JCL(JCLConfig(), replace(FLAT, features=[4, 4, 8]), views).views
    check_spec(spec)
    assert (spec.views["i1"], spec.views["v1"]) == (views.invariant, varying)
    small = spec.views["v2"]
    assert small == View(
        size=[16, 8],
        affine=AffineRanges(translation_voxels=2.0, scale=[0.7, 1.3]),
        elastic=ElasticRanges(spacing_voxels=7.0, magnitude_voxels=[0.8, 3.25]),
        flips=[0.5, 0.5],
    )
    shrunk = spec.views["i2"].appearance
    assert spec.views["i2"].size == [16, 8]
    assert shrunk is not None
    assert shrunk.blur.sigma_voxels == [0.25, 0.75]
    assert shrunk.in_paint.side_voxels == [[2, 4], [1, 1]]
    assert shrunk.in_paint.side == appearance.in_paint.side


@pytest.mark.parametrize(
    ("config", "views", "message"),
    [
        ({}, {"crop": [40, 48]}, r"views.crop: expected 2 multiples of 16 .*4 times smaller.* take \[32, 48\]"),
        ({}, {"crop": [16, 16]}, r"backbone.features: .* a single voxel.* take \[4, 6\], or views.crop=\[32, 32\]"),
        ({}, {"dominant_scale": 0.5}, r"views.dominant_scale: expected 0.25 .* or method.decoder_blocks=1"),
        ({"decoder_blocks": 1}, {}, r"views.dominant_scale: expected 0.5 .* or method.decoder_blocks=2"),
        ({}, {"dominant_scale": 0.3}, r"views.dominant_scale: expected 0.25 .* take 0.25$"),
        ({"decoder_blocks": 0}, {}, "method.decoder_blocks: expected at least 1, got 0"),
        ({"decoder_blocks": 3}, {"dominant_scale": 0.125, "crop": [64, 64]}, "backbone.features: 3 levels have 2"),
        ({}, {"invariant": View(flips=[0.5, 0.5])}, "views.invariant.flips: .* give it to views.varying"),
        ({}, {"varying": View(size=[8, 8])}, r"views.varying.size: follows from views.crop, got \[8, 8\]; leave"),
        ({"threshold": 2.0}, {}, "method.threshold"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_named(config: dict, views: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JCL(JCLConfig(**config), FLAT, JCLViews(**{"crop": [32, 48], **views}))


def test_a_level_that_collapses_is_warned_of_by_name() -> None:
    method = small_jcl()
    numbers = {"monitor/embedding_std": 0.5, "monitor/dense_embedding_std": 0.001}
    found = [line for step in range(100) if (line := method.warning(step, numbers))]
    assert len(found) == 1
    assert found[0].startswith("the dense embeddings have collapsed")
    assert "optimizer.learning_rate" in found[0]


def test_the_features_that_a_report_draws_have_the_size_of_the_view() -> None:
    for dimensions, width in ((2, 4), (3, 4)):
        method = small_jcl(dimensions)
        found = method.inspect(small_batch(method))["features"]
        assert found.shape == (5, width, *method.views.crop)


@pytest.mark.parametrize("recipe", ["jcl-tiny", "jcl-3d", "jcl-2d-paper"])
def test_the_recipes_build_a_method_that_takes_their_batch(recipe: str) -> None:
    config = load_config(recipe)
    with torch.device("meta"):
        method = JCL(config.method, config.backbone, config.views)
    method.check_training(config.train.global_batch, 1)
    method.check_volumes([(256, 512, 512)])


def test_of_the_two_published_learning_rates_the_recipe_has_the_one_of_the_scripts() -> None:
    """The paper's 0.1 is the one that collapses PCL."""
    config = load_config("jcl-2d-paper")
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("sgd", 0.01)


def test_where_ranks_and_nnunet_need_instance_norm_the_image_level_is_standardised() -> None:
    found = [load_config(f"jcl-{recipe}") for recipe in ("tiny", "3d", "2d-paper")]
    assert [(config.backbone.norm, config.method.standardise) for config in found] == [
        ("instance", True), ("instance", True), ("batch", False),
    ]  # fmt: skip
