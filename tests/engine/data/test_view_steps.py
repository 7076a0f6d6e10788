"""Each step of a view against its formula in plain numpy, float64; runs of steps against one after the other."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import random_numbers
from numpy.typing import NDArray
from scipy import ndimage, stats
from view_interface import TARGETS, ViewCase, make_view, permuted, use_target

Array = NDArray[Any]
SIZE = (11, 13, 35)  # whole vectors and a rest
KEY = {"seed": 0x123456789ABCDEF0, "slot": 5, "step": 77}


@pytest.fixture(params=TARGETS, autouse=True, scope="module")
def target(request: pytest.FixtureRequest) -> Iterator[None]:
    if use_target(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield
    use_target(TARGETS[-1])


def image(seed: int = 3) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).normal(size=SIZE)
    return (0.4 + ndimage.gaussian_filter(noise, 1.0)).astype(np.float32)


def after(*steps: tuple[str, int, Any, Any], before: Array | None = None) -> NDArray[np.float32]:
    region = image() if before is None else before
    return make_view(ViewCase(region, region.shape, steps=list(steps), **KEY))["view"]


def assert_close(found: Array, expected: Array, tolerance: float = 2e-6) -> None:
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() < tolerance * max(1.0, float(np.abs(expected).max()))


def philox(count: int, stream: int) -> Array:
    return random_numbers.philox(count, stream, **KEY)


def uniform_numbers(size: tuple[int, ...], stream: int) -> Array:
    return random_numbers.uniform_numbers(size, stream, **KEY)


def normal_numbers(size: tuple[int, ...], stream: int) -> Array:
    return random_numbers.normal_numbers(size, stream, **KEY)


def gamma(v: Array, exponent: float, inverted: bool) -> Array:
    if inverted:
        return v.min() + v.max() - gamma(v.min() + v.max() - v, exponent, False)
    return v.min() + (v.max() - v.min()) * ((v - v.min()) / (v.max() - v.min())) ** exponent


def bias_field(v: Array, numbers: list[float]) -> Array:
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, side) if side > 1 else np.zeros(1) for side in v.shape), indexing="ij")
    powers = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if i + j + k <= 3]
    assert powers == sorted(powers)
    exponent = sum(c * d**i * h**j * w**k for c, (i, j, k) in zip(numbers[1:], powers, strict=True))
    return numbers[0] + (v - numbers[0]) * np.exp(exponent)


def low_resolution(v: Array, factor: float) -> Array:
    for axis, side in enumerate(v.shape):
        coarse = max(1, int(side / factor + 0.5))
        nearest = [(2 * j + 1) * side // (2 * coarse) for j in range(coarse)]
        at = np.clip((np.arange(side) + 0.5) * coarse / side - 0.5, 0, coarse - 1)
        v = np.apply_along_axis(lambda line, at=at, n=nearest: np.interp(at, range(len(n)), line[n]), axis, v)
    return v


def bezier(v: Array, table: Array) -> Array:
    x = (v - v.min()) / (v.max() - v.min())
    return v.min() + (v.max() - v.min()) * np.interp(x, np.linspace(0, 1, len(table)), table)


def box_slices(box: Any) -> tuple[slice, ...]:
    return tuple(slice(low, low + side) for low, side in zip(box[:3], box[3:], strict=True))


def in_boxes(size: tuple[int, ...], boxes: Any) -> NDArray[np.bool_]:
    covered = np.zeros(size, bool)
    for box in boxes:
        covered[box_slices(box)] = True
    return covered


BIAS = [0.1, *np.random.default_rng(1).normal(scale=0.3, size=20).tolist()]
TABLE = np.sort(np.random.default_rng(2).random(256).astype(np.float32))[::-1]
BOXES = [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 20], [0, 0, 34, 11, 13, 1]]


@pytest.mark.parametrize("numbers", [[1.4], [0.6], [0.0], [-0.5]])
def test_contrast_stretches_about_the_mean(numbers: list[float]) -> None:
    v = image().astype(np.float64)
    assert_close(after(("contrast", 0, numbers, [])), v.mean() + numbers[0] * (v - v.mean()))


def test_brightness_adds() -> None:
    assert np.array_equal(after(("brightness", 0, [0.375], [])), image() + np.float32(0.375))


@pytest.mark.parametrize("exponent", [0.5, 0.9, 1.0, 2.3, 5.0])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_bends_between_the_least_and_the_greatest_value(exponent: float, inverted: bool) -> None:
    expected = gamma(image().astype(np.float64), exponent, inverted)
    assert_close(after(("gamma", 0, [exponent, inverted], [])), expected)


@pytest.mark.parametrize("kind", ["gamma", "bezier"])
def test_a_constant_view_stays_as_it_is(kind: str) -> None:
    flat = np.full((3, 4, 20), 0.7, np.float32)
    assert np.array_equal(after((kind, 0, [2.0, 0] if kind == "gamma" else TABLE, []), before=flat), flat)


@pytest.mark.parametrize("size", [SIZE, (1, 13, 40)])
def test_a_bias_field_is_the_exponential_of_its_polynomial(size: tuple[int, int, int]) -> None:
    before = image()[: size[0], : size[1]]
    assert_close(after(("bias_field", 0, BIAS, []), before=before), bias_field(before.astype(np.float64), BIAS))


def test_bezier_reads_its_table_between_the_least_and_the_greatest_value() -> None:
    assert_close(after(("bezier", 0, TABLE, [])), bezier(image().astype(np.float64), TABLE.astype(np.float64)), 1e-5)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.7, 30.0])
def test_blur_is_a_gaussian_that_repeats_the_border(sigma: float) -> None:
    radius = int(np.ceil(4 * np.float32(sigma)))
    expected = ndimage.gaussian_filter(image().astype(np.float64), sigma, mode="nearest", radius=radius)
    assert_close(after(("blur", 0, [sigma], [])), expected)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 3.7, 100.0])
def test_low_resolution_takes_the_nearest_and_reads_back_linearly(factor: float) -> None:
    assert_close(after(("low_resolution", 0, [factor], [])), low_resolution(image().astype(np.float64), factor))


def test_noise_adds_the_normal_numbers_of_its_stream() -> None:
    for size in (SIZE, (1, 1, 3), (5, 1, 67)):
        noise = after(("noise", 9, [1.0], []), before=np.zeros(size, np.float32))
        assert np.abs(noise - normal_numbers(size, 9)).max() < 2e-6


def test_noise_is_normal_and_independent_of_its_neighbours() -> None:
    flat = np.zeros((64, 64, 64), np.float32)
    noise = after(("noise", 1, [2.0], []), before=flat).astype(np.float64)
    other = after(("noise", 2, [2.0], []), before=flat).astype(np.float64)
    assert stats.kstest(noise.ravel() / 2, "norm").pvalue > 1e-3
    bound = 4 / np.sqrt(noise.size)
    lagged = [np.corrcoef(noise.ravel()[:-lag], noise.ravel()[lag:])[0, 1] for lag in (1, 2, 3, 4, 64)]
    assert np.abs(lagged).max() < bound
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < bound


def test_noise_is_the_same_in_every_run() -> None:
    step = ("noise", 4, [0.3], [])
    assert np.array_equal(after(step), after(step))


@pytest.mark.parametrize("kind", ["in_paint", "cut_out"])
def test_boxes_are_filled(kind: str) -> None:
    covered = in_boxes(SIZE, BOXES)
    low, high = np.float32(-0.5), np.float32(1.5)
    fill = low + (high - low) * uniform_numbers(SIZE, 6).astype(np.float32) if kind == "in_paint" else np.float32(0.25)
    found = after((kind, 6, [low, high] if kind == "in_paint" else [0.25], BOXES))
    assert np.array_equal(found[~covered], image()[~covered])
    assert_close(found, np.where(covered, fill, image()), 1e-7)


@pytest.mark.parametrize("kind", ["out_paint", "cut_out_outside"])
def test_all_but_the_boxes_is_filled(kind: str) -> None:
    covered = in_boxes(SIZE, BOXES)
    fill = 2 + uniform_numbers(SIZE, 6) if kind == "out_paint" else 0.25
    found = after((kind, 6, [2, 3] if kind == "out_paint" else [0.25], BOXES))
    assert np.array_equal(found[covered], image()[covered])
    assert_close(found, np.where(covered, image(), fill), 1e-7)


def test_patches_are_exchanged_pair_after_pair() -> None:
    pairs = np.array([[[0, 0, 0, 3, 4, 5], [5, 6, 20, 3, 4, 5]], [[4, 5, 18, 6, 7, 8], [1, 1, 1, 6, 7, 8]]])
    expected = image()
    for first, second in pairs:
        one, other = expected[box_slices(first)].copy(), expected[box_slices(second)].copy()
        expected[box_slices(first)], expected[box_slices(second)] = other, one
    assert np.array_equal(after(("patch_swap", 0, [], pairs)), expected)


def feistel(index: int, size: int, key: Any) -> int:
    half = 2
    while size > 1 << (2 * half):
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for word in key:
            mixed = ((right ^ int(word)) * 0x9E3779B1) & 0xFFFFFFFF
            mixed = ((mixed ^ mixed >> 15) * 0x85EBCA77) & 0xFFFFFFFF
            left, right = right, left ^ (mixed >> 16 & mask)
        index = left << half | right
        if index < size:
            return index


def test_pixels_are_shuffled_inside_windows_of_the_view_as_it_was_and_the_last_window_wins() -> None:
    windows = [[0, 0, 0, 5, 6, 7], [2, 3, 4, 7, 8, 20], [1, 1, 1, 1, 1, 1], [9, 11, 30, 2, 2, 5], [2, 2, 2, 3, 3, 3]]
    expected, keys = image(), philox(len(windows), 12)
    for window, key in zip(windows, keys, strict=True):
        inside = image()[box_slices(window)]
        taken = [feistel(n, inside.size, key) for n in range(inside.size)]
        expected[box_slices(window)] = inside.ravel()[taken].reshape(inside.shape)
    found = after(("pixel_shuffle", 12, [], windows))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, image())


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 255, 729, 5000])
def test_a_permutation_holds_every_index_once(size: int) -> None:
    key = tuple(int(word) for word in philox(1, size)[0])
    found = permuted(size, key)
    assert sorted(found) == list(range(size))
    assert found == [feistel(n, size, key) for n in range(size)]


def test_every_place_is_reached_about_equally_often() -> None:
    size, draws = 27, 4000
    keys = philox(draws, 3)
    counts = np.zeros((size, size))
    for key in keys:
        counts[np.arange(size), permuted(size, tuple(int(word) for word in key))] += 1
    chi_squared = ((counts - draws / size) ** 2 / (draws / size)).sum()
    assert stats.chi2.sf(chi_squared, (size - 1) ** 2) > 1e-3


STEPS = {
    "gamma": ("gamma", 1, [1.7, 0], []),
    "brightness": ("brightness", 1, [0.2], []),
    "contrast": ("contrast", 1, [1.3], []),
    "flipped contrast": ("contrast", 1, [-0.8], []),
    "noise": ("noise", 1, [0.1], []),
    "bezier": ("bezier", 1, TABLE, []),
    "bias_field": ("bias_field", 1, BIAS, []),
    "blur": ("blur", 1, [0.8], []),
    "cut_out": ("cut_out", 1, [0.0], BOXES),
}


@pytest.mark.parametrize("seed", range(12))
def test_steps_in_a_row_are_the_steps_one_after_the_other(seed: int) -> None:
    """They share passes, and statistics are carried along where a step changes them in a known way."""
    names = np.random.default_rng(seed).choice(list(STEPS), size=7)
    expected = image()
    for name in names:
        expected = after(STEPS[name], before=expected)
    assert_close(after(*(STEPS[name] for name in names)), expected, 1e-5)


def test_the_clean_view_is_the_view_before_its_steps() -> None:
    case = ViewCase(image(), SIZE, steps=list(STEPS.values()), **KEY)
    result = make_view(case, "clean")
    assert np.array_equal(result["clean"], image())
    assert np.array_equal(result["view"], after(*STEPS.values()))
    assert not np.array_equal(result["view"], image())


BAD_STEPS = {
    "there is no step of kind 14": (14, [], []),
    "noise takes 1 numbers, got 2": ("noise", [1, 2], []),
    "blur holds 6 numbers of boxes": ("blur", [1], [BOXES[0]]),
    "not finite": ("brightness", [np.nan], []),
    "sigma of a Gaussian": ("blur", [-1], []),
    "exponent above 0": ("gamma", [0, 0], []),
    "factor of at least 1": ("low_resolution", [0.5], []),
    "in_paint has a box that is empty or leaves": ("in_paint", [0, 1], [[8, 0, 0, 4, 4, 4]]),
    "cut_out has a box that is empty or leaves": ("cut_out", [0], [[0, 0, 0, 4, 0, 4]]),
    "boxes in pairs": ("patch_swap", [], [BOXES[0]]),
    "different sizes": ("patch_swap", [], BOXES[:2]),
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_a_step_that_cannot_be_carried_out_is_refused(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, numbers, boxes = BAD_STEPS[message]
    if kind == 14:
        import view_interface

        monkeypatch.setattr(view_interface, "KINDS", (*view_interface.KINDS, 14))
    with pytest.raises(ValueError, match=message):
        after((kind, 0, numbers, boxes))
