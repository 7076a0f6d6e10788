"""PCRLv2: its formulas, the bugs of the official code that it does not repeat, and independence of ranks."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxtrast.methods import BackboneConfig, Batch
from voxtrast.methods.pcrlv2 import Embedding, PcrlV2, PcrlV2Config, PcrlV2Views, local_similarity, similarity
from voxtrast.methods.stages import Stage
from voxtrast.methods.views import View

SIZES = {2: (16, 16), 3: (8, 16, 16)}
LOCAL = {2: (8, 8), 3: (8, 8, 8)}
RANKS = 2
TERMS = ("restoration", "similarity", "mid_restoration", "local_similarity")


def small_pcrlv2(dimensions: int = 3, norm: str = "instance", **config: Any) -> PcrlV2:
    torch.manual_seed(0)
    backbone = BackboneConfig(
        dimensions=dimensions, features=[8, 8, 16], encoder_blocks=[1], decoder_blocks=[1], norm=norm, skips=False
    )
    views = PcrlV2Views(list(SIZES[dimensions]), local=View(size=list(LOCAL[dimensions])), local_count=3)
    return PcrlV2(PcrlV2Config(**config), backbone, views)


def small_batch(count: int = 4, dimensions: int = 3, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    sizes = dict.fromkeys(("x1", "x2", "x1_clean"), SIZES[dimensions])
    sizes |= {f"local{index}": LOCAL[dimensions] for index in (1, 2, 3)}
    return {name: torch.randn(count, 1, *size, generator=generator) for name, size in sizes.items()}


def doubled(batch: Batch) -> Batch:
    return {name: value.double() for name, value in batch.items()}


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(method: PcrlV2) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}


def naive_cosine(one: Tensor, other: Tensor) -> Tensor:
    products = [a * b for a, b in zip(one, other, strict=True)]
    return torch.stack(products).sum() / (sum(a * a for a in one) ** 0.5 * sum(b * b for b in other) ** 0.5)


def naive_similarity(a: Embedding, b: Embedding) -> Tensor:
    count = len(a[0])
    pairs = [
        -(naive_cosine(a[0][i], b[1][i].detach()) + naive_cosine(b[0][i], a[1][i].detach())) / 2 for i in range(count)
    ]
    return torch.stack(pairs).sum() / count


def embeddings(kind: str, count: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Off the origin: cosines of both signs would cancel, and leave the rounding of their mean alone.
    vectors = [0.5 + torch.randn(1 if kind == "equal" else count, 6, generator=generator) for _ in range(2)]
    return [each.expand(count, -1).to(dtype).clone().requires_grad_() for each in vectors]


def assert_equal_gradients(leaves: list[Tensor], doubles: list[Tensor]) -> None:
    for leaf, double in zip(leaves, doubles, strict=True):
        if double.grad is None:
            assert leaf.grad is None
        else:
            assert leaf.grad is not None
            assert (leaf.grad.double() - double.grad).norm() <= 1e-6 * double.grad.norm()


@pytest.mark.parametrize(("kind", "count"), [("random", 5), ("random", 1), ("equal", 4)])
def test_similarity_is_the_formula(kind: str, count: int) -> None:
    leaves = [*embeddings(kind, count, 0, torch.float32), *embeddings(kind, count, 1, torch.float32)]
    doubles = [*embeddings(kind, count, 0, torch.float64), *embeddings(kind, count, 1, torch.float64)]
    loss = similarity((leaves[0], leaves[1]), (leaves[2], leaves[3]))
    expected = naive_similarity((doubles[0], doubles[1]), (doubles[2], doubles[3]))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert leaves[1].grad is None
    assert leaves[3].grad is None
    assert_equal_gradients(leaves, doubles)


@pytest.mark.parametrize("count", [1, 3])
def test_local_similarity_is_the_formula_over_all_pairs_each_at_its_scale(count: int) -> None:
    """The official code draws a scale for each of the 12 pairs, not one for all."""
    scales = [0, 2, 1, 1, 2, 0, 0, 1, 2, 2, 1, 0]  # local view 1 with x1, with x2, local view 2 with x1 ...

    def made(dtype: torch.dtype) -> list[list[list[Tensor]]]:
        """Of the local views, x1 and x2: p and z by scale."""
        return [
            [embeddings("random", rows, 10 * view + scale, dtype) for scale in range(3)]
            for view, rows in enumerate((6 * count, count, count))
        ]

    found, wanted = made(torch.float32), made(torch.float64)
    local, *views = ({scale: (p, z) for scale, (p, z) in enumerate(view)} for view in found)
    loss = local_similarity(local, views, scales)
    loss.backward()
    expected = torch.zeros((), dtype=torch.float64)
    for pair, scale in enumerate(scales):
        rows = slice(pair // 2 * count, (pair // 2 + 1) * count)
        p, z = wanted[0][scale]
        expected = expected + naive_similarity((p[rows], z[rows]), tuple(wanted[1 + pair % 2][scale])) / 12
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    flat, doubles = ([leaf for view in views for scale in view for leaf in scale] for views in (found, wanted))
    assert_equal_gradients(flat, doubles)


def linear_weights(small: int, large: int) -> Tensor:
    """(large, small): linear interpolation between voxel centres, cells aligned, clamped at the borders."""
    weights = torch.zeros(large, small, dtype=torch.float64)
    for index in range(large):
        place = min(max((index + 0.5) * small / large - 0.5, 0.0), small - 1.0)
        lower = min(int(place), small - 1)
        upper = min(lower + 1, small - 1)
        weights[index, lower] += 1 - (place - lower)
        weights[index, upper] += place - lower
    return weights


def naive_losses(method: PcrlV2, batch: Batch, s: int, r: list[int]) -> dict[str, Tensor]:
    """Every view by itself through the network, torch's own batch norms in the heads."""

    def normed(norm: nn.Module, vectors: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            vectors,
            None,
            None,
            norm.weight,
            norm.bias,
            training=True,  # type: ignore[arg-type]
        )

    def maps(image: Tensor) -> list[Tensor]:
        return method.backbone.decode(method.backbone.encode(image))[1:]

    def embed(features: Tensor, scale: int) -> Embedding:
        heads: Any = method.scales[scale]
        z = normed(heads.norm, features.flatten(2).mean(2))
        hidden = torch.relu(normed(heads.predictor.norm, z @ heads.predictor.first.weight.T))
        return hidden @ heads.predictor.second.weight.T + heads.predictor.second.bias, z

    def enlarged(image: Tensor, size: torch.Size) -> Tensor:
        for axis, large in enumerate(size):
            image = (image.movedim(axis + 2, -1) @ linear_weights(image.shape[axis + 2], large).T).movedim(-1, axis + 2)
        return image

    x1, x2, g1 = maps(batch["x1"]), maps(batch["x2"]), batch["x1_clean"]
    local = [torch.cat(level) for level in zip(*(maps(batch[f"local{i}"]) for i in (1, 2, 3)), strict=True)]
    count = len(g1)
    pairs = []
    for pair, scale in enumerate(r):
        p, z = (each.unflatten(0, (3, count))[pair // 2] for each in embed(local[scale], scale))
        pairs.append(naive_similarity((p, z), embed((x1, x2)[pair % 2][scale], scale)))
    return {
        "restoration": (method.restore(x1[-1]) - g1).square().mean(),
        "similarity": naive_similarity(embed(x1[s], s), embed(x2[s], s)),
        "mid_restoration": (enlarged(method.scales[s].image(x1[s]), g1.shape[2:]) - g1).square().mean(),  # type: ignore[operator, union-attr]
        "local_similarity": torch.stack(pairs).sum() / 6,
    }


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("s", [0, 1])
def test_all_losses_are_the_formulas_applied_view_by_view(dimensions: int, s: int) -> None:
    method = small_pcrlv2(dimensions).double()
    step = next(n for n in range(99) if method._drawn_scales(n, "similarity", 1) == [s])
    r = method._drawn_scales(step, "local_similarity", 6)
    assert set(r) == {0, 1}
    batch = doubled(small_batch(3, dimensions))
    losses = method(batch, step)
    total(losses).backward()
    found = gradients(method)
    method.zero_grad()
    expected = naive_losses(method, batch, s, r)
    total(expected).backward()
    for name in TERMS:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-9), name
    for name, gradient in found.items():
        wanted = gradients(method).get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_the_weights_scale_the_terms_and_what_no_term_needs_is_not_computed() -> None:
    method = small_pcrlv2(similarity_weight=0, local_similarity_weight=0, restoration_weight=3)
    plain = small_pcrlv2()(small_batch(), 0)
    batch = {name: small_batch()[name] for name in ("x1", "x1_clean")}  # no other view is looked at
    losses = method(batch, 0)
    assert set(losses) == {"restoration", "mid_restoration"}
    assert losses["restoration"].item() == pytest.approx(3 * plain["restoration"].item(), rel=1e-6)


def test_the_weight_of_the_middle_restoration_falls_as_a_cosine_from_one_to_zero() -> None:
    method = small_pcrlv2()
    terms: dict[str, Any] = {"restoration": 1, "mid_restoration": {"start": 1, "end": 0, "curve": "cosine"}}
    method.set_stages([Stage(terms=terms)], 240)
    for epoch in (0, 60, 120, 239):
        beta = 0.5 * (1 + math.cos(math.pi * epoch / 240))
        assert method.weights(epoch)["mid_restoration"] == pytest.approx(beta, rel=1e-9)
    assert set(method(small_batch(), 120)) == {"restoration", "mid_restoration"}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_every_trained_parameter_gets_a_gradient_in_every_step(dimensions: int) -> None:
    method = small_pcrlv2(dimensions)
    for step in range(3):
        method.zero_grad()
        total(method(small_batch(2, dimensions), step)).backward()
        assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


def test_only_the_image_of_the_drawn_scale_is_computed() -> None:
    method = small_pcrlv2()
    called: list[int] = []
    for index, scale in enumerate(method.scales):
        scale.image.register_forward_hook(lambda *_, i=index: called.append(i))  # type: ignore[operator, union-attr]
    for step in range(20):
        method(small_batch(2), step)
    assert called == [method._drawn_scales(step, "similarity", 1)[0] for step in range(20)]
    assert set(called) == {0, 1}


def test_scales_are_drawn_uniformly_and_alike_by_all_parts() -> None:
    method, other = small_pcrlv2(), small_pcrlv2()
    drawn = torch.tensor([method._drawn_scales(step, "similarity", 12) for step in range(400)])
    assert drawn.tolist() == [other._drawn_scales(step, "similarity", 12) for step in range(400)]
    means = drawn.float().mean(0)  # of each pair
    assert 0.4 < means.min() <= means.max() < 0.6
    assert (drawn != drawn[:, :1]).any(1).float().mean() > 0.95  # pairs of one step differ
    assert drawn.tolist() != [method._drawn_scales(step, "local_similarity", 12) for step in range(400)]


def test_what_is_restored_is_the_clean_view_in_the_geometry_of_the_input() -> None:
    method, batch = small_pcrlv2(), small_batch()
    maps = method.backbone(batch["x1"])[1]
    batch["x1_clean"] = method.restore(maps[-1]).detach()
    batch["x2_clean"] = torch.randn_like(batch["x1"])
    assert method(batch, 0)["restoration"].item() == pytest.approx(0, abs=1e-10)


def test_a_batch_norm_in_the_backbone_has_one_pass_a_view() -> None:
    method = small_pcrlv2(2, norm="batch")
    passes: list[int] = []
    method.backbone.network.encoder.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))  # type: ignore[operator, union-attr]
    method(small_batch(4, 2), 0)
    assert passes == [4, 4, 12]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_evaluation_runs_and_changes_no_state(dimensions: int) -> None:
    method = small_pcrlv2(dimensions, norm="batch")
    method(small_batch(2, dimensions), 0)
    method.after_step(0)
    method.eval()
    before = copy.deepcopy(method.state_dict())
    assert torch.isfinite(total(method(small_batch(1, dimensions, seed=1), 1)))
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_state_dict_taken_in_the_middle_continues_to_the_same_next_loss() -> None:
    method = small_pcrlv2()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        total(method(small_batch(seed=step), step)).backward()
        optimizer.step()
        method.after_step(step)
    other = small_pcrlv2()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    assert total(other(small_batch(seed=2), 2)).item() == total(method(small_batch(seed=2), 2)).item()
    method.eval(), other.eval()
    assert total(other(small_batch(seed=3), 3)).item() == total(method(small_batch(seed=3), 3)).item()


