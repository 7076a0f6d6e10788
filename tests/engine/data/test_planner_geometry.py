"""From the index of a view to the volume: affines, flips, turns, deformations, slices, regions and fields."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from plan_samples import assert_equally_probable, assert_frequencies, assert_uniform, plans
from scipy import interpolate

from voxtrast.engine.data.planner import Plan, ViewPlan, native
from voxtrast.methods.views import AffineRanges, BoxRanges, ElasticRanges, View

STILL = AffineRanges(rotation_degrees=0, scale=[1, 1], translation_voxels=0)
WIDE = AffineRanges(rotation_degrees=60, scale=[0.5, 2.5], shear_degrees=20, translation_voxels=9)


def about(size: tuple[int, ...], **numbers: list[float]) -> NDArray[np.float64]:
    none = {"rotation_degrees": [0, 0, 0], "scale": [1, 1, 1], "shear_degrees": [0, 0, 0], "translation": [0, 0, 0]}
    return np.asarray(native().affine_about_centre(size, **{**none, **numbers}))


def indices(view: ViewPlan) -> NDArray[np.float64]:
    """(3, voxels)"""
    return np.stack(np.meshgrid(*map(np.arange, view.size), indexing="ij")).reshape(3, -1).astype(np.float64)


def spline(view: ViewPlan, index: NDArray[np.float64]) -> NDArray[np.float64]:
    """The deformation at indices (3, N): scipy's cubic B-splines on the knots that plan.h describes."""
    moved = view.control_points.astype(np.float64)
    if moved.size == 0:
        return np.zeros_like(index)
    bases = []
    for axis in range(3):
        knots = (np.arange(moved.shape[axis + 1] + 4) - 3) * view.spacing[axis]
        bases.append(interpolate.BSpline.design_matrix(index[axis], knots, 3, extrapolate=True).toarray())
    return np.einsum("cijk,ni,nj,nk->cn", moved, *bases)


def positions(view: ViewPlan) -> NDArray[np.float64]:
    index = indices(view)
    return view.to_volume[:, :3] @ index + view.to_volume[:, 3:] + spline(view, index)


def affine_in_view(plan: Plan, name: str = "x") -> NDArray[np.float64]:
    """Without the crop's origin: about the identity where nothing moves."""
    affine = plan.views[name].to_volume.copy()
    affine[:, 3] -= plan.origin
    return affine


def test_affine_rotates_then_scales_then_shears_then_translates_about_the_centre() -> None:
    affine = about(
        (11, 21, 31),
        rotation_degrees=[0, 0, 90],  # about the last axis: in the plane of D and H
        scale=[2, 1, 1],
        shear_degrees=[45, 0, 0],  # D moves along H
        translation=[0, 0, 3],
    )
    centre = np.array([5, 10, 15])

    def moved(d: int, h: int, w: int) -> list[float]:
        """Where a step from the centre ends, seen from the centre."""
        return (affine @ [*(centre + np.array([d, h, w])), 1] - centre).tolist()

    assert moved(0, 0, 0) == pytest.approx([0, 0, 3], abs=1e-12)
    # Along H: the rotation turns it to -D, the scale doubles it, the shear finds nothing along H.
    assert moved(0, 1, 0) == pytest.approx([-2, 0, 3], abs=1e-12)
    # Along D: turned to +H, not scaled, sheared by one along D.
    assert moved(1, 0, 0) == pytest.approx([1, 1, 3], abs=1e-12)


@pytest.mark.parametrize("crop", [(16, 17, 18), (16, 17)])
def test_ranges_of_nothing_give_exactly_the_identity(crop: tuple[int, ...]) -> None:
    for view in (View(), View(affine=STILL), View(affine=AffineRanges(probability=0))):
        (plan,) = plans({"x": view}, 1, crop=crop)
        np.testing.assert_array_equal(affine_in_view(plan), np.eye(3, 4))


def test_each_number_of_an_affine_follows_its_law() -> None:
    def drawn(**ranges: object) -> NDArray[np.float64]:
        view = View(affine=AffineRanges(**{**vars(STILL), **ranges}))  # type: ignore[arg-type]
        return np.stack([affine_in_view(plan) for plan in plans({"x": view}, 2000)])

    scale = drawn(scale=[0.5, 2.0])
    for axis in range(3):
        assert_uniform(np.log(scale[:, axis, axis]), np.log(0.5), np.log(2.0))
    shift = drawn(translation_voxels=4.0)
    for axis in range(3):
        assert_uniform(shift[:, axis, 3], -4, 4)
    shear = drawn(shear_degrees=10.0)
    for row, column in ((0, 1), (0, 2), (1, 2)):
        assert_uniform(np.degrees(np.arctan(shear[:, row, column])), -10, 10)
    turn = drawn(rotation_degrees=25.0)[:, :, :3]  # rotation about axis 0 times about 1 times about 2
    assert_uniform(np.degrees(np.arctan2(-turn[:, 1, 2], turn[:, 2, 2])), -25, 25)
    assert_uniform(np.degrees(np.arcsin(-turn[:, 0, 2])), -25, 25)
    assert_uniform(np.degrees(np.arctan2(-turn[:, 0, 1], turn[:, 0, 0])), -25, 25)
    moves = [not np.array_equal(each, np.eye(3, 4)) for each in drawn(translation_voxels=4.0, probability=0.3)]
    assert_frequencies(moves, {True: 0.3, False: 0.7})


