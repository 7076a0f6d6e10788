"""Training crops: shapes, where they lie, that they repeat for a seed; and what happens when a loss explodes."""

import pytest
import torch
from monai.data.meta_obj import get_track_meta
from torch import nn

from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.cases import read_case
from voxtrast.engine.downstream.training import Budget, _crops, pad_to, train
from voxtrast.engine.errors import UserError

CLASSES = (0, 2, 5)


def budget(crop: tuple[int, int, int], steps: int = 2, learning_rate: float = 1e-3) -> Budget:
    return Budget(steps, 2, learning_rate, 0.0, crop, flips=True)


def test_crops_have_the_crop_s_size_also_where_the_volume_is_smaller(store: Store) -> None:
    cases = [read_case(store, case, CLASSES) for case in store.cases[:2]]
    for crop in ((16, 16, 16), (32, 16, 24)):
        item = next(_crops(cases, budget(crop), classes=3, seed=0))
        assert item["image"].shape == item["label"].shape == (1, *crop)
        assert item["image"].dtype == torch.float32
        assert set(item["label"].unique().tolist()) <= {0, 1, 2}


def test_the_same_seed_gives_the_same_crops_and_every_case_comes_before_any_comes_again(store: Store) -> None:
    cases = [read_case(store, case, CLASSES) for case in store.cases[:3]]
    runs = []
    for seed in (0, 0, 1):
        crops = _crops(cases, budget((16, 16, 16)), classes=3, seed=seed)
        runs.append(torch.stack([next(crops)["image"] for _ in range(6)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_half_of_the_crops_are_centred_on_foreground(store: Store) -> None:
    cases = [read_case(store, store.cases[0], CLASSES)]
    crops = _crops(cases, budget((8, 8, 8)), classes=3, seed=0)
    with_foreground = sum(bool((next(crops)["label"] > 0).any()) for _ in range(60))
    assert with_foreground >= 25
    # A crop's image lies where its label lies: the ball is bright.
    item = next(crop for crop in crops if 0.2 < (crop["label"] > 0).float().mean() < 0.8)
    inside, outside = item["image"][item["label"] > 0], item["image"][item["label"] == 0]
    assert inside.mean() > outside.mean() + 0.5


def test_padding_is_even_and_takes_the_given_value() -> None:
    padded = pad_to(torch.ones(1, 3, 4, 9), (6, 4, 8), value=-2.0)
    assert padded.shape == (1, 6, 4, 9)
    assert padded[0, :, 0, 0].tolist() == [-2.0, 1.0, 1.0, 1.0, -2.0, -2.0]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_monai_as_it_was(store: Store) -> None:
    cases = [read_case(store, store.cases[0], CLASSES)]
    network = nn.Conv3d(1, 3, 1)
    nn.init.constant_(network.weight, float("inf"))
    before = get_track_meta()
    with pytest.raises(UserError, match="the loss is nan at step 1; lower the learning rate"):
        train(
            network,
            cases,
            budget((8, 8, 8)),
            classes=3,
            seed=0,
            device=torch.device("cpu"),
            report=lambda step, loss: None,
        )
    assert get_track_meta() == before
