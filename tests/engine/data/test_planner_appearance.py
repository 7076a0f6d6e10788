"""Changes of intensity in a plan: which steps are made, in which order, and the law of each number."""

from typing import Any

import numpy as np
import pytest
from plan_samples import assert_equally_probable, assert_frequencies, assert_normal, assert_uniform, plans, view_with

from voxtrast.engine.data.planner import Plan, Step, native
from voxtrast.methods.views import (
    BiasField,
    Blur,
    Boxes,
    Brightness,
    Contrast,
    CutOut,
    CutOutOutside,
    Gamma,
    InPaint,
    LowResolution,
    Noise,
    OutPaint,
    PatchSwap,
    PixelShuffle,
    View,
)

LOW, SPAN = 2.0, 4.0  # of the cases of plan_samples, whose background is -1


def steps(view: View, count: int, **settings: Any) -> list[Step]:
    """The only step of each plan, where it is made."""
    found = [plan.views["x"].steps for plan in plans({"x": view}, count, **settings)]
    assert all(len(each) <= 1 for each in found)
    return [step for each in found for step in each]


def numbers(view: View, count: int = 2000, **settings: Any) -> np.ndarray:
    return np.stack([step.numbers for step in steps(view, count, **settings)])


def kinds(plan: Plan, name: str = "x") -> list[str]:
    return [step.kind for step in plan.views[name].steps]


def test_amplitudes_fill_their_ranges_in_the_units_of_the_volume() -> None:
    assert_uniform(numbers(view_with(["noise"], noise=Noise(std=[0.1, 0.2])))[:, 0], 0.1 * SPAN, 0.2 * SPAN)
    assert_uniform(numbers(view_with(["blur"], blur=Blur(sigma_voxels=[0.5, 1.5])))[:, 0], 0.5, 1.5)
    assert_uniform(numbers(view_with(["contrast"], contrast=Contrast(factor=[0.5, 1.5])))[:, 0], 0.5, 1.5)
    assert_normal(numbers(view_with(["brightness"], brightness=Brightness(std=0.1)))[:, 0], 0.1 * SPAN)
    shift = view_with(["brightness"], brightness=Brightness(std=0.0, shift=[0.25, 1.0]))
    assert_uniform(numbers(shift)[:, 0], 0.25 * SPAN, SPAN)
    coarse = view_with(["low_resolution"], low_resolution=LowResolution(factor=[1.0, 3.0]))
    assert_uniform(numbers(coarse)[:, 0], 1.0, 3.0)


def test_gamma_is_log_uniform_and_sometimes_inverted() -> None:
    drawn = numbers(view_with(["gamma"], gamma=Gamma(exponent=[0.5, 2.0], invert=0.25)))
    assert_uniform(np.log(drawn[:, 0]), np.log(0.5) - 1e-6, np.log(2.0) + 1e-6)
    assert_frequencies(drawn[:, 1].tolist(), {1.0: 0.25, 0.0: 0.75})


def test_bias_fields_have_uniform_coefficients_and_none_for_what_all_voxels_share() -> None:
    view = view_with(["bias_field"], bias_field=BiasField(coefficient=0.4))
    drawn = numbers(view, 500)
    assert drawn.shape == (500, 21)
    assert (drawn[:, 0] == -1.0).all()  # the background is not scaled
    assert (drawn[:, 1] == 0.0).all()
    for column in range(2, 21):
        assert_uniform(drawn[:, column], -0.4 - 1e-6, 0.4 + 1e-6)
    exponents = [(d, h, w) for d in range(4) for h in range(4 - d) for w in range(4 - d - h)]
    flat = numbers(view, 5, crop=(16, 16))
    assert [bool(column.any()) for column in flat[:, 1:].T] == [d == 0 and h + w > 0 for d, h, w in exponents]


