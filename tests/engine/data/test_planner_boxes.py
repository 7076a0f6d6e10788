"""Boxes of views: where they lie, how they overlap, and that the promised laws hold."""

import itertools

import numpy as np
import pytest
from plan_samples import assert_equally_probable, assert_uniform, make_case, plans

from voxtrast.engine.data.geometry import Box
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import BoxRanges, View, ViewSpec

# PCRL's sizes (x, y, z there) and its overlap.
PCRL_SIDES = [[32, 64, 64], [48, 96, 96], [96, 96, 96], [16, 32, 32], [64, 112, 112]]


def sides(box: Box) -> tuple[int, ...]:
    return box.shape


def iou(first: Box, second: Box) -> float:
    """By brute force, voxel by voxel along each axis."""
    axes = zip(first.lower, first.upper, second.lower, second.upper, strict=True)
    shared = np.prod([len(set(range(a, b)) & set(range(c, d))) for a, b, c, d in axes])
    return float(shared / (np.prod(sides(first)) + np.prod(sides(second)) - shared))


def pair(low: float, high: float, first: list[list[int]], second: list[list[int]]) -> dict[str, View]:
    return {
        "b": View(box=BoxRanges(sides=second, iou_with="a", iou=[low, high])),  # comes before what it refers to
        "a": View(box=BoxRanges(sides=first)),
    }


def boxes(found: list[Plan], name: str) -> list[Box]:
    return [plan.views[name].box for plan in found]


def test_a_box_without_relation_lies_anywhere_with_any_of_its_sides() -> None:
    choices = [[4, 5, 6], [2, 2, 2]]
    found = boxes(plans({"x": View(box=BoxRanges(sides=choices))}, 3000, shape=(9, 10, 11)), "x")
    assert_equally_probable([sides(box) for box in found], [tuple(each) for each in choices])
    for axis, count in enumerate((9 - 2, 10 - 2, 11 - 2)):
        small = [box.lower[axis] for box in found if sides(box) == (2, 2, 2)]
        assert_equally_probable(small, range(count + 1))


def test_boxes_larger_than_the_volume_are_centred_and_far_larger_ones_are_not_taken() -> None:
    views = {"x": View(box=BoxRanges(sides=[[16, 9, 9], [25, 9, 9]]))}
    found = boxes(plans(views, 50, crop=(8, 8, 8), shape=(12, 10, 9)), "x")
    assert {(box.lower[0], box.upper[0]) for box in found} == {(-2, 14)}


@pytest.mark.parametrize(
    ("low", "high", "first", "second", "shape"),
    [
        (0.3, 1.0, PCRL_SIDES, PCRL_SIDES, (128, 160, 160)),
        (0.25, 0.5, PCRL_SIDES, PCRL_SIDES, (96, 128, 128)),
        (0.0, 0.05, [[20, 20, 20]], [[20, 20, 20], [10, 30, 10]], (64, 64, 64)),
        (0.5, 0.6, [[24, 24, 24]], [[24, 24, 24], [20, 24, 30]], (40, 41, 42)),
    ],
)
def test_overlap_is_always_within_its_range_and_reaches_all_of_it(
    low: float, high: float, first: list[list[int]], second: list[list[int]], shape: tuple[int, int, int]
) -> None:
    found = plans(pair(low, high, first, second), 1500, shape=shape)
    overlaps = [iou(plan.views["a"].box, plan.views["b"].box) for plan in found]
    assert low <= min(overlaps)
    assert max(overlaps) <= high
    # PCRL's pairs of unequal sizes rarely share most of their voxels.
    reached = np.histogram(overlaps, bins=8, range=(low, min(high, 0.9)))[0]
    assert (reached > 0).all(), reached
    for name, choices in (("a", first), ("b", second)):
        assert {sides(box) for box in boxes(found, name)} == {tuple(each) for each in choices}
        for box in boxes(found, name):
            assert all(begin >= 0 and end <= size for begin, end, size in zip(*vars(box).values(), shape, strict=True))


def test_every_place_with_the_wanted_overlap_is_equally_probable() -> None:
    """The law of drawing again until the overlap is right, of which every place is listed here."""
    shape, other, mine = (6, 7, 8), [5, 6, 7], [4, 5, 5]
    found = plans(pair(0.2, 0.45, [other], [mine]), 4000, crop=(4, 4, 4), shape=shape)
    placed: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for plan in found:
        placed.setdefault(plan.views["a"].box.lower, []).append(plan.views["b"].box.lower)
    assert len(placed) == 8
    for anchor, lowers in placed.items():
        fixed = Box(anchor, tuple(np.add(anchor, other).tolist()))
        places = itertools.product(*(range(size - side + 1) for size, side in zip(shape, mine, strict=True)))
        wanted = [at for at in places if 0.2 <= iou(fixed, Box(at, tuple(np.add(at, mine).tolist()))) <= 0.45]
        assert_equally_probable(lowers, wanted)


def test_overlapping_boxes_of_slices_share_the_slice() -> None:
    views = pair(0.4, 0.6, [[20, 24]], [[24, 20], [16, 16]])
    for plan in plans(views, 200, crop=(16, 16), shape=(5, 40, 44)):
        first, second = plan.views["a"].box, plan.views["b"].box
        assert (first.lower[0], first.upper[0]) == (second.lower[0], second.upper[0])
        assert first.upper[0] == first.lower[0] + 1
        assert 0.4 <= iou(first, second) <= 0.6


