"""Dice of whole cases: MONAI's sliding window over the volume, MONAI's metric over the classes."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from torch import Tensor, nn

from .cases import LabelledCase


def predict(
    network: nn.Module, image: Tensor, crop: tuple[int, ...], background: float, device: torch.device
) -> Tensor:
    """Class indices of a whole volume.

    Args:
        image: (1, D, H, W) float32, as in the store; any size.
        crop: sides of the sliding window, as in training.
        background: what a volume smaller than the window is padded with.

    Returns: (1, D, H, W) int64 on the CPU.
    """
    network.eval()
    with torch.no_grad():
        logits = sliding_window_inference(
            image[None].to(device),
            roi_size=crop,
            sw_batch_size=2,
            predictor=network,
            overlap=0.5,
            mode="gaussian",
            cval=background,
        )
    assert isinstance(logits, Tensor)
    return logits.argmax(dim=1).cpu()


def evaluate(
    network: nn.Module,
    cases: Iterator[LabelledCase],
    *,
    classes: tuple[int, ...],
    crop: tuple[int, ...],
    device: torch.device,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Dice per case and class, at the store's spacing.

    Returns: {"case": id, "dice": {label value: Dice}, "mean": over the classes that the case has} per case. A class
        that a case's label lacks has no Dice there (None), as in MONAI with `ignore_empty`.
    """
    metric = DiceMetric(include_background=False, reduction="none", num_classes=len(classes))
    results: list[dict[str, Any]] = []
    for item in cases:
        prediction = predict(network, item.image, crop, item.case.intensity["background"], device)
        scores = torch.as_tensor(metric(prediction[None], item.label[None].long()))[0].tolist()
        dice = {
            str(value): None if math.isnan(score) else round(score, 6)
            for value, score in zip(classes[1:], scores, strict=True)
        }
        results.append({"case": item.case.id, "dice": dice, "mean": mean_of(dice.values())})
        report(item.case.id)
    return results


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Macro means: {"mean": over the cases' own means, "classes": {label value: over the cases that have it}}."""
    values = results[0]["dice"]
    return {
        "mean": mean_of(result["mean"] for result in results),
        "classes": {value: mean_of(result["dice"][value] for result in results) for value in values},
    }


def mean_of(numbers: Any) -> float | None:
    """Mean of what is there; None where nothing is."""
    present = [number for number in numbers if number is not None]
    return round(sum(present) / len(present), 6) if present else None
