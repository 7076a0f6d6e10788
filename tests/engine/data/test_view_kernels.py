"""The kernels that make views on a GPU: the very tests of the CPU, and what only a batch can do wrong.

They run emulated, and where there is a GPU on that.
"""

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_view_sampling
import test_view_steps
import torch
from emulated import build
from test_view_sampling import (  # noqa: F401
    BAD,
    affine_about,
    control_points,
    flat_affine,
    smooth,
    test_a_crop_at_an_offset_is_cut_exactly,
    test_a_mask_alone_is_the_same,
    test_a_slice_is_a_view_of_depth_1,
    test_a_view_that_misses_the_region_is_background,
    test_an_affine_and_a_deformation_sample_where_float64_says,
    test_antialiasing_smooths_the_region_along_its_axes,
    test_coordinates_up_to_512_lose_nothing,
    test_field_and_mask_say_where_each_point_lies_in_the_partner,
    test_flips_move_voxels_and_change_none,
    test_float16_regions_are_read_as_the_numbers_that_they_are,
    test_labels_take_the_nearest_voxel,
    test_quarter_turns_move_voxels_and_change_none,
    test_rows_cut_along_the_axes_end_in_background,
    test_the_field_between_a_view_and_itself_is_zero_and_valid_up_to_the_border,
    test_voxels_beyond_the_region_fade_into_the_background,
)
from test_view_steps import (  # noqa: F401
    BAD_STEPS,
    BIAS,
    BOXES,
    KEY,
    TABLE,
    test_a_bias_field_is_the_exponential_of_its_polynomial,
    test_a_constant_view_stays_as_it_is,
    test_all_but_the_boxes_is_filled,
    test_bezier_reads_its_table_between_the_least_and_the_greatest_value,
    test_blur_is_a_gaussian_that_repeats_the_border,
    test_boxes_are_filled,
    test_brightness_adds,
    test_contrast_stretches_about_the_mean,
    test_gamma_bends_between_the_least_and_the_greatest_value,
    test_low_resolution_takes_the_nearest_and_reads_back_linearly,
    test_noise_adds_the_normal_numbers_of_its_stream,
    test_noise_is_the_same_in_every_run,
    test_patches_are_exchanged_pair_after_pair,
    test_pixels_are_shuffled_inside_windows_of_the_view_as_it_was_and_the_last_window_wins,
    test_the_clean_view_is_the_view_before_its_steps,
)
from view_interface import ViewCase, make_view
from view_kernels import EMULATED_SOURCE, OUTPUTS, EmulatedKernels, GpuKernels, ViewKernels

from voxtrast.engine.data import native

