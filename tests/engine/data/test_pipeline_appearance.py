"""Changes of intensity as DALI makes them, against float64 evaluations of what the plan says."""

from typing import Any

import numpy as np
import pytest
from random_numbers import normal_numbers
from scipy import ndimage
from view_samples import EPSILON, slots, varied_store

from voxtrast.engine.data.planner import Plan
from voxtrast.engine.data.store import Case, Store
from voxtrast.methods.cover import cover_appearance
from voxtrast.methods.views import AppearanceRanges, Blur, Brightness, Contrast, InPaint, Noise, View, ViewSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return varied_store(tmp_path_factory)


def appearance(**ranges: Any) -> dict[str, View]:
    """Only what is named, in COVER's order."""
    order = [step for step in cover_appearance().order if step in ranges]
    return {"plain": View(), "x": View(appearance=AppearanceRanges(order=order, **ranges))}


def number(plan: Plan, kind: str) -> float:
    (step,) = [step for step in plan.views["x"].steps if step.kind == kind]
    return float(step.numbers[0])


def places(plan: Plan, dimensions: int) -> list[tuple[slice, ...]]:
    (step,) = [step for step in plan.views["x"].steps if step.kind == "in_paint"]
    return [
        tuple(slice(box[axis], box[axis] + box[axis + 3]) for axis in range(3 - dimensions, 3)) for box in step.boxes
    ]


def span(case: Case) -> float:
    return case.intensity["high"] - case.intensity["low"]


def test_an_appearance_of_nothing_changes_nothing(store: Store) -> None:
    for _, _, sample in slots(store, ViewSpec((16, 16, 16), appearance()), 1):
        np.testing.assert_array_equal(sample["x"], sample["plain"])


def test_noise_is_gaussian_with_the_planned_amplitude(store: Store) -> None:
    for plan, case, sample in slots(store, ViewSpec((24, 24, 24), appearance(noise=Noise(std=[0.01, 0.05]))), 2):
        noise = (sample["x"] - sample["plain"]) / span(case)
        count, std = noise.size, number(plan, "noise") / span(case)
        assert abs(noise.mean()) < 5 * std / count**0.5
        assert abs(noise.std() - std) < 5 * std / (2 * count) ** 0.5
        assert abs((noise**4).mean() / std**4 - 3) < 5 * (96 / count) ** 0.5
        neighbours = (noise[..., 1:] * noise[..., :-1]).mean() / std**2
        assert abs(neighbours) < 5 / count**0.5


def test_contrast_is_about_the_mean_and_brightness_is_added(store: Store) -> None:
    for plan, _, sample in slots(
        store, ViewSpec((24, 24, 24), appearance(contrast=Contrast(), brightness=Brightness(std=0.1))), 2
    ):
        plain = sample["plain"]
        expected = plain.mean() + number(plan, "contrast") * (plain - plain.mean()) + number(plan, "brightness")
        # The mean of 13824 values, summed in float32, and four more operations on values below 5.
        np.testing.assert_allclose(sample["x"], expected, rtol=0, atol=(4 + 14) * EPSILON * 5)


@pytest.mark.parametrize("crop", [(24, 24, 24), (24, 24)])
def test_blur_is_a_gaussian_of_the_planned_width(store: Store, crop: tuple[int, ...]) -> None:
    for plan, _, sample in slots(store, ViewSpec(crop, appearance(blur=Blur(sigma_voxels=[0.0, 1.5]))), 2):
        sigma = number(plan, "blur")
        radius = int(np.ceil(4 * sigma))
        expected = ndimage.gaussian_filter(sample["plain"][0], sigma, mode="nearest", radius=radius)
        np.testing.assert_allclose(sample["x"][0], expected, rtol=0, atol=16 * len(crop) * EPSILON * 5)


def test_a_blur_of_no_width_is_the_identity(store: Store) -> None:
    for _, _, sample in slots(store, ViewSpec((16, 16, 16), appearance(blur=Blur(sigma_voxels=[0.0, 1e-6]))), 1):
        np.testing.assert_array_equal(sample["x"], sample["plain"])


@pytest.mark.parametrize("crop", [(24, 24, 24), (24, 24)])
def test_boxes_hold_uniform_noise_and_leave_the_rest_alone(store: Store, crop: tuple[int, ...]) -> None:
    fills = []
    for plan, case, sample in slots(store, ViewSpec(crop, appearance(in_paint=InPaint(least=1, side=[0.2, 0.3]))), 4):
        boxes = np.zeros(crop, bool)
        for place in places(plan, len(crop)):
            boxes[place] = True
        np.testing.assert_array_equal(sample["x"][0][~boxes], sample["plain"][0][~boxes])
        fills.append((sample["x"][0][boxes] - case.intensity["low"]) / span(case))
        assert boxes.mean() < 10 * 0.3 ** len(crop)
    fill = np.concatenate(fills)
    assert -1e-6 <= fill.min() < 0.02
    assert 0.98 < fill.max() <= 1 + 1e-6
    assert abs(fill.mean() - 0.5) < 5 / (12 * fill.size) ** 0.5
    assert abs(fill.std() - 12**-0.5) < 5 * 0.13 / fill.size**0.5


def test_everything_together_follows_the_order_of_cover(store: Store) -> None:
    """Noise, blur, contrast, brightness, boxes: evaluated in float64 from the same draws."""
    crop = (20, 20, 20)
    order = cover_appearance().order
    ranges = AppearanceRanges(order=order, noise=Noise(std=[0.05, 0.1]), blur=Blur(sigma_voxels=[0.3, 0.8]))
    ranges.in_paint.least = 1
    spec = ViewSpec(crop, {"plain": View(), "x": View(appearance=ranges)})
    for plan, _, sample in slots(store, spec, 2):
        stream = plan.views["x"].steps[0].stream
        noise = normal_numbers(crop, stream, seed=7, slot=plan.slot, step=plan.step)
        image = sample["plain"][0] + number(plan, "noise") * noise
        radius = int(np.ceil(4 * number(plan, "blur")))
        image = ndimage.gaussian_filter(image, number(plan, "blur"), mode="nearest", radius=radius)
        image = image.mean() + number(plan, "contrast") * (image - image.mean()) + number(plan, "brightness")
        inside = np.zeros(crop, bool)
        for place in places(plan, 3):
            inside[place] = True
        np.testing.assert_allclose(sample["x"][0][~inside], image[~inside], rtol=0, atol=100 * EPSILON * 5)


def test_a_step_that_is_left_out_of_a_slot_changes_nothing_there(store: Store) -> None:
    half = appearance(
        noise=Noise(std=[0.1, 0.1], probability=0.5),
        blur=Blur(sigma_voxels=[1, 1], probability=0.5),
        contrast=Contrast(factor=[2, 2], probability=0.5),
        brightness=Brightness(std=1, probability=0.5),
        in_paint=InPaint(least=1, probability=0.5),
    )
    untouched = 0
    for plan, _, sample in slots(store, ViewSpec((16, 16, 16), half), 20):
        same = np.array_equal(sample["x"], sample["plain"])
        assert same == (not plan.views["x"].steps)
        untouched += same
    assert 0 < untouched < 10  # 2.5 expected of 80
