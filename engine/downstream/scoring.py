"""How well a segmentation fits a label: MONAI's Dice, Hausdorff distance and surface distance, class by class.

One class at a time and only the box that holds it: of many classes on a large volume, one-hot maps fill the memory.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.meandice import compute_dice
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage
from torch import Tensor

DISTANCES = ("hd95", "surface_distance")


def score(
    prediction: np.ndarray, label: np.ndarray, classes: Sequence[int], spacing_mm: Sequence[float], surface: bool
) -> dict[str, Any]:
    """Scores of one case.

    Args:
        prediction, label: (D, H, W) class indices, whole numbers.
        classes: label value of each index; the first is the background.
        spacing_mm: (D, H, W).
        surface: with distances, which take longer than the Dice.

    Returns: {"dice": {label value: Dice, None where the label lacks the class}, "mean": over the others}, and the
        label values that are "missed" (in the label alone) and "spurious" (in the prediction alone); of several
        classes also "foreground", the Dice of all of them taken as one, which confusing them does not lower; with
        `surface` also "hd95" and "surface_distance" in mm, None where prediction or label lacks the class.
    """
    found, wanted = (ndimage.find_objects(each, max_label=len(classes) - 1) for each in (prediction, label))
    result: dict[str, Any] = {"dice": {}, "missed": [], "spurious": []}
    if surface:
        result |= {name: {} for name in DISTANCES}
    for index, value in enumerate(classes[1:], start=1):
        boxes = [box for box in (found[index - 1], wanted[index - 1]) if box is not None]
        dice = hd95 = distance = None
        if boxes:
            box = _around(boxes)
            one, other = (torch.from_numpy(each[box] == index)[None, None].float() for each in (prediction, label))
            dice = _number(compute_dice(one, other, include_background=True))
            if surface and len(boxes) == 2:
                hd95, distance = _distances(one, other, [float(each) for each in spacing_mm])
        result["dice"][str(value)] = dice
        if surface:
            result["hd95"][str(value)], result["surface_distance"][str(value)] = hd95, distance
        if len(boxes) == 1:
            result["spurious" if found[index - 1] is not None else "missed"].append(value)
    result["mean"] = mean_of(result["dice"].values())
    if len(classes) > 2:
        wanted_here, found_here = label > 0, prediction > 0
        size = np.count_nonzero(wanted_here) + np.count_nonzero(found_here)
        shared = np.count_nonzero(wanted_here & found_here)
        result["foreground"] = round(2 * shared / size, 6) if wanted_here.any() else None
    return result


def summarise(results: Sequence[dict[str, Any]], name: str = "dice") -> dict[str, Any]:
    """Macro means of "dice", "hd95" or "surface_distance".

    Returns: {"mean": over the cases' own means, "classes": {label value: over the cases that have a number}}, and of
        the Dice of several classes "foreground", over the cases that have one.
    """
    values = results[0][name]
    summary = {
        "mean": mean_of(mean_of(result[name].values()) if name != "dice" else result["mean"] for result in results),
        "classes": {value: mean_of(result[name][value] for result in results) for value in values},
    }
    if name == "dice" and "foreground" in results[0]:
        summary["foreground"] = mean_of(result["foreground"] for result in results)
    return summary


def distances(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of cases scored with `surface`: the means of both distances, and in how many cases each class is "missed" or
    "spurious" and so in none of the means."""
    classes = results[0]["dice"]
    return {name: summarise(results, name) for name in DISTANCES} | {
        name: {value: sum(int(value) in result[name] for result in results) for value in classes}
        for name in ("missed", "spurious")
    }


def in_words(summary: dict[str, Any]) -> str:
    """Means over cases, for a line on screen; of "dice" and, where they are there, of what `distances` gives."""
    dice = summary["dice"]
    classes = ", ".join(f"{value}: {each:.3f}" for value, each in dice["classes"].items() if each is not None)
    words = f"Dice {dice['mean']:.3f} ({classes})" if dice["mean"] is not None else "no Dice"
    if dice.get("foreground") is not None:
        words += f", of all classes as one {dice['foreground']:.3f}"
    for name, title in zip(DISTANCES, ("HD95", "surface distance"), strict=True):
        if (mean := summary.get(name, {}).get("mean")) is not None:
            words += f", {title} {mean:.2f} mm"
    for name in ("missed", "spurious"):
        if count := sum(summary.get(name, {}).values()):
            words += f", {count} {name}"
    return words


def mean_of(numbers: Iterable[float | None]) -> float | None:
    """Mean of what is there; None where nothing is."""
    present = [number for number in numbers if number is not None]
    return round(sum(present) / len(present), 6) if present else None


def _distances(one: Tensor, other: Tensor, spacing_mm: list[float]) -> tuple[float, float]:
    """95th percentile of the Hausdorff distance, and average symmetric surface distance, both in mm.

    They are MONAI's compute_hausdorff_distance and compute_average_surface_distance, from one distance transform each
    way in place of two.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI's, over an argument that it passes to itself
        _, ways, _ = get_edge_surface_distance(one[0, 0], other[0, 0], spacing=spacing_mm, symmetric=True)
    to_other, to_one = (way.numpy().astype(np.float64) for way in ways)
    hausdorff = max(np.percentile(to_other, 95), np.percentile(to_one, 95))
    return round(float(hausdorff), 6), round(float(np.concatenate([to_other, to_one]).mean()), 6)


def _around(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )


def _number(value: Tensor) -> float | None:
    number = value.item()
    return None if math.isnan(number) else round(number, 6)