def test_slices_turn_scale_and_shift_in_their_plane() -> None:
    for plan in plans({"x": View(affine=WIDE)}, 50, crop=(16, 18)):
        np.testing.assert_array_equal(affine_in_view(plan)[0], [1, 0, 0, 0])
        np.testing.assert_array_equal(affine_in_view(plan)[1:, 0], 0)
    turning = View(affine=AffineRanges(**{**vars(STILL), "rotation_degrees": 20.0}))
    turned = [affine_in_view(plan) for plan in plans({"x": turning}, 2000, crop=(16, 16))]
    assert_uniform([np.degrees(np.arcsin(each[2, 1])) for each in turned], -20, 20)


def test_flips_and_turns_are_those_of_numpy() -> None:
    volume = np.random.default_rng(0).random((6, 9, 9))
    view = View(flips=[0.5, 0.5, 0.5], quarter_turns=True)
    seen = set()
    for plan in plans({"x": view}, 300, crop=(6, 9, 9), shape=(6, 9, 9)):
        found = plan.views["x"]
        image = np.flip(volume, [axis for axis in range(3) if found.flips[axis]])
        image = np.rot90(image, found.quarter_turns, axes=(1, 2))
        index = positions(found).astype(int)
        np.testing.assert_array_equal(volume[tuple(index)].reshape(6, 9, 9), image)
        seen.add((*found.flips, found.quarter_turns))
    assert seen == set(itertools.product((0, 1), (0, 1), (0, 1), range(4)))


def test_flips_and_turns_occur_as_often_as_declared() -> None:
    found = [plan.views["x"] for plan in plans({"x": View(flips=[0.2, 0.0, 1.0], quarter_turns=True)}, 2000)]
    assert_frequencies([view.flips for view in found], {(1, 0, 1): 0.2, (0, 0, 1): 0.8})
    assert_equally_probable([view.quarter_turns for view in found], range(4))


def test_a_box_is_resized_with_voxel_cells_aligned() -> None:
    view = View(size=[8, 16, 32], box=BoxRanges(sides=[[16, 16, 16]]))
    for plan in plans({"x": view}, 20):
        found = plan.views["x"]
        lower = np.array(found.box.lower)[:, None]
        ratio = np.array([[2.0], [1.0], [0.5]])
        np.testing.assert_allclose(positions(found), lower + (indices(found) + 0.5) * ratio - 0.5, atol=1e-12)
        assert found.antialias == (0.5, 0.0, 0.0)  # (2 - 1) / 2 where it shrinks


@pytest.mark.parametrize(("side", "sigma"), [(8, 0.0), (12, 0.0), (13, 0.3125), (32, 1.5)])
def test_only_views_that_shrink_the_volume_markedly_are_smoothed(side: int, sigma: float) -> None:
    view = View(size=[8, 8, 8], box=BoxRanges(sides=[[side, 8, 4]]), flips=[1, 1, 1])
    (plan,) = plans({"x": view}, 1)
    assert plan.views["x"].antialias == (sigma, 0.0, 0.0)
    turned = View(affine=AffineRanges(rotation_degrees=180, scale=[2, 2]))
    for plan in plans({"x": turned}, 5):  # by 2 along each axis of the volume, however it is turned
        np.testing.assert_allclose(plan.views["x"].antialias, 0.5, atol=1e-6)


def test_a_view_of_another_size_shows_the_whole_crop() -> None:
    (plan,) = plans({"x": View(size=[4, 4])}, 1, crop=(16, 16))
    position = positions(plan.views["x"])[1:] - np.array(plan.origin[1:])[:, None]
    np.testing.assert_allclose(position.reshape(2, 4, 4)[0, :, 0], [1.5, 5.5, 9.5, 13.5])


def test_control_points_move_uniformly_within_an_amplitude_that_is_uniform() -> None:
    view = View(elastic=ElasticRanges(spacing_voxels=5.0, magnitude_voxels=[0.5, 2.0]))
    found = [plan.views["x"] for plan in plans({"x": view}, 400)]
    assert {each.control_points.shape for each in found} == {(3, 7, 7, 7)}  # index 15 lies in the fourth interval
    largest = np.array([np.abs(each.control_points).max() for each in found])
    assert_uniform(largest, 0.49, 2.0)  # of 1029 points: nearly the amplitude itself
    relative = np.concatenate([each.control_points.ravel()[:50] for each in found]) / np.repeat(largest, 50)
    assert_uniform(relative * 0.999, -1, 1)
    some = View(elastic=ElasticRanges(spacing_voxels=5.0, magnitude_voxels=[0.5, 2.0], probability=0.25))
    bent = [plan.views["x"].control_points.size > 0 for plan in plans({"x": some}, 1000)]
    assert_frequencies(bent, {True: 0.25, False: 0.75})


