"""PCRL v1: the official bugs that it does not repeat, its draws and passes, and what it refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pcrl import small_batch, small_pcrl, total, unit_rows

from voxtrast.engine.config import load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.runs import build_method
from voxtrast.methods import BackboneConfig
from voxtrast.methods.parts import rigid
from voxtrast.methods.pcrl import Pcrl, PcrlConfig, PcrlViews, collapsed_contrast
from voxtrast.methods.views import View


def test_every_trained_parameter_gets_a_gradient() -> None:
    method = small_pcrl()
    total(method(small_batch(), 0)).backward()
    without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad is None for p in (*method.backbone_twin.parameters(), *method.projector_twin.parameters()))


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
