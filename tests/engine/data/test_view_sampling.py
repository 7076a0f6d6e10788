"""Where a view's voxels come from, against scipy in float64; its field and mask, point by point."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from view_interface import IDENTITY, TARGETS, ViewCase, make_view, use_target

RANDOM = np.random.default_rng(11)
BORDER = 1e-5  # kBorder of csrc/view/view.h


@pytest.fixture(params=TARGETS, autouse=True, scope="module")
def target(request: pytest.FixtureRequest) -> Iterator[None]:
    if use_target(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield
    use_target(TARGETS[-1])


def smooth(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 1.0).astype(np.float32)


def affine_about(
    size: tuple[int, ...], centre: tuple[float, ...], *, angles: tuple[float, ...] = (20.0, -10.0, 15.0), scale=1.1
) -> NDArray[np.float64]:
    """Rotated and scaled about the middle of a view, which comes to lie at `centre` of the volume."""
    linear = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() * scale
    middle = (np.asarray(size) - 1) / 2
    return np.column_stack([linear, np.asarray(centre) - linear @ middle])


def flat_affine(size: tuple[int, ...], centre: tuple[float, float], slice_index: int) -> NDArray[np.float64]:
    angle = np.deg2rad(25)
    linear = np.eye(3)
    linear[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    middle = (np.asarray(size) - 1) / 2
    return np.column_stack([linear, np.array([slice_index, *centre]) - linear @ [0, *middle[1:]]])


def control_points(size: tuple[int, ...], spacing: tuple[float, ...], amplitude: float) -> NDArray[np.float32]:
    points = [int((side - 1) / step) + 4 for side, step in zip(size, spacing, strict=True)]
    return RANDOM.normal(scale=amplitude, size=(3, *points)).astype(np.float32)


def spline_weights(size: int, points: int, spacing: float) -> NDArray[np.float64]:
    """(size, points): the cubic B-spline of each control point, point k at (k - 1) spacing."""
    x = np.abs(np.arange(size)[:, None] / spacing - (np.arange(points) - 1))
    return np.where(x < 1, 2 / 3 - x**2 + x**3 / 2, np.where(x < 2, (2 - x) ** 3 / 6, 0.0))


def coordinates(case: ViewCase) -> NDArray[np.float64]:
    """(3, *size): to_volume(p) + elastic(p), in indices of the volume."""
    grid = np.stack(np.meshgrid(*map(np.arange, case.size), indexing="ij")).astype(np.float64)
    result = np.einsum("ij,jdhw->idhw", case.to_volume[:, :3], grid) + case.to_volume[:, 3, None, None, None]
    if case.shift is not None:
        weights = [spline_weights(*each) for each in zip(case.size, case.shift.shape[1:], case.spacing, strict=True)]
        result += np.einsum("cijk,di,hj,wk->cdhw", case.shift.astype(np.float64), *weights, optimize=True)
    return result


def expected_view(case: ViewCase) -> NDArray[np.float64]:
    place = coordinates(case) - np.asarray(case.lower)[:, None, None, None]
    if case.interpolation == "nearest":
        place = np.floor(place + 0.5)
    # A wide margin instead of a mode of scipy: between the last voxel and the next one, values are interpolated.
    padded = np.pad(case.region.astype(np.float64), 2, constant_values=case.background)
    return ndimage.map_coordinates(padded, place + 2, order=1, mode="constant", cval=case.background)


def assert_sampled(case: ViewCase, tolerance: float = 1e-5) -> None:
    expected = expected_view(case)
    assert np.isfinite(expected).all()
    extent = float(case.region.max()) - float(case.region.min())
    assert np.abs(make_view(case)["view"] - expected).max() < tolerance * extent


@pytest.mark.parametrize("size", [(24, 24, 24), (17, 19, 37), (1, 1, 1), (3, 2, 5)])
@pytest.mark.parametrize("elastic", [False, True])
def test_an_affine_and_a_deformation_sample_where_float64_says(size: tuple[int, int, int], elastic: bool) -> None:
    case = ViewCase(smooth((48, 50, 52)), size, affine_about(size, (23.3, 25.1, 26.7)), background=-0.3)
    if elastic:
        spacing = (5.5, 7.0, 6.25)
        case = dataclasses.replace(case, shift=control_points(size, spacing, 1.5), spacing=spacing)
    assert_sampled(case)


def test_coordinates_up_to_512_lose_nothing() -> None:
    size = (2, 3, 500)
    region = RANDOM.normal(size=(5, 6, 520)).astype(np.float32)
    to_volume = np.column_stack([np.diag([0.7, 0.9, 1.013]), [300.4, 401.3, 0.21]])
    assert_sampled(ViewCase(region, size, to_volume, lower=(299, 400, 0)))


def test_voxels_beyond_the_region_fade_into_the_background() -> None:
    size = (20, 22, 40)
    case = ViewCase(smooth((12, 14, 16)) + 3, size, affine_about(size, (5.0, 7.0, 8.0)), background=-2.0)
    expected = expected_view(case)
    assert (expected == -2.0).any()
    assert ((expected > -1.9) & (expected < 1.0)).any(), "no voxel lies between the last one and the background"
    assert_sampled(case)


def test_a_view_that_misses_the_region_is_background() -> None:
    view = make_view(ViewCase(smooth((8, 8, 8)), (4, 5, 20), affine_about((4, 5, 20), (90, 4, 4)), background=1.5))
    assert (view["view"] == 1.5).all()


@pytest.mark.parametrize("flips", [(0,), (2,), (0, 1, 2)])
def test_flips_move_voxels_and_change_none(flips: tuple[int, ...]) -> None:
    region = smooth((9, 10, 35))
    to_volume = IDENTITY.copy()
    for axis in flips:
        to_volume[axis] *= -1
        to_volume[axis, 3] = region.shape[axis] - 1
    view = make_view(ViewCase(region, region.shape, to_volume))["view"]
    assert np.array_equal(view, np.flip(region, flips))


def test_quarter_turns_move_voxels_and_change_none() -> None:
    region = smooth((4, 20, 20))
    to_volume = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 19]])
    view = make_view(ViewCase(region, region.shape, to_volume))["view"]
    assert np.array_equal(view, np.rot90(region, axes=(1, 2)))


def test_a_crop_at_an_offset_is_cut_exactly() -> None:
    region = smooth((12, 13, 40))
    to_volume = np.column_stack([np.eye(3), [103.0, 52.0, 11.0]])
    view = make_view(ViewCase(region, (6, 7, 33), to_volume, lower=(100, 50, 7)))["view"]
    assert np.array_equal(view, region[3:9, 2:9, 4:37])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("first", [-9, -3, 0, 30, 37, 60])
@pytest.mark.parametrize("step", [1, -1])
def test_rows_cut_along_the_axes_end_in_background(dtype: str, first: int, step: int) -> None:
    region = smooth((5, 6, 40)).astype(dtype)
    to_volume = np.array([[1.0, 0, 0, -1], [0, -1, 0, 4], [0, 0, step, first]])
    assert_sampled(ViewCase(region, (8, 9, 20), to_volume, background=-0.5), 1e-12)


def test_labels_take_the_nearest_voxel() -> None:
    size = (18, 20, 35)
    labels = RANDOM.integers(0, 5, (30, 31, 32)).astype(np.float32)
    case = ViewCase(labels, size, affine_about(size, (12.0, 15.2, 16.1)), interpolation="nearest")
    spacing = (6.0, 6.0, 6.0)
    case = dataclasses.replace(case, shift=control_points(size, spacing, 1.0), spacing=spacing)
    distance = np.abs((coordinates(case) + 0.5) - np.round(coordinates(case) + 0.5)).min(axis=0)
    clear = distance > 1e-5  # as near to one voxel as to the next: either is right
    assert clear.mean() > 0.99
    assert np.array_equal(make_view(case)["view"][clear], expected_view(case)[clear])


def test_float16_regions_are_read_as_the_numbers_that_they_are() -> None:
    size = (15, 16, 33)
    region = smooth((30, 30, 30)).astype(np.float16)
    region[:4] *= np.float16(1e-4)  # subnormal numbers among them
    case = ViewCase(region, size, affine_about(size, (10.0, 14.0, 15.0)), background=0.25)
    assert_sampled(case)
    as_float32 = make_view(dataclasses.replace(case, region=region.astype(np.float32)))["view"]
    assert np.array_equal(make_view(case)["view"], as_float32)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_slice_is_a_view_of_depth_1(depth: int) -> None:
    size = (1, 24, 40)
    region = smooth((depth, 60, 60))
    case = ViewCase(region, size, flat_affine(size, (28.0, 31.0), 7), lower=(8 - depth, 0, 0))
    assert_sampled(case)


def test_antialiasing_smooths_the_region_along_its_axes() -> None:
    size = (10, 12, 20)
    region = RANDOM.normal(size=(34, 36, 48)).astype(np.float32)
    case = ViewCase(region, size, affine_about(size, (16.0, 18.0, 24.0), scale=2.0), antialias=(0.9, 0.0, 1.3))
    smoothed = region.astype(np.float64)
    for axis, sigma in ((0, 0.9), (2, 1.3)):
        smoothed = ndimage.gaussian_filter1d(smoothed, sigma, axis, mode="nearest", radius=int(np.ceil(4 * sigma)))
    expected = expected_view(dataclasses.replace(case, region=smoothed))
    assert np.abs(make_view(case)["view"] - expected).max() < 1e-5 * (region.max() - region.min())
    half = dataclasses.replace(case, region=region.astype(np.float16))
    assert np.abs(make_view(half)["view"] - expected).max() < 2e-3 * (region.max() - region.min())


def expected_field(case: ViewCase) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """psi, the mask, and where float64 leaves no doubt about the mask."""
    source = coordinates(case)
    grid = np.stack(np.meshgrid(*map(np.arange, case.size), indexing="ij")).astype(np.float64)
    target = np.einsum("ij,jdhw->idhw", case.from_volume[:, :3], source) + case.from_volume[:, 3, None, None, None]
    first = 1 if case.size[0] == 1 else 0

    def inside(points: NDArray[np.float64], sizes: tuple[int, ...], slack: float) -> NDArray[np.bool_]:
        limits = np.asarray(sizes)[:, None, None, None] - 1 + slack
        return ((points >= -slack) & (points <= limits)).all(axis=0)

    masks = [
        inside(target[first:], (case.partner or case.size)[first:], slack)
        & inside(source, case.volume or case.region.shape, slack)
        for slack in (0.0, 4 * BORDER)
    ]
    return (target - grid)[first:], masks[0], masks[0] == masks[1]


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_field_and_mask_say_where_each_point_lies_in_the_partner(elastic: bool, flat: bool) -> None:
    size, partner = ((1, 26, 35), (1, 22, 30)) if flat else ((18, 20, 35), (16, 24, 28))
    centre = (13.2, 14.1, 17.9)
    to_volume = flat_affine(size, centre[1:], 9) if flat else affine_about(size, centre)
    other = flat_affine(partner, (13.0, 16.0), 9) if flat else affine_about(partner, centre, angles=(5, 9, -30))
    inverse = np.linalg.inv(np.vstack([other, [0, 0, 0, 1]]))[:3]
    case = ViewCase(smooth((24, 28, 30)), size, to_volume, from_volume=inverse, partner=partner, volume=(22, 25, 29))
    if elastic:
        spacing = (6.0, 5.0, 7.5)
        shift = control_points(size, spacing, 2.0)
        shift[0] *= not flat
        case = dataclasses.replace(case, shift=shift, spacing=spacing)
    psi, mask, certain = expected_field(case)
    result = make_view(case, "displacement", "mask")
    assert result["displacement"].shape == psi.shape
    assert np.abs(result["displacement"] - psi).max() < 1e-5 * max(1.0, float(np.abs(psi).max()))
    assert certain.mean() > 0.99
    assert 0.1 < mask.mean() < 0.9
    assert np.array_equal(result["mask"][certain], mask[certain])
    assert np.isin(result["mask"], (0.0, 1.0)).all()


def test_the_field_between_a_view_and_itself_is_zero_and_valid_up_to_the_border() -> None:
    size = (14, 15, 40)
    to_volume = affine_about(size, (35.0, 36.0, 37.0))
    inverse = np.linalg.inv(np.vstack([to_volume, [0, 0, 0, 1]]))[:3]
    case = ViewCase(smooth((70, 70, 70)), size, to_volume, from_volume=inverse)
    result = make_view(case, "displacement", "mask")
    assert np.abs(result["displacement"]).max() < 1e-6
    assert (result["mask"] == 1).all()


def test_a_mask_alone_is_the_same() -> None:
    size = (6, 7, 20)
    case = ViewCase(smooth((20, 20, 20)), size, affine_about(size, (2.0, 9.0, 9.0)))
    assert np.array_equal(make_view(case, "mask")["mask"], make_view(case, "displacement", "mask")["mask"])


BAD = {
    "axis of 0 voxels": {"size": (4, 0, 4)},
    "2\\^29 voxels away": {"to_volume": IDENTITY * 1e9},
    "to_volume leads": {"to_volume": IDENTITY * np.nan},
    "needs 5": {"shift": np.zeros((3, 4, 4, 4), np.float32), "spacing": (2.0, 2.0, 2.0)},
    "spacing of control points": {"shift": np.zeros((3, 9, 9, 9), np.float32), "spacing": (0.0, 2.0, 2.0)},
    "displaced by": {"shift": np.full((3, 9, 9, 9), np.nan, np.float32), "spacing": (2.0, 2.0, 2.0)},
    "sigma of a Gaussian": {"antialias": (0.0, -1.0, 0.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_plan_that_cannot_be_carried_out_is_refused(message: str) -> None:
    case = dataclasses.replace(ViewCase(smooth((8, 8, 8)), (4, 4, 4)), **BAD[message])
    with pytest.raises(ValueError, match=message):
        make_view(case)
