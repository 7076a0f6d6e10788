"""Dice of whole volumes of any size, by MONAI, with our bookkeeping around it."""

import pytest
import torch
from torch import Tensor, nn

from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.cases import LabelledCase, read_case
from voxtrast.engine.downstream.evaluation import evaluate
from voxtrast.engine.downstream.inference import predict_logits
from voxtrast.engine.downstream.scoring import summarise

CPU = torch.device("cpu")


class Threshold(nn.Module):
    """Class 1 where the input is above 0.5."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), image - 0.5], dim=1)


@pytest.mark.parametrize("size", [(5, 17, 33), (16, 16, 16), (40, 9, 20)])
def test_prediction_covers_volumes_smaller_and_larger_than_the_window(size: tuple[int, ...]) -> None:
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    logits = predict_logits(Threshold(), image, (16, 16, 16), background=0.0, device=CPU)
    assert torch.equal(logits.argmax(dim=0, keepdim=True), (image > 0.5).long())


def test_dice_equals_the_formula_and_a_class_that_is_absent_has_none(store: Store) -> None:
    item = read_case(store, store.cases[0], (0, 2, 5))
    label = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    label[0, 0] = 1
    image = torch.zeros(1, 4, 4, 4)
    image[0, 0, :2] = 1.0
    image[0, 1, 0] = 1.0
    [result] = evaluate(
        Threshold3(),
        iter([LabelledCase(item.case, image, label)]),
        classes=(0, 2, 5),
        crop=(4, 4, 4),
        device=CPU,
        report=lambda case: None,
    )
    assert result == {
        "case": item.case.id,
        "dice": {"2": round(2 * 8 / (12 + 16), 6), "5": None},
        "mean": round(2 * 8 / (12 + 16), 6),
        "foreground": round(2 * 8 / (12 + 16), 6),
        "missed": [],
        "spurious": [],
    }


class Threshold3(Threshold):
    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([super().forward(image), torch.full_like(image, -1.0)], dim=1)


def test_means_skip_what_is_absent() -> None:
    results = [
        {"case": "a", "dice": {"1": 0.5, "2": None}, "mean": 0.5},
        {"case": "b", "dice": {"1": 0.7, "2": 0.9}, "mean": 0.8},
        {"case": "c", "dice": {"1": None, "2": None}, "mean": None},
    ]
    assert summarise(results) == {"mean": 0.65, "classes": {"1": 0.6, "2": 0.9}}