def test_local_boxes_begin_near_the_global_ones() -> None:
    views = pair(0.3, 1.0, [[16, 16, 16]], [[16, 16, 16], [12, 12, 12]])
    views["local"] = View(box=BoxRanges(sides=[[8, 8, 8], [4, 4, 4]], near=["a", "b"], margin_voxels=3))
    found = plans(views, 3000, shape=(40, 50, 60))
    share = []
    for plan in found:
        first, second, local = (plan.views[name].box for name in ("a", "b", "local"))
        for axis, size in enumerate((40, 50, 60)):
            last = size - sides(local)[axis]
            low = np.clip(min(first.lower[axis], second.lower[axis]) - 3, 0, last)
            high = np.clip(max(first.upper[axis], second.upper[axis]) - 1 + 3, 0, last)
            assert low <= local.lower[axis] <= high
            share.append((local.lower[axis] - low + 0.5) / (high - low + 1))
    # Steps of one in twenty or so: uniform to within half of one.
    assert abs(np.mean(share) - 0.5) < 4 / np.sqrt(12 * len(share))
    assert np.histogram(share, bins=4, range=(0, 1))[0].min() > 0.2 * len(share)


def test_a_box_inside_another_stays_there_and_takes_sides_that_fit() -> None:
    views = {
        "outer": View(box=BoxRanges(sides=[[20, 20, 20], [8, 8, 8]])),
        "inner": View(box=BoxRanges(sides=[[4, 5, 6], [12, 12, 12]], inside="outer")),
    }
    found = plans(views, 2000)
    for plan in found:
        outer, inner = plan.views["outer"].box, plan.views["inner"].box
        assert (np.array(inner.lower) >= outer.lower).all()
        assert (np.array(inner.upper) <= outer.upper).all()
    small = [plan for plan in found if sides(plan.views["outer"].box) == (8, 8, 8)]
    assert {sides(plan.views["inner"].box) for plan in small} == {(4, 5, 6)}
    offsets = [plan.views["inner"].box.lower[0] - plan.views["outer"].box.lower[0] for plan in small]
    assert_equally_probable(offsets, range(5))


def test_a_share_of_a_volume_keeps_its_proportions() -> None:
    found = boxes(plans({"x": View(box=BoxRanges(scale=[0.1, 0.9]))}, 2000, shape=(200, 300, 400)), "x")
    assert_uniform([np.prod(sides(box)) / np.prod((200, 300, 400)) for box in found], 0.098, 0.902)
    for box in found:
        np.testing.assert_allclose(np.divide(sides(box), (200, 300, 400)), sides(box)[2] / 400, atol=0.005)


def test_area_and_aspect_of_a_resized_crop_fill_their_ranges() -> None:
    views = {"x": View(box=BoxRanges(scale=[0.2, 0.6], aspect=[3 / 4, 4 / 3]))}
    found = boxes(plans(views, 3000, crop=(64, 64), shape=(3, 1000, 1000)), "x")
    area = [np.prod(sides(box)) / 1e6 for box in found]
    assert_uniform(area, 0.199, 0.601)
    assert_uniform([np.log(sides(box)[1] / sides(box)[2]) for box in found], np.log(0.748), np.log(1.337))


def test_an_area_without_room_for_its_aspect_takes_the_largest_that_has() -> None:
    views = {"x": View(box=BoxRanges(scale=[0.5, 1.0], aspect=[0.5, 2.0]))}
    for box in boxes(plans(views, 100, crop=(64, 64), shape=(3, 100, 800)), "x"):
        assert sides(box) == (1, 100, 200)  # a quarter of the slice


@pytest.mark.parametrize(
    ("low", "high", "first", "second", "message"),
    [
        (0.3, 1.0, [[32, 32, 32]], [[8, 8, 8]], r"'b'.*0.3 to 1 .*32x32x32.*'a'.*40x50x60.*reach 0 to 0.0156"),
        (0.0, 0.1, [[38, 48, 58]], [[38, 48, 58]], r"'b'.*reach 0\.\d+ to 1 "),
        (0.5, 0.51, [[3, 3, 3]], [[3, 3, 3]], "in steps of a voxel"),
        (0.5, 1.0, [[16, 16, 16], [8, 8, 8]], [[16, 16, 16]], "box of 8x8x8"),
    ],
)
def test_an_overlap_that_cannot_be_had_is_refused_with_what_can(
    low: float, high: float, first: list[list[int]], second: list[list[int]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plans(pair(low, high, first, second), 0)


def test_boxes_larger_than_every_volume_are_refused_and_small_volumes_are_left_out() -> None:
    cases = [make_case("small", (20, 20, 20)), make_case("large", (60, 60, 60))]

    def planner(side: int) -> Planner:
        views = {"x": View(box=BoxRanges(sides=[[side] * 3]))}
        return Planner(cases, ViewSpec((16, 16, 16), views), 0, global_batch=1)

    assert [case.id for case in planner(100).cases] == ["large"]
    (excluded,) = planner(100).excluded
    assert (excluded[0].id, excluded[1][:6]) == ("small", "small:")
    assert "covers less than half" in excluded[1]
    with pytest.raises(UserError, match=r"none of 2 volumes holds the boxes.*20x20x20"):
        planner(200)


def test_a_box_that_fits_in_no_outer_box_is_refused() -> None:
    views = {
        "outer": View(box=BoxRanges(sides=[[20, 20, 20], [8, 8, 8]])),
        "inner": View(box=BoxRanges(sides=[[12, 12, 12]], inside="outer")),
    }
    with pytest.raises(UserError, match=r"'inner'.*fits into 8x8x8.*'outer'"):
        plans(views, 0)
