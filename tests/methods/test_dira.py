import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from voxtrast.engine.config import load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.runs import build_method
from voxtrast.methods import BackboneConfig, View
from voxtrast.methods.dira import RESTORATIONS, Dira, DiraConfig, DiraViews
from voxtrast.methods.parts.instance_discrimination import MomentumContrast, barlow_twins_loss
from voxtrast.methods.stages import Stage

DISCRIMINATIONS = ("moco", "simsiam", "barlow_twins")
FORMS = ("least_squares", "log", "wgan_gp")
STAGES = [
    Stage("d", terms={"discriminative": 1.0}),
    Stage("dr", terms={"discriminative": 1.0, "restorative": 10.0}),
    Stage("dra", terms={"discriminative": 1.0, "restorative": 10.0, "adversarial": 0.5}),
]


def small_backbone(dimensions: int) -> BackboneConfig:
    return BackboneConfig(dimensions=dimensions, features=[4, 8, 8], encoder_blocks=[1], decoder_blocks=[1])


def small_dira(dimensions: int = 2, views: DiraViews | None = None, **config: Any) -> Dira:
    torch.manual_seed(0)
    widths = {"bank": 11, "hidden": 8, "outputs": 6, "predictor_hidden": 4, "critic_width": 2}
    chosen = DiraConfig(**{**widths, "adversarial_weight": 0.5, **config})
    return Dira(chosen, small_backbone(dimensions), views or DiraViews(crop=[16] * dimensions))