def test_a_deformation_is_in_voxels_of_the_view_and_stays_in_its_slice() -> None:
    ranges = ElasticRanges(spacing_voxels=4.0, magnitude_voxels=[1.0, 1.0])
    view = View(size=[16, 16], box=BoxRanges(sides=[[32, 8]]), elastic=ranges)
    for plan in plans({"x": view}, 20, crop=(16, 16)):
        points = plan.views["x"].control_points
        assert points.shape == (3, 4, 7, 7)
        assert not points[0].any()
        assert (points == points[:, :1]).all()
        assert 1.5 < np.abs(points[1]).max() <= 2.0
        assert 0.4 < np.abs(points[2]).max() <= 0.5


def test_the_root_mean_square_of_a_deformation_is_as_documented() -> None:
    for crop, share in (((33, 33, 33), 0.125), ((33, 33), 0.25)):
        view = View(elastic=ElasticRanges(spacing_voxels=8.0, magnitude_voxels=[3.0, 3.0]))
        found = [plan.views["x"] for plan in plans({"x": view}, 60, crop=crop)]
        knots = np.stack([axis.ravel() for axis in np.meshgrid(*[np.arange(0, size, 8) for size in found[0].size])])
        fields = np.stack([spline(each, knots.astype(np.float64))[2] for each in found])
        # On a knot the weights are 1/6, 4/6, 1/6 along an axis: half the variance along each, of m^2 / 3.
        assert fields.std() == pytest.approx(3.0 * np.sqrt(share / 3), rel=0.1)


@pytest.mark.parametrize("crop", [(12, 13, 14), (12, 13)])
def test_the_region_holds_every_neighbour_and_hardly_more(crop: tuple[int, ...]) -> None:
    elastic = ElasticRanges(spacing_voxels=6.0, magnitude_voxels=[0.0, 2.0], probability=0.5)
    views = {"x": View(affine=WIDE, elastic=elastic), "y": View(affine=AffineRanges()), "z": View()}
    shape = (20, 21, 22)
    for plan in plans(views, 60, crop=crop, shape=shape):
        lowest, highest = np.full(3, 99), np.full(3, -99)
        for view in plan.views.values():
            position = positions(view)
            halo = np.ceil(4 * np.array(view.antialias)).astype(int)
            lowest = np.minimum(lowest, np.floor(position.min(axis=1) + 1e-9) - halo)
            highest = np.maximum(highest, np.ceil(position.max(axis=1) - 1e-9) + halo)
        # Whatever lies farther out than one voxel is background, and so is the shell.
        lower, upper = np.array(plan.region.lower), np.array(plan.region.upper)
        lowest, highest = np.clip(lowest, -1, shape), np.clip(highest, -1, shape)
        assert (lower <= lowest).all()
        assert (upper > highest).all()
        assert (lowest - lower <= 1 + 2).all()  # a spline stays away from the hull of its control points
        assert (upper - highest <= 3 + 2).all()
        if len(crop) == 2:
            assert (lower[0], upper[0]) == (plan.origin[0], plan.origin[0] + 1)


def test_the_region_of_voxels_as_they_are_is_the_crop() -> None:
    view = View(flips=[0.5, 0.5, 0.5], quarter_turns=True)
    for plan in plans({"x": view}, 20):
        assert plan.region == plan.crop
    (padded,) = plans({"x": View()}, 1, crop=(16, 16, 16), shape=(10, 15, 16))
    assert vars(padded.region) == {"lower": (-1, 0, 0), "upper": (11, 16, 16)}


def test_a_field_leads_into_the_other_view() -> None:
    views = {
        "crop": View(affine=WIDE, displacement=True),
        "other": View(affine=WIDE, flips=[0.5, 0.5, 0.5], box=BoxRanges(sides=[[20, 20, 20]])),
    }
    for plan in plans(views, 20):
        view = plan.views["crop"]
        assert view.partner_size == (16, 16, 16)
        expected = np.column_stack([np.eye(3), -np.array(plan.origin)])
        np.testing.assert_array_equal(view.from_volume, expected)
    views["crop"].displacement_to = "other"
    for plan in plans(views, 20):
        there = plan.views["other"].to_volume
        back = plan.views["crop"].from_volume
        index = indices(plan.views["other"])
        np.testing.assert_allclose(back[:, :3] @ (there[:, :3] @ index + there[:, 3:]) + back[:, 3:], index, atol=1e-9)


def test_slices_know_their_place_in_the_volume() -> None:
    found = plans({"x": View()}, 600, crop=(16, 16), shape=(5, 40, 40))
    assert_equally_probable([plan.origin[0] for plan in found], range(5))
    assert all(plan.position == plan.origin[0] / 4 for plan in found)
    assert {plan.position for plan in plans({"x": View()}, 5, crop=(16, 16), shape=(1, 40, 40))} == {0.0}
