"""DiRA: its terms and stages, the official bugs that it does not repeat, and what it refuses."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_dira import DISCRIMINATIONS, FORMS, STAGES, Loop, small_batch, small_dira, total_of
from torch import nn

from voxtrast.engine.config import load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.runs import build_method
from voxtrast.methods import View
from voxtrast.methods.dira import RESTORATIONS, Dira, DiraViews
from voxtrast.methods.stages import Stage


@pytest.mark.parametrize("kind", ["mse", "mae"])
@pytest.mark.parametrize("case", ["random", "one_voxel_off"])
def test_restoration_is_the_formula(kind: str, case: str) -> None:
    target = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    restored = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    if case == "one_voxel_off":
        restored = target + torch.nn.functional.one_hot(torch.tensor(5), 24).view(2, 1, 3, 4)
    narrow, wide = (restored.to(kind).clone().requires_grad_() for kind in (torch.float32, torch.float64))
    loss = RESTORATIONS[kind](narrow, target)
    errors = [
        (x - y) ** 2 if kind == "mse" else (x - y).abs()
        for x, y in zip(wide.flatten(), target.double().flatten(), strict=True)
    ]
    expected = torch.stack(errors).sum() / len(errors)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (narrow.grad.double() - wide.grad).norm() <= 1e-6 * wide.grad.norm()


def test_the_terms_are_weighted_and_summed_as_in_the_formula() -> None:
    method = small_dira(discriminative_weight=2.0, restorative_weight=30.0, adversarial_weight=0.25)
    batch = small_batch()
    losses = method(batch, 0)
    assert list(losses) == ["discriminative", "restorative", "adversarial"]
    target, restored = method.adversary_inputs(batch)
    assert torch.equal(target, (batch["x1_clean"] + 1) / 2)  # the range -1 to 1
    assert not restored.requires_grad
    _, _, discriminative = method.discrimination(method.backbone, batch["x1"], batch["x2"])
    assert losses["discriminative"].item() == pytest.approx(2 * discriminative.item(), rel=1e-6)
    assert losses["restorative"].item() == pytest.approx(30 * (restored - target).square().mean().item(), rel=1e-6)
    assert losses["adversarial"].item() == pytest.approx(
        0.25 * method.adversary.generator_loss(restored).item(), rel=1e-6
    )


@pytest.mark.parametrize("target", ["aligned", "unflipped"])
def test_the_target_shares_the_geometry_of_the_input(target: str, tiny_store: Path) -> None:
    """There, the input may be flipped and the target is not, as `unflipped` has it."""
    views = DiraViews(crop=[16, 16], x1=View(flips=[0.5, 0.5]), x2=View())
    method = small_dira(views=views, target=target)
    store = Store(tiny_store)
    with ViewPipeline(store, store.cases, method.views, seed=0, global_batch=8, prefetch=0) as pipeline:
        (batch,) = next(iter(pipeline))
    assert len({tuple(flips) for flips in batch["x1_flips"].tolist()}) == 4
    method(batch, 0)
    shown, _ = method.adversary_inputs(batch)
    same_geometry = batch["x1"] if target == "aligned" else batch["x2"]
    torch.testing.assert_close(shown, (same_geometry + 1) / 2, rtol=0, atol=1e-6)
    assert not torch.allclose(batch["x1"], batch["x2"])


@pytest.mark.parametrize("discriminative", DISCRIMINATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_one_process_trains_all_terms(discriminative: str, form: str) -> None:
    """There, anything but several GPUs is refused."""
    method = small_dira(discriminative=discriminative, adversary=form)
    weights = [p.detach().clone() for p in method.adversary.parameters()]
    before = copy.deepcopy(dict(method.named_parameters()))
    loop = Loop(method)
    for step in range(2):
        assert all(math.isfinite(loss) for loss in loop.step(step).values())
    assert not any(torch.equal(p, before[name]) for name, p in method.named_parameters() if p.requires_grad)
    moved = [not torch.equal(old, new) for old, new in zip(weights, method.adversary.parameters(), strict=True)]
    assert all(moved[:-1])


def test_the_twin_s_decoder_is_not_run() -> None:
    method = small_dira()
    ran: list[str] = []
    for name, module in method.named_modules():
        if "decoder" in name and not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    method(small_batch(), 0)
    assert ran
    assert not any("key_backbone" in name for name in ran)


def test_each_stage_computes_its_own_terms_and_no_decoder_before_it_restores() -> None:
    method = small_dira()
    method.set_stages(STAGES, 3)
    ran: list[int] = []
    method.backbone.network.decoder.transpconvs[0].register_forward_hook(lambda *_: ran.append(1))
    found = [list(method(small_batch(), step)) for step in range(3)]
    assert found == [list(stage.terms) for stage in STAGES]
    assert len(ran) == 2
    assert method.adversary is not None


@pytest.mark.parametrize(
    ("stages", "trains_decoder", "has_adversary"),
    [(STAGES[:1], False, False), (STAGES[:2], True, False), (STAGES, True, True), ([], True, True)],
)
def test_what_no_stage_uses_is_not_there_to_be_trained(
    stages: list[Stage], trains_decoder: bool, has_adversary: bool
) -> None:
    method = small_dira()
    method.set_stages(stages, 30)
    assert (method.adversary is not None) == has_adversary
    untrained = method.untrained()
    assert all("decoder" in name for name in untrained)
    assert bool(untrained) != trains_decoder


def test_the_critic_is_no_part_of_the_method_s_parameters_and_state() -> None:
    method = small_dira()
    own = {id(parameter) for parameter in method.adversary.parameters()}
    assert own
    assert not any(id(parameter) in own for parameter in method.parameters())
    assert not any("critic" in name for name in method.state_dict())
    twin = copy.deepcopy(method)
    assert twin.adversary is not method.adversary
    assert twin.adversary is twin._unregistered[0]


def test_the_adversary_switched_off_is_bit_for_bit_the_run_without_it() -> None:
    without, off, on = small_dira(adversarial_weight=0.0), small_dira(), small_dira()
    off.set_stages(STAGES[1:2], 3)
    runs = [[Loop(method).step(step) for step in range(3)] for method in (without, off, on)]
    assert without.adversary is None
    assert off.adversary is None
    assert runs[0] == runs[1] != [{n: v for n, v in step.items() if "advers" not in n} for step in runs[2]]
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), off.parameters(), strict=True))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("discriminative", DISCRIMINATIONS)
def test_every_trained_parameter_gets_a_gradient(dimensions: int, discriminative: str) -> None:
    method = small_dira(dimensions, discriminative=discriminative)
    batch = small_batch(dimensions=dimensions)
    total_of(method(batch, 0)).backward()
    total_of(method.adversary(*method.adversary_inputs(batch))).backward()
    named = itertools.chain(method.named_parameters(), method.adversary.named_parameters())
    assert not [name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert method.inspect(batch)["restored"].shape == batch["x1"].shape


@pytest.mark.parametrize(
    ("config", "crop", "named"),
    [
        ({"discriminative": "byol"}, [16, 16], "method.discriminative"),
        ({"adversary": "hinge"}, [16, 16], "method.adversary"),
        ({"restoration": "ssim"}, [16, 16], "method.restoration"),
        ({"target": "unflipped"}, [16, 16], "method.target"),
        ({"output": "tanh"}, [16, 16], "method.output"),
        ({"temperature": 0.0}, [16, 16], "method.temperature"),
        ({"momentum": 1.0}, [16, 16], "method.momentum"),
        ({"bank": 0}, [16, 16], "method.bank"),
        ({"gradient_penalty": -1.0}, [16, 16], "method.gradient_penalty"),
        ({"intensity_range": [1.0, -1.0]}, [16, 16], "method.intensity_range"),
        ({}, [16, 18], "views.crop"),
        ({}, [16, 16, 16], "views.crop"),
        ({}, [4, 4], "one voxel"),
        ({}, [8, 8], "single patch"),
    ],
)
def test_a_configuration_that_does_not_fit_together_is_named(
    config: dict[str, Any], crop: list[int], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        small_dira(views=DiraViews(crop=crop), **config)


def test_views_of_two_sizes_are_moco_s_alone() -> None:
    views = DiraViews(crop=[16, 16], x2=View(size=[24, 16]))
    small_dira(views=views)
    with pytest.raises(ValueError, match=r"views\.x2\.size"):
        small_dira(views=views, discriminative="simsiam")


def test_intensities_that_a_sigmoid_cannot_restore_are_refused_before_the_first_step() -> None:
    batch = {"x1_clean": torch.linspace(-1.5, 1.5, 256).view(1, 1, 16, 16)}
    with pytest.raises(ValueError, match=r"method\.intensity_range: 33"):
        small_dira(output="sigmoid").preflight([batch])
    assert small_dira(output="sigmoid", intensity_range=[-2.0, 2.0]).preflight([batch]) == {"clipped_fraction": 0.0}
    assert small_dira(output="linear").preflight([batch]) == {}


@pytest.mark.parametrize("recipe", ["dira-tiny", "dira-3d", "dira-2d-paper"])
def test_the_recipes_add_one_term_after_the_other(recipe: str) -> None:
    config = load_config(recipe)
    method = build_method(config)
    assert isinstance(method, Dira)
    assert isinstance(method.adversary, nn.Module)
    own = {"discriminative": 1.0, "restorative": config.method.restorative_weight}
    own["adversarial"] = config.method.adversarial_weight
    starts = [moment.first for moment in method.schedule.moments]
    assert [method.weights(start) for start in starts] == [
        dict(itertools.islice(own.items(), terms)) for terms in (1, 2, 3)
    ]
    for stage in config.stages:
        method.check_training(stage.global_batch or config.train.global_batch, 8)