def trained_step(method: PcrlV2, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = total(method(batch, 0))
    loss.backward()
    method.after_step(0)
    return loss.item(), gradients(method)


def on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    method = small_pcrlv2().double()
    method.group = dist.group.WORLD
    method.check_training(4, RANKS)
    part = {name: value.chunk(RANKS)[rank] for name, value in doubled(small_batch()).items()}
    torch.save([*trained_step(method, part), method.state_dict()], Path(folder, f"rank{rank}"))
    dist.destroy_process_group()


@pytest.mark.slow  # starts two processes
def test_two_ranks_sum_to_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(on_one_rank, args=(str(tmp_path),), nprocs=RANKS)
    method = small_pcrlv2().double()
    loss, expected = trained_step(method, doubled(small_batch()))
    losses, of_ranks, states = zip(*(torch.load(tmp_path / f"rank{r}") for r in range(RANKS)), strict=True)
    assert sum(losses) / RANKS == pytest.approx(loss, rel=1e-9)
    for name, gradient in expected.items():
        mean = sum(each[name] for each in of_ranks) / RANKS
        torch.testing.assert_close(mean, gradient, rtol=1e-7, atol=1e-11)
    for name, value in method.state_dict().items():
        for state in states:
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)


def test_micro_batches_and_a_batch_of_one_are_refused_by_name() -> None:
    method = small_pcrlv2()
    method.check_training(2, 1)
    with pytest.raises(ValueError, match=r"train\.accumulation.*take train\.accumulation=1"):
        method.check_training(4, 2)
    with pytest.raises(ValueError, match=r"train\.global_batch.*take 2 or more"):
        method.check_training(1, 1)