def test_a_bezier_table_is_the_curve_over_its_own_abscissa() -> None:
    points = [0.9, 0.2, 0.3, 0.7]
    t = np.linspace(0, 1, 20001)
    x, y = (3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 for a, b in (points[::2], points[1::2]))
    expected = np.interp(np.linspace(0, 1, 256), x, y)
    table = np.array(native().bezier_table(points, False))
    np.testing.assert_allclose(table, expected, rtol=0, atol=2e-5)  # straight pieces, 512 of them
    np.testing.assert_array_equal(native().bezier_table(points, True), table[::-1])
    for corner in ([0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 1]):
        steep = np.array(native().bezier_table(corner, False))
        assert (steep[0], steep[-1]) == (0.0, 1.0)
        assert (np.diff(steep) >= 0).all()


def test_bezier_maps_are_monotone_and_half_of_them_inverted() -> None:
    drawn = numbers(view_with(["bezier"]), 500)
    rising = drawn[:, 0] < drawn[:, -1]
    assert (np.sort(drawn[rising], axis=1) == drawn[rising]).all()
    assert (np.sort(drawn[~rising], axis=1) == drawn[~rising][:, ::-1]).all()
    assert_frequencies(rising.tolist(), {True: 0.5, False: 0.5})
    assert drawn[:, 128].std() > 0.1


def boxes_of(kind: str, ranges: Boxes, count: int, crop: tuple[int, ...]) -> list[np.ndarray]:
    view = view_with([kind], **{kind: ranges})
    return [plan.views["x"].steps[0].boxes for plan in plans({"x": view}, count, crop=crop) if kinds(plan)]


def test_boxes_have_sides_in_range_and_lie_anywhere() -> None:
    crop = (20, 30, 40)
    drawn = np.concatenate(boxes_of("in_paint", InPaint(count=3, least=3, side=[0.2, 0.4]), 1000, crop))
    assert drawn.shape == (3000, 6)
    for axis, size in enumerate(crop):
        side, start = drawn[:, 3 + axis], drawn[:, axis]
        bounds = np.clip((np.arange(0, size + 1) - 0.5) / size, 0.2, 0.4)  # of the fractions that round to each side
        assert_frequencies(side.tolist(), dict(enumerate(np.diff(np.append(bounds, 0.4)) / 0.2)))
        some = int(0.3 * size)
        assert_equally_probable(start[side == some].tolist(), range(size - some + 1))


def test_sides_in_voxels_are_equally_probable() -> None:
    ranges = CutOut(count=1, least=1, side_voxels=[[4, 4], [3, 6], [1, 10]])
    drawn = np.concatenate(boxes_of("cut_out", ranges, 2000, (16, 16, 16)))
    assert set(drawn[:, 3].tolist()) == {4}
    assert_equally_probable(drawn[:, 4].tolist(), range(3, 7))
    assert_equally_probable(drawn[:, 5].tolist(), range(1, 11))


@pytest.mark.parametrize(("least", "go_on"), [(0, 0.8), (1, 0.8), (2, 0.5), (0, 1.0)])
def test_boxes_go_on_with_their_probability(least: int, go_on: float) -> None:
    ranges = OutPaint(count=4, least=least, go_on=go_on)
    count = [len(boxes) for boxes in boxes_of("out_paint", ranges, 2000, (16, 16, 16))]
    expected = dict.fromkeys(range(5), 0.0)
    for made in range(least, 5):
        expected[made] = go_on ** (made - least) * (1 - go_on if made < 4 else 1.0)
    assert_frequencies(count, expected)


def test_boxes_of_slices_are_one_voxel_deep() -> None:
    drawn = np.concatenate(boxes_of("pixel_shuffle", PixelShuffle(count=50), 5, (40, 60)))
    assert (drawn[:, [0, 3]] == [0, 1]).all()
    assert drawn[:, 4].max() == 4
    assert drawn[:, 5].max() == 6


def test_swapped_patches_are_of_equal_size_and_apart() -> None:
    ranges = PatchSwap(count=10, side=[0.3, 0.5])
    pairs = np.concatenate(boxes_of("patch_swap", ranges, 300, (16, 16, 16))).reshape(-1, 2, 6)
    assert len(pairs) > 2500  # of 3000; some find no room in eight tries
    np.testing.assert_array_equal(pairs[:, 0, 3:], pairs[:, 1, 3:])
    apart = np.abs(pairs[:, 0, :3] - pairs[:, 1, :3]) >= pairs[:, 0, 3:]
    assert apart.any(axis=1).all()