# Both backends are within 1e-5 of float64 (relative to the range of the values); a few steps in a row add up.
CLOSE = 1e-5
WINDOWS = [[0, 0, 0, 5, 6, 7], [2, 3, 4, 7, 8, 20], [9, 11, 30, 2, 2, 5], [2, 2, 2, 3, 3, 3], [3, 3, 3, 1, 1, 1]]
STEPS: dict[str, tuple[str, int, Any, Any]] = {
    "noise": ("noise", 1, [0.1], []),
    "blur": ("blur", 2, [0.8], []),
    "contrast": ("contrast", 3, [1.3], []),
    "brightness": ("brightness", 4, [0.2], []),
    "gamma": ("gamma", 5, [1.7, 0], []),
    "bias_field": ("bias_field", 6, BIAS, []),
    "low_resolution": ("low_resolution", 7, [1.6], []),
    "bezier": ("bezier", 8, TABLE, []),
    "pixel_shuffle": ("pixel_shuffle", 9, [], WINDOWS),
    "patch_swap": ("patch_swap", 10, [], [[0, 0, 0, 3, 4, 5], [5, 6, 20, 3, 4, 5]]),
    "in_paint": ("in_paint", 11, [0.5, 1.5], BOXES),
    "out_paint": ("out_paint", 12, [0.5, 1.5], [[1, 1, 1, 9, 10, 30]]),
    "cut_out": ("cut_out", 13, [0.25], BOXES),
    "cut_out_outside": ("cut_out_outside", 14, [0.25], [[0, 1, 2, 10, 11, 30]]),
}
MOVES = ("low_resolution", "pixel_shuffle", "patch_swap", "in_paint", "out_paint", "cut_out", "cut_out_outside")


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(EMULATED_SOURCE, tmp_path_factory.mktemp("views"), (native.build(native.VIEWS),))


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# Backwards, the order that nobody had in mind, is the one for every day.
@pytest.fixture(
    params=[pytest.param("forwards", marks=pytest.mark.slow), "backwards", pytest.param("gpu", marks=ON_A_GPU)],
    autouse=True,
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ViewKernels]:
    """Where the kernels run; there the CPU's tests have their views made, too."""
    views: ViewKernels
    if request.param == "gpu":
        views = GpuKernels(ctypes.CDLL(str(native.build(native.views_cuda_library()))))
    else:
        library = request.getfixturevalue("emulated_library")
        views = EmulatedKernels(library, backwards=request.param == "backwards")

    def one(case: ViewCase, *wanted: str) -> dict[str, Any]:
        return views([case], *wanted)[0]

    monkeypatch.setattr(test_view_sampling, "make_view", one)
    monkeypatch.setattr(test_view_steps, "make_view", one)
    yield views
    views.release()


def full_case(size: tuple[int, int, int] = (11, 13, 35), *names: str, half: bool = False, **changes: Any) -> ViewCase:
    """Everything that a view can have: a deformation, a field that leads to another view, steps."""
    region = (0.5 + smooth((18, 20, 44))).astype(np.float16 if half else np.float32)
    to_volume = affine_about(size, (8.0, 9.5, 21.0))
    other = np.linalg.inv(np.vstack([affine_about(size, (8.5, 9.0, 22.0), angles=(5, 9, -30)), [0, 0, 0, 1]]))[:3]
    shift = np.random.default_rng(3).normal(scale=0.7, size=(3, 6, 6, 9)).astype(np.float32)
    case = ViewCase(region, size, to_volume, from_volume=other, partner=size, background=0.1,
                    steps=[STEPS[name] for name in names], shift=shift, spacing=(6.0, 7.0, 7.5), **KEY)  # fmt: skip
    return dataclasses.replace(case, **changes)


def assert_as_the_cpu(found: dict[str, Any], case: ViewCase, tolerance: float = CLOSE) -> None:
    expected = make_view(case, *(name for name in found if name != "view"))
    for name, array in found.items():
        assert np.isfinite(array).all(), name
        if name == "mask":
            assert (array != expected[name]).mean() < 2e-3  # as near to the border as rounding
        else:
            extent = max(1.0, float(np.abs(expected[name]).max()))
            assert np.abs(array - expected[name]).max() < tolerance * extent, name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [(11, 13, 35), (1, 20, 33), (1, 1, 1), (3, 1, 2), (12, 16, 40)])
def test_every_output_is_that_of_the_cpu(device: ViewKernels, size: tuple[int, int, int], half: bool) -> None:
    case = full_case(size, "noise", "contrast", "gamma", "blur", half=half)
    if size[0] == 1:
        case = dataclasses.replace(case, to_volume=flat_affine(size, (9.0, 21.0), 8))
    (found,) = device([case], *OUTPUTS[1:])
    assert_as_the_cpu(found, case)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_that_of_the_cpu(device: ViewKernels, name: str) -> None:
    case = full_case((11, 13, 35), name, shift=None, to_volume=np.column_stack([np.eye(3), [2.0, 3.0, 4.0]]))
    (found,) = device([case])
    expected = make_view(case)["view"]
    if name in MOVES and name not in ("low_resolution", "in_paint", "out_paint"):
        assert np.array_equal(found["view"], expected)
    assert np.abs(found["view"] - expected).max() < 3e-6 * np.abs(expected).max()


