"""The scores of held-aside cases of a store, at its spacing."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .cases import LabelledCase
from .inference import OVERLAP, predict_logits
from .scoring import score


def evaluate(
    network: nn.Module,
    cases: Iterator[LabelledCase],
    *,
    classes: tuple[int, ...],
    crop: tuple[int, ...],
    device: torch.device,
    report: Callable[[str], None],
    overlap: float = OVERLAP,
    mirror: tuple[int, ...] = (),
    surface: bool = False,
) -> list[dict[str, Any]]:
    """Scores per case and class.

    Args:
        classes: label values; the first is the background.
        crop, overlap, mirror: of the sliding window, see `predict_logits`.
        report: called with the id of each case that is done.
        surface: with distances between surfaces in mm.

    Returns: {"case": id, ...} with the fields of `scoring.score`, per case. A class that a case's label lacks has no
        Dice there (None), as in MONAI with `ignore_empty`.
    """
    results: list[dict[str, Any]] = []
    for item in cases:
        background = item.case.intensity["background"]
        logits = predict_logits(network, item.image, crop, background, device, overlap=overlap, mirror=mirror)
        scores = score(logits.argmax(dim=0).numpy(), item.label[0].numpy(), classes, item.case.spacing_mm, surface)
        results.append({"case": item.case.id, **scores})
        report(item.case.id)
    return results