def test_boxes_are_filled_with_the_case_s_own_intensities() -> None:
    for kind, ranges, filled in (
        ("in_paint", InPaint(least=1), [LOW, LOW + SPAN]),
        ("out_paint", OutPaint(), [LOW, LOW + SPAN]),
        ("cut_out", CutOut(least=1, value=0.25), [LOW + 0.25 * SPAN]),
        ("cut_out_outside", CutOutOutside(value=0.0), [LOW]),
    ):
        for step in steps(view_with([kind], **{kind: ranges}), 5):
            assert (step.kind, step.numbers.tolist()) == (kind, filled)


def test_steps_are_made_in_order_and_those_not_named_are_not_made() -> None:
    view = view_with(["bezier", "noise", "patch_swap", "contrast"])
    assert {tuple(kinds(plan)) for plan in plans({"x": view}, 20)} == {("bezier", "noise", "patch_swap", "contrast")}
    assert {tuple(kinds(plan)) for plan in plans({"x": view_with([])}, 5)} == {()}


def test_steps_that_change_nothing_are_left_out() -> None:
    view = view_with(
        ["noise", "blur", "contrast", "brightness", "gamma", "bias_field", "low_resolution", "in_paint", "cut_out"],
        noise=Noise(std=[0, 0]),
        blur=Blur(sigma_voxels=[0, 0]),
        contrast=Contrast(factor=[1, 1]),
        brightness=Brightness(std=0),
        gamma=Gamma(exponent=[1, 1]),
        bias_field=BiasField(coefficient=0),
        low_resolution=LowResolution(factor=[1, 1]),
        in_paint=InPaint(count=0),
        cut_out=CutOut(go_on=0),
    )
    assert {tuple(kinds(plan)) for plan in plans({"x": view}, 20)} == {()}


def test_one_alternative_is_made_at_most_each_with_its_probability() -> None:
    view = view_with(
        ["noise", "cut_out|patch_swap|in_paint"],
        noise=Noise(std=[0.1, 0.1], probability=0.5),
        cut_out=CutOut(probability=0.3, least=1),
        patch_swap=PatchSwap(probability=0.0),
        in_paint=InPaint(probability=0.5, least=1),
    )
    found = [tuple(kinds(plan)) for plan in plans({"x": view}, 4000)]
    parts = {("cut_out",): 0.3, ("in_paint",): 0.5, (): 0.2}
    independent = {first + second: 0.5 * share for first in ((), ("noise",)) for second, share in parts.items()}
    assert_frequencies(found, independent)


def test_the_same_choice_is_of_steps_and_not_of_their_numbers() -> None:
    def two(same: bool) -> list[Plan]:
        shared = {
            "same_choice": same,
            "noise": Noise(probability=0.5),
            "out_paint": OutPaint(probability=0.7),
            "in_paint": InPaint(probability=0.2, least=1),
        }
        view = view_with(["noise", "out_paint|in_paint"], **shared)
        return plans({"a": view, "b": view}, 500)

    assert all(kinds(plan, "a") == kinds(plan, "b") for plan in two(True))
    assert {tuple(kinds(plan, "a")) for plan in two(True)} == {tuple(kinds(plan, "a")) for plan in two(False)}
    assert sum(kinds(plan, "a") != kinds(plan, "b") for plan in two(False)) > 100
    for plan in two(True):
        for one, other in zip(plan.views["a"].steps, plan.views["b"].steps, strict=True):
            assert one.stream != other.stream
            if one.kind == "noise":
                assert one.numbers[0] != other.numbers[0]


def test_every_step_of_every_view_has_a_stream_of_its_own() -> None:
    view = view_with(["noise", "pixel_shuffle", "in_paint", "out_paint"], in_paint=InPaint(least=1))
    (plan,) = plans({"a": view, "b": view}, 1)
    streams = [step.stream for each in plan.views.values() for step in each.steps]
    assert len(set(streams)) == 8