FOLLOWED = [
    ("contrast", "brightness", "contrast"),
    ("gamma", "brightness", "gamma", "bezier"),
    ("gamma", "flipped", "gamma", "contrast"),
    ("gamma", "blur", "gamma"),
    ("contrast", "cut_out", "contrast", "gamma"),
    ("bezier", "low_resolution", "bezier", "noise", "gamma"),
]


@pytest.mark.parametrize("names", FOLLOWED, ids="-".join)
def test_statistics_are_followed_through_steps_or_gathered_anew(device: ViewKernels, names: tuple[str, ...]) -> None:
    flipped = ("contrast", 15, [-0.8], [])
    case = full_case(steps=[flipped if name == "flipped" else STEPS[name] for name in names])
    assert_as_the_cpu(device([case])[0], case, 3e-6)


@pytest.mark.parametrize("seed", range(4))
def test_steps_in_a_row_are_the_steps_one_after_the_other(seed: int) -> None:
    test_view_steps.test_steps_in_a_row_are_the_steps_one_after_the_other(seed)


def different_cases() -> list[ViewCase]:
    everything = list(STEPS)
    return [
        full_case((11, 13, 35), *everything),
        full_case((11, 13, 35)),
        full_case((11, 13, 35), *everything[::-1], half=True, slot=6),
        full_case((9, 20, 40), "gamma", "blur", "noise", antialias=(0.9, 0.0, 1.3), slot=7),
        full_case((11, 13, 35), "pixel_shuffle", "contrast", half=True, antialias=(0.5, 0.5, 0.0), slot=8),
        full_case((2, 3, 5), interpolation="nearest", shift=None, slot=9),
    ]


def test_a_batch_holds_the_views_that_each_slot_has_alone(device: ViewKernels) -> None:
    cases = different_cases()
    together = device(cases, *OUTPUTS[1:])
    for case, found in zip(cases, together, strict=True):
        (alone,) = device([case], *OUTPUTS[1:])
        assert all(np.array_equal(found[name], alone[name]) for name in OUTPUTS)
        assert_as_the_cpu(found, case, 5 * CLOSE)


def test_slots_share_launches(device: ViewKernels) -> None:
    common = ("noise", "brightness", "contrast", "gamma")
    device([full_case((11, 13, 35), *common, slot=slot) for slot in range(5)])
    assert device.launches == {"sample_float32": 1, "finish_statistics": 1, "pass": 1}
    mixed = [full_case((11, 13, 35), *names) for names in (common, ("noise", "blur", *common[1:]), ("blur",))]
    device(mixed)
    assert device.launches == {"sample_float32": 1, "smooth": 3, "finish_statistics": 2, "pass": 2}


def test_steps_up_to_the_first_statistics_are_done_where_the_view_is_sampled(device: ViewKernels) -> None:
    case = full_case((11, 13, 35), "noise", "brightness", "bias_field", "in_paint", "out_paint", "cut_out")
    (found,) = device([case], "clean")
    assert device.launches == {"sample_float32": 1}
    assert_as_the_cpu(found, case)


def test_the_order_of_threads_and_blocks_changes_no_bit(device: ViewKernels, emulated_library: Any) -> None:
    cases = different_cases()
    runs = [device(cases, *OUTPUTS[1:]) for _ in range(5 if isinstance(device, GpuKernels) else 1)]
    if not isinstance(device, GpuKernels):
        runs += [EmulatedKernels(emulated_library, backwards=way)(cases, *OUTPUTS[1:]) for way in (False, True)]
    for run in runs[1:]:
        for first, second in zip(runs[0], run, strict=True):
            assert all(np.array_equal(first[name], second[name]) for name in OUTPUTS)


