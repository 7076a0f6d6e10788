"""Supervised training of a segmentation network: MONAI's loss and augmentations, AdamW on a one-cycle schedule."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.losses import DiceCELoss
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from torch import Tensor, nn

from ..errors import UserError
from ..precision import autocast, spare_small_maps
from .cases import LabelledCase
from .tuning import Plan

GRADIENT_CLIP = 12.0  # nnU-Net's; stops the rare step that a high learning rate turns into a jump


@dataclass(frozen=True)
class Budget:
    """All that both arms of a comparison share."""

    steps: int
    batch: int  # crops a step
    learning_rate: float  # the one-cycle schedule's highest
    weight_decay: float
    crop: tuple[int, int, int]
    flips: bool  # mirror each axis with probability 1/2: off where left and right differ
    autocast: str = "none"  # none | bfloat16: of the network's forward and backward; the loss is float32


def train(
    network: nn.Module,
    cases: list[LabelledCase],
    budget: Budget,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    report: Callable[[int, float], None],
    plan: Plan | None = None,
) -> list[float]:
    """Trains in place.

    Args:
        cases: the labelled cases; all are kept in memory.
        classes: background included.
        seed: of the order of cases, the crops and the augmentations.
        report: called with the step and its loss.
        plan: which tensors are trained when and how fast; default: all of them alike.

    Returns: the loss of each step.

    Raises: UserError where the loss is no longer a number.
    """
    network.train()
    if budget.autocast != "none" and device.type == "cpu":
        spare_small_maps(network)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False, batch=True)
    rate, decay = budget.learning_rate, budget.weight_decay
    parameters: Any = network.parameters() if plan is None else plan.groups(decay)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    rates = rate if plan is None else plan.rates(rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=budget.steps)
    losses: list[float] = []
    with _plain_tensors():
        crops = _crops(cases, budget, classes, seed)
        for step in range(1, budget.steps + 1):
            if plan is not None:
                plan.begin(step)
            batch = [next(crops) for _ in range(budget.batch)]
            image = torch.stack([item["image"] for item in batch]).to(device)
            label = torch.stack([item["label"] for item in batch]).to(device)
            with autocast(budget.autocast, device):
                logits = network(image)
            loss = loss_function(logits.float(), label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_CLIP)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise UserError(
                    f"the loss is {losses[-1]} at step {step}; lower the learning rate "
                    f"({budget.learning_rate}), or look at the store's volumes"
                )
            report(step, losses[-1])
    return losses


def augmentations(classes: int, crop: tuple[int, ...], flips: bool) -> Compose:
    """From a whole case to one crop of it, `image` in units of the case's own standard deviation.

    Half of the crops are centred on foreground, spread evenly over its classes.
    """
    both = ("image", "label")
    foreground = classes - 1
    return Compose(
        [
            RandCropByLabelClassesd(
                both,
                label_key="label",
                spatial_size=crop,
                num_classes=classes,
                ratios=[1.0, *[1.0 / foreground] * foreground],
                indices_key="label_cls_indices",
                warn=False,
            ),
            # A range for each axis: MONAI takes a single number for the first axis alone.
            RandAffined(
                both,
                prob=0.7,
                rotate_range=[math.radians(15)] * 3,
                scale_range=[0.15] * 3,
                translate_range=[0.05 * side for side in crop],
                mode=("bilinear", "nearest"),
                padding_mode="border",
            ),
            *([RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)] if flips else []),
            RandGaussianNoised("image", prob=0.15, std=0.1),
            RandGaussianSmoothd("image", prob=0.15, sigma_x=(0.3, 0.8), sigma_y=(0.3, 0.8), sigma_z=(0.3, 0.8)),
            RandScaleIntensityd("image", prob=0.3, factors=0.25),
            RandShiftIntensityd("image", prob=0.3, offsets=0.2),
            RandAdjustContrastd("image", prob=0.15, gamma=(0.7, 1.5), retain_stats=True),
        ]
    )


def pad_to(image: Tensor, crop: tuple[int, ...], value: float) -> Tensor:
    """Pads (C, D, H, W) evenly on both sides up to the crop."""
    missing = [max(0, side - size) for side, size in zip(crop, image.shape[1:], strict=True)]
    pads = [half for gap in reversed(missing) for half in (gap // 2, gap - gap // 2)]
    return nn.functional.pad(image, pads, value=value)


def _crops(cases: list[LabelledCase], budget: Budget, classes: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Augmented crops without end; every case once before any comes again."""
    indices = ClassesToIndicesd("label", num_classes=classes, max_samples_per_class=20_000)
    prepared: list[tuple[dict[str, Any], float, float]] = []
    for item in cases:
        mean, std = item.case.intensity["mean"], max(item.case.intensity["std"], 1e-6)
        image = (pad_to(item.image, budget.crop, item.case.intensity["background"]) - mean) / std
        prepared.append((indices({"image": image, "label": pad_to(item.label, budget.crop, 0)}), mean, std))
    transform = augmentations(classes, budget.crop, budget.flips)
    transform.set_random_state(seed=seed)
    generator = np.random.Generator(np.random.Philox(key=seed + 1))
    while True:
        for index in generator.permutation(len(prepared)):
            data, mean, std = prepared[index]
            with warnings.catch_warnings():
                # MONAI's own use of what newer versions of torch and numpy deprecate
                warnings.simplefilter("ignore", DeprecationWarning)
                [crop] = transform(data)
            yield {"image": crop["image"].float() * std + mean, "label": crop["label"]}


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """MONAI's transforms without their record of affine matrices, which costs more than the transforms here."""
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