def small_batch(count: int = 4, dimensions: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    size = (count, 1, *[16] * dimensions)
    return {name: torch.randn(size, generator=generator) for name in ("x1", "x2", "x1_clean")}


def total_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Loop:
    """Training as in a plain loop: the generator's step, then the critic's."""

    def __init__(self, method: Dira) -> None:
        self.method = method
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizers = [torch.optim.SGD(trained, lr=0.01, momentum=0.9)]
        if method.adversary is not None:
            self.optimizers.append(torch.optim.Adam(method.adversary.parameters(), lr=1e-3, betas=(0.5, 0.999)))

    def step(self, step: int) -> dict[str, float]:
        batch = small_batch(seed=step)
        losses = self.method(batch, step)
        self._take(self.optimizers[0], losses)
        if "adversarial" in self.method.weights(step):
            assert self.method.adversary is not None
            of_critic = self.method.adversary(*self.method.adversary_inputs(batch))
            self._take(self.optimizers[1], of_critic)
            losses |= {f"adversary/{name}": loss for name, loss in of_critic.items()}
        self.method.after_step(step)
        return {name: loss.item() for name, loss in losses.items()}

    @staticmethod
    def _take(optimizer: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
        optimizer.zero_grad()
        total_of(losses).backward()
        optimizer.step()


def gradients_and_buffers(method: Dira) -> dict[str, Tensor]:
    named = itertools.chain(method.named_parameters(), method.adversary.named_parameters())
    return {name: p.grad for name, p in named if p.grad is not None} | dict(method.named_buffers())


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


# Bugs of the official code.


@pytest.mark.parametrize("discriminative", DISCRIMINATIONS)
def test_evaluation_changes_no_state(discriminative: str) -> None:
    """There, validation moves the momentum twin and pushes its keys into the bank."""
    method = small_dira(discriminative=discriminative)
    Loop(method).step(0)
    before = copy.deepcopy(method.state_dict())
    method.eval()
    with torch.no_grad():
        method(small_batch(seed=1), 1)
    method.train()
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    if isinstance(method.discrimination, MomentumContrast):
        assert method.discrimination.bank.push() == 0  # nor is anything waiting to be pushed
    else:
        assert any("running_mean" in name for name in before)


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


def test_the_bank_takes_batches_that_its_size_is_no_multiple_of() -> None:
    method = small_dira(bank=11)
    assert isinstance(method.discrimination, MomentumContrast)
    keys = []
    for step in range(4):
        keys.append(method.discrimination.key(small_batch(seed=step)["x2"]))
        method(small_batch(seed=step), step)
        method.discrimination.bank.push()
        method.discrimination.key_backbone.eval()  # `key` above collects nothing twice
    newest = torch.cat(keys)[-11:]
    distance = torch.cdist(newest, method.discrimination.bank.vectors)
    assert distance.amin(dim=1).max() < 1e-3


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


# Stages and the adversary.


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


# Batches in parts, checkpoints, dimensions, refusals.


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_sum_to_the_whole(form: str) -> None:
    def run(parts: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        method = small_dira(adversary=form).double()
        method.adversary.double()
        whole = {name: tensor.double() for name, tensor in small_batch().items()}
        size = 4 // parts
        batches = [{n: t[i : i + size] for n, t in whole.items()} for i in range(0, 4, size)]
        if parts > 1:  # who has the whole batch needs no exchange
            method.exchange(batches, 0)
        found: dict[str, float] = {}
        for batch in batches:
            losses = method(batch, 0)
            (total_of(losses) / parts).backward()
            of_critic = method.adversary(*method.adversary_inputs(batch))
            (total_of(of_critic) / parts).backward()
            for name, value in [*losses.items(), *of_critic.items(), *method.adversary.monitors.items()]:
                if name != "gradient_penalty_share":  # a share of means is no mean
                    found[name] = found.get(name, 0) + value.item() / parts
        method.after_step(0)
        return found, gradients_and_buffers(method)

    (values, tensors), (of_parts, in_parts) = run(1), run(2)
    assert of_parts == pytest.approx(values, rel=1e-9)
    assert tensors.keys() == in_parts.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-7, atol=1e-9, equal_nan=True, msg=name)


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


@pytest.mark.parametrize("discriminative", DISCRIMINATIONS)
def test_a_state_from_the_middle_continues_to_the_same_losses(discriminative: str) -> None:
    first = Loop(small_dira(discriminative=discriminative, adversary="wgan_gp"))
    first.method.set_stages(STAGES, 6)
    for step in range(5):
        first.step(step)
    torch.manual_seed(1)
    second = Loop(small_dira(discriminative=discriminative, adversary="wgan_gp"))
    second.method.set_stages(STAGES, 6)
    second.method.load_state_dict(copy.deepcopy(first.method.state_dict()))
    second.method.adversary.load_state_dict(copy.deepcopy(first.method.adversary.state_dict()))
    for loaded, optimizer in zip(second.optimizers, first.optimizers, strict=True):
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(5, 8):
        assert second.step(step) == first.step(step)


def test_embeddings_behind_instance_norm_do_not_begin_as_one() -> None:
    plain, standardised = small_dira(standardise=False), small_dira(standardise=True)
    for method in (plain, standardised):
        for step in range(3):
            method(small_batch(seed=step), step)
            method.after_step(step)

    def spread(method: Dira) -> float:
        with torch.no_grad():
            keys = method.discrimination.key(small_batch(8, seed=9)["x1"])
        return keys.std(0, correction=0).norm().item()

    assert spread(standardised) > 4 * spread(plain)


@pytest.mark.parametrize(
    ("config", "global_batch", "parts", "named"),
    [
        ({"bank": 7}, 8, 1, "method.bank"),
        ({"discriminative": "simsiam"}, 8, 2, "method.discriminative"),
        ({"discriminative": "barlow_twins"}, 8, 2, "method.discriminative"),
        ({"discriminative": "simsiam"}, 1, 1, "method.discriminative"),
    ],
)
def test_a_batch_that_cannot_be_learned_from_is_refused(
    config: dict[str, Any], global_batch: int, parts: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        small_dira(**config).check_training(global_batch, parts)


def test_any_number_of_parts_and_a_batch_of_one_will_do_for_moco() -> None:
    method = small_dira()
    method.check_training(1, 1)
    method.check_training(8, 8)
    assert math.isfinite(total_of(method(small_batch(1), 0)).item())
    method.set_stages([Stage(terms={"discriminative": 1.0}, global_batch=12)], 1)
    with pytest.raises(ValueError, match=r"method\.bank: 11 keys are fewer than a batch brings \(12\)"):
        method.check_training(4, 1)


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
    method.check_training(min(stage.global_batch or config.train.global_batch for stage in config.stages), 8)


def on_one_of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = torch.load(f"{folder}/whole.pt")
    method = small_dira(adversary="wgan_gp").double()
    method.adversary.double()
    method.group = dist.group.WORLD
    batch = {name: tensor.double()[2 * rank : 2 * rank + 2] for name, tensor in small_batch().items()}
    method.exchange([batch], 0)
    total_of(method(batch, 0)).backward()
    total_of(method.adversary(*method.adversary_inputs(batch))).backward()
    method.after_step(0)
    z1, z2 = (found[name][2 * rank : 2 * rank + 2].requires_grad_() for name in ("z1", "z2"))
    barlow_twins_loss(z1, z2, 0.005, dist.group.WORLD).backward()
    expected = found["gradient"][2 * rank : 2 * rank + 2]
    torch.testing.assert_close(z1.grad / 2, expected, rtol=1e-6, atol=1e-9)  # the mean over the ranks
    for name, tensor in gradients_and_buffers(method).items():
        if name not in dict(method.named_buffers()):
            dist.all_reduce(tensor)
            tensor /= 2
        torch.testing.assert_close(tensor, found[name], rtol=1e-7, atol=1e-9, equal_nan=True, msg=name)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    method = small_dira(adversary="wgan_gp").double()
    method.adversary.double()
    batch = {name: tensor.double() for name, tensor in small_batch().items()}
    total_of(method(batch, 0)).backward()
    total_of(method.adversary(*method.adversary_inputs(batch))).backward()
    method.after_step(0)
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z1.requires_grad_()
    barlow_twins_loss(z1, z2, 0.005).backward()
    embeddings = {"z1": z1.detach(), "z2": z2, "gradient": z1.grad}
    torch.save(gradients_and_buffers(method) | embeddings, tmp_path / "whole.pt")
    torch.multiprocessing.spawn(on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