def test_the_mask_reaches_the_border_of_a_long_row_too(device: ViewKernels) -> None:
    size = (2, 2, 1500)
    to_volume = affine_about(size, (50.0, 50.0, 1000.0), angles=(1.0, -2.0, 0.5))
    inverse = np.linalg.inv(np.vstack([to_volume, [0, 0, 0, 1]]))[:3]
    case = ViewCase(smooth((4, 4, 4)), size, to_volume, from_volume=inverse, volume=(100, 100, 2000))
    (found,) = device([case], "displacement", "mask")
    assert (found["mask"] == 1).all()
    assert np.abs(found["displacement"]).max() < 1e-6


@pytest.mark.parametrize("step", [1, -1])
def test_what_is_not_a_number_stays_in_its_voxel_where_voxels_are_copied(device: ViewKernels, step: int) -> None:
    region = smooth((6, 7, 30)).astype(np.float32)
    region[3, 4, 10] = np.nan
    region[2, 1, 20] = np.inf
    to_volume = np.array([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, step, 3 if step > 0 else 26]])
    case = ViewCase(region, (4, 6, 20), to_volume)
    assert np.array_equal(device([case])[0]["view"], make_view(case)["view"], equal_nan=True)


def test_a_view_of_nothing_but_nan_ends_like_the_cpus(device: ViewKernels) -> None:
    names = ("contrast", "gamma", "bezier", "noise", "blur")
    case = full_case((5, 6, 7), *names)
    case.region[:] = np.nan
    assert np.array_equal(device([case])[0]["view"], make_view(case)["view"], equal_nan=True)


def test_windows_that_cover_the_view_are_all_shuffled(device: ViewKernels) -> None:
    random = np.random.default_rng(0)
    sides = random.integers(1, 8, (300, 3))
    lower = random.integers(0, np.array([11, 13, 35]) - sides + 1)
    case = full_case((11, 13, 35), shift=None, to_volume=np.eye(3, 4))
    case.steps = [("pixel_shuffle", 3, [], np.column_stack([lower, sides])), ("pixel_shuffle", 4, [], [])]
    assert np.array_equal(device([case])[0]["view"], make_view(case)["view"])


# The others do not come through the plan's own checks.
@pytest.mark.parametrize("message", [message for message in BAD if "0 voxels" not in message])
def test_a_plan_that_cannot_be_carried_out_is_refused(device: ViewKernels, message: str) -> None:
    case = dataclasses.replace(ViewCase(smooth((8, 8, 8)), (4, 4, 4)), **BAD[message])
    with pytest.raises(RuntimeError, match=message):
        device([case])


@pytest.mark.parametrize("message", [message for message in BAD_STEPS if "kind" not in message])
def test_a_step_that_cannot_be_carried_out_is_refused(device: ViewKernels, message: str) -> None:
    kind, numbers, boxes = BAD_STEPS[message]
    with pytest.raises(RuntimeError, match=message):
        device([full_case((11, 13, 35), steps=[(kind, 0, numbers, boxes)])])


def test_more_control_points_than_a_gpu_has_room_for_are_refused(device: ViewKernels) -> None:
    shift = np.zeros((3, 4, 4, 9000), np.float32)
    case = full_case((1, 1, 8), shift=shift, spacing=(1.0, 1.0, 0.001))
    with pytest.raises(RuntimeError, match=r"9000 control points along the last axis of 8 voxels.*further apart"):
        device([case])


def test_an_axis_too_long_to_be_smoothed_is_refused(device: ViewKernels) -> None:
    case = ViewCase(np.zeros((1, 1, 30000), np.float32), (1, 1, 30000), steps=[STEPS["blur"]])
    with pytest.raises(RuntimeError, match="an axis of 30000 voxels is to be smoothed; a GPU has room for 24576"):
        device([case])
    shorter = dataclasses.replace(case, size=(1, 1, 20000))
    assert (device([shorter])[0]["view"] == 0).all()