def test_a_stage_that_compares_local_views_where_there_are_none_is_refused() -> None:
    backbone = BackboneConfig(features=[8, 16], skips=False)
    method = PcrlV2(PcrlV2Config(local_similarity_weight=0), backbone, PcrlV2Views([8, 8, 8], local_count=0))
    for terms in ({"local_similarity": 1}, {"local_similarity": {"start": 0, "end": 1}}):
        with pytest.raises(ValueError, match=r"views\.local_count: .*stage.* got 0; take 6"):
            method.set_stages([Stage(terms={"restoration": 1}), Stage(terms=terms)], 10)
    method.set_stages([Stage(terms={"restoration": 1}), Stage(terms={"local_similarity": 0, "similarity": 1})], 10)
    assert set(method({name: small_batch()[name][..., :8, :8] for name in ("x1", "x2", "x1_clean")}, 9)) == {
        "similarity"
    }
    with pytest.raises(ValueError, match=r"views\.local_count"):
        PcrlV2(PcrlV2Config(), backbone, PcrlV2Views([8, 8, 8], local_count=0))


def test_the_decoder_without_its_skips_is_what_goes_downstream_and_starts_from_the_seed() -> None:
    """Official bugs: the 2-D code saves the encoder alone, and starts from ImageNet's weights."""
    method = small_pcrlv2(2)
    assert {name.split(".")[0] for name in method.transferable()} == {"encoder", "decoder"}
    assert method.untrained() == []
    torch.manual_seed(1)
    other = PcrlV2(method.config, method.backbone.config, PcrlV2Views([16, 16], local=View(size=[8, 8])))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(method.transferable()[name], other.transferable()[name])
    assert torch.equal(method.transferable()[name], small_pcrlv2(2).transferable()[name])


