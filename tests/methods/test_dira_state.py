"""DiRA: what it keeps from step to step, and that any cut of a batch leaves the same."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_dira import DISCRIMINATIONS, FORMS, STAGES, Loop, gradients_and_buffers, small_batch, small_dira, total_of
from torch import Tensor

from voxtrast.methods.dira import Dira
from voxtrast.methods.parts.instance_discrimination import MomentumContrast, barlow_twins_loss


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
    if isinstance(method.discrimination, MomentumContrast):
        method.discrimination.bank.push()  # nor is anything waiting to be pushed
    else:
        assert any("running_mean" in name for name in before)
    for name, tensor in method.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


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
    with pytest.raises(ValueError, match=r"method\.bank: 11 keys are fewer than a batch brings \(12\)"):
        method.check_training(12, 1)


def stepped(discriminative: str, rows: slice, group: Any) -> Dira:
    """With the gradients of a step, whose batch has these samples on this rank."""
    method = small_dira(adversary="wgan_gp", discriminative=discriminative).double()
    method.adversary.double()
    method.group = group
    batch = {name: tensor.double()[rows] for name, tensor in small_batch().items()}
    method.exchange([batch], 0)
    total_of(method(batch, 0)).backward()
    total_of(method.adversary(*method.adversary_inputs(batch))).backward()
    method.after_step(0)
    return method


def on_one_of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for discriminative in DISCRIMINATIONS:
        found = torch.load(f"{folder}/{discriminative}.pt")
        method = stepped(discriminative, slice(2 * rank, 2 * rank + 2), dist.group.WORLD)
        for name, tensor in gradients_and_buffers(method).items():
            if name not in dict(method.named_buffers()):
                dist.all_reduce(tensor)
                tensor /= 2
            torch.testing.assert_close(tensor, found[name], rtol=1e-7, atol=1e-9, equal_nan=True, msg=name)
    found = torch.load(f"{folder}/embeddings.pt")
    z1, z2 = (found[name][2 * rank : 2 * rank + 2].requires_grad_() for name in ("z1", "z2"))
    barlow_twins_loss(z1, z2, 0.005, dist.group.WORLD).backward()
    expected = found["gradient"][2 * rank : 2 * rank + 2]
    torch.testing.assert_close(z1.grad / 2, expected, rtol=1e-6, atol=1e-9)  # the mean over the ranks
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    for discriminative in DISCRIMINATIONS:
        method = stepped(discriminative, slice(None), None)
        torch.save(gradients_and_buffers(method), tmp_path / f"{discriminative}.pt")
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z1.requires_grad_()
    barlow_twins_loss(z1, z2, 0.005).backward()
    torch.save({"z1": z1.detach(), "z2": z2, "gradient": z1.grad}, tmp_path / "embeddings.pt")
    torch.multiprocessing.spawn(on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
