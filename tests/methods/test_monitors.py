import math

import pytest
import torch

from voxtrast.methods import BackboneConfig
from voxtrast.methods.parts.monitors import CollapseWatch, EmbeddingMonitor, effective_rank, embedding_std
from voxtrast.methods.parts.positional_contrast import ContrastConfig, PositionalContrast
from voxtrast.methods.pcl import PCL, PCLConfig, PCLViews

SPREAD, FLAT = {"monitor/embedding_std": 0.6}, {"monitor/embedding_std": 0.01}


def test_embedding_std_is_0_for_equal_vectors_and_1_on_the_sphere() -> None:
    torch.manual_seed(0)
    assert embedding_std(torch.ones(16, 8) * torch.arange(1, 17)[:, None]).item() == pytest.approx(0, abs=1e-7)
    assert embedding_std(torch.randn(20000, 8)).item() == pytest.approx(1, abs=0.02)
    # Half of them opposite: along one axis alone, 1 of 8 channels has a spread of 1.
    opposite = torch.zeros(10, 8)
    opposite[:5, 0], opposite[5:, 0] = 3, -2
    assert embedding_std(opposite).item() == pytest.approx(math.sqrt(8) / 8)


def test_effective_rank_counts_the_directions() -> None:
    assert effective_rank(torch.ones(16, 8)).item() == pytest.approx(1, abs=1e-6)
    for rank in (1, 3, 8):
        vectors = torch.eye(8)[:rank].repeat(4, 1) * 5
        assert effective_rank(vectors).item() == pytest.approx(rank, abs=1e-6)
    # Two directions of unequal share: singular values sqrt(3) and 1.
    share = torch.tensor([math.sqrt(3), 1.0]) / (1 + math.sqrt(3))
    uneven = torch.eye(2)[[0, 0, 0, 1]]
    assert effective_rank(uneven).item() == pytest.approx((-share * share.log()).sum().exp().item(), rel=1e-6)


def test_the_monitor_speaks_of_the_last_embeddings_of_training_once_it_has_seen_enough() -> None:
    torch.manual_seed(0)
    monitor = EmbeddingMonitor(4, window=8)
    for step in range(9):
        monitor.see(torch.ones(2, 4))
        monitor.update(step)
    assert monitor.numbers() == {}  # the window was full too late for the look at step 0
    monitor.see(torch.ones(2, 4))
    monitor.update(10)
    assert monitor.numbers()["embedding_std"].item() == pytest.approx(0, abs=1e-7)
    for step in range(11, 21):
        monitor.see(torch.eye(4)[[step % 4, (step + 2) % 4]])
        monitor.update(step)
    assert monitor.numbers()["effective_rank"].item() == pytest.approx(4, abs=1e-6)
    monitor.eval()
    state = {name: tensor.clone() for name, tensor in monitor.state_dict().items()}
    monitor.see(torch.ones(8, 4))
    monitor.update(30)
    assert all(torch.equal(state[name], tensor) for name, tensor in monitor.state_dict().items())
    assert monitor.numbers() == {}


def warned(watch: CollapseWatch, numbers: dict[str, float], steps: range) -> list[int]:
    return [step for step in steps if watch.see(step, numbers)]


def test_a_run_that_collapses_is_warned_of_within_100_steps_and_not_at_every_step() -> None:
    watch = CollapseWatch("lower it")
    assert len(warned(watch, FLAT, range(100))) == 1
    assert not warned(watch, FLAT, range(100, 900))
    assert len(warned(watch, FLAT, range(900, 1200))) == 1


def test_the_first_steps_and_single_steps_are_no_collapse() -> None:
    watch = CollapseWatch("lower it")
    assert not warned(watch, FLAT, range(watch.GRACE))
    assert not warned(watch, SPREAD, range(watch.GRACE, 200))
    for step in range(200, 400):
        assert watch.see(step, FLAT if step % 10 else SPREAD) is None


def test_the_warning_says_what_was_seen_and_what_to_do() -> None:
    watch = CollapseWatch("lower it")
    numbers = {"monitor/embedding_std": 0.01, "monitor/loss_over_collapse": 0.9999}
    lines = [line for step in range(100) if (line := watch.see(step, numbers))]
    assert lines == [
        "the embeddings have collapsed (embedding std 0.01 of 1, loss 0.9999 times that of identical embeddings); "
        "lower it"
    ]
    dense = CollapseWatch("lower it", "dense_")
    assert not warned(dense, FLAT, range(100))
    (line,) = [line for step in range(100) if (line := dense.see(step, {"monitor/dense_embedding_std": 0.01}))]
    assert line.startswith("the dense embeddings have collapsed")


def test_while_the_learning_rate_rises_nothing_is_called_a_collapse() -> None:
    """Every network begins near one, and leaves it late in a long warm-up."""
    watch = CollapseWatch("lower it")
    for step in range(300):
        assert watch.see(step, FLAT | {"learning_rate": step * 1e-4}) is None
    assert len(warned(watch, FLAT | {"learning_rate": 0.03}, range(300, 350))) == 1


def test_identical_embeddings_have_the_loss_that_users_reported() -> None:
    """Frozen at 5.5597 with 25 slices: (0.1 / 0.07) ln 49."""
    contrast = PositionalContrast(ContrastConfig(), (16, 16))
    assert contrast.collapsed(25) == pytest.approx(5.5597, abs=5e-5)
    loss = contrast.loss(torch.ones(50, 8), torch.rand(25))
    assert loss.item() == pytest.approx(5.5597, abs=5e-5)


def test_a_method_that_collapses_says_so_and_says_what_to_lower() -> None:
    torch.manual_seed(0)
    backbone = BackboneConfig(dimensions=2, features=[4, 8], encoder_blocks=[1], decoder_blocks=[1])
    method = PCL(PCLConfig(channels=8), backbone, PCLViews(crop=[8, 8]))
    torch.nn.init.zeros_(method.projector[-1].weight)
    found = []
    for step in range(100):
        batch = {"x1": torch.randn(8, 1, 8, 8), "x2": torch.randn(8, 1, 8, 8), "position": torch.rand(8)}
        with torch.no_grad():
            method(batch, step)
        method.after_step(step)
        numbers = {f"monitor/{name}": value.item() for name, value in method.monitors.items()}
        found += [line] if (line := method.warning(step, numbers)) else []
    assert method.monitors["loss_over_collapse"].item() == pytest.approx(1, abs=1e-6)
    (line,) = found
    assert "the embeddings have collapsed" in line
    assert "optimizer.learning_rate" in line
    assert "schedule.warmup_steps" in line