def test_what_does_not_fit_together_is_refused_by_its_name() -> None:
    backbone = BackboneConfig(features=[8, 16, 16], skips=False)
    local = View(size=[8, 8, 8])
    wrong: list[tuple[str, PcrlV2Config, BackboneConfig, PcrlV2Views]] = [
        (r"backbone\.skips.*set it to false", PcrlV2Config(), BackboneConfig(features=[8, 16, 16]), PcrlV2Views()),
        (r"views\.crop", PcrlV2Config(), backbone, PcrlV2Views([8, 10, 8], local=local)),
        (r"views\.x1\.clean", PcrlV2Config(), backbone, PcrlV2Views([8, 8, 8], x1=View(), local=local)),
        (r"views\.x2\.size", PcrlV2Config(), backbone, PcrlV2Views([8, 8, 8], x2=View(size=[4, 4, 4]), local=local)),
        (r"views\.local\.size.*bottleneck", PcrlV2Config(), backbone,
         PcrlV2Views([8, 8, 8], local=View(size=[4, 4, 4]))),
        (r"views\.local_count", PcrlV2Config(), backbone, PcrlV2Views([8, 8, 8], local=local, local_count=0)),
        (r"method\.predictor_width", PcrlV2Config(predictor_width=0), backbone, PcrlV2Views([8, 8, 8], local=local)),
        (r"backbone\.input_channels", PcrlV2Config(), BackboneConfig(features=[8, 16], input_channels=2, skips=False),
         PcrlV2Views([8, 8, 8], local=local)),
    ]  # fmt: skip
    for named, config, network, views in wrong:
        with pytest.raises(ValueError, match=named):
            PcrlV2(config, network, views)
