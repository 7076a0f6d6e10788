"""Data sets by folder, and crops drawn around what a volume shows."""

from dataclasses import replace

import numpy as np
import pytest
from plan_samples import CASES, assert_equally_probable, make_case

from voxtrast.engine.data.foreground import foreground_places, otsu_threshold
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.engine.data.sampling import data_sets
from voxtrast.engine.data.store import flat_places
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import BoxRanges, View, ViewSpec

PLACES = ((3, 4, 5), (30, 12, 50), (20, 45, 20))
CASE = replace(make_case("a", (40, 50, 60)), foreground=flat_places(PLACES))


def drawn(foreground: float, count: int = 600, crop: tuple[int, ...] = (16, 16, 16), **views: View) -> list[Plan]:
    spec = ViewSpec(crop, views or {"x": View()})
    planner = Planner([CASE], spec, 3, global_batch=1, foreground=foreground)
    return [planner.plan(step, 0) for step in range(count)]


def holds_in_its_middle(lower: tuple[int, ...], place: tuple[int, ...], crop: tuple[int, ...]) -> bool:
    """Along every axis in the middle half of the crop, or the crop lies at a border of the volume."""
    axes = zip(lower, place, crop, CASE.shape, strict=True)
    return all(
        start + side // 4 <= at <= start + 3 * side // 4 or (start in (0, size - side) and start <= at < start + side)
        for start, at, side, size in axes
    )


def test_a_case_belongs_to_the_longest_folder_that_it_lies_in() -> None:
    cases = [
        replace(make_case(name, (40, 50, 60)), source=source)
        for name, source in (("a", "mr/one.nii.gz"), ("b", "mr/brain/two.nii.gz"), ("c", "ct/x/three.nii.gz"))
    ]
    found = data_sets(cases, {"mr/brain/": 2.0, "mr": 1.0, "ct": 1.0})
    assert found == {"a": "mr", "b": "mr/brain/", "c": "ct"}
    assert data_sets(cases, {"mr": 1.0, ".": 1.0}) == {"a": "mr", "b": "mr", "c": "."}
    assert data_sets(cases, {}) == {}
    with pytest.raises(UserError, match=r"case c \(ct/x/three\.nii\.gz\) lies in none of m, mr"):
        data_sets(cases, {"mr": 1.0, "m": 1.0})


@pytest.mark.parametrize("crop", [(16, 16, 16), (16, 16)])
def test_crops_are_drawn_around_places_that_show_something(crop: tuple[int, ...]) -> None:
    size = (1, 16, 16)[-3:] if len(crop) == 2 else crop
    plans = drawn(1.0, crop=crop)
    assert all(any(holds_in_its_middle(plan.crop.lower, place, size) for place in PLACES) for plan in plans)
    near = [min(range(3), key=lambda i: abs(plan.crop.lower[0] + size[0] // 2 - PLACES[i][0])) for plan in plans]
    if len(crop) == 2:
        assert_equally_probable([plan.crop.lower[0] for plan in plans], [place[0] for place in PLACES])
    assert set(near) == {0, 1, 2}
    assert len({plan.crop.lower for plan in plans}) > 50  # and are not always the same


def test_a_share_of_the_crops_lies_anywhere() -> None:
    def around(plans: list[Plan]) -> float:
        return float(np.mean([any(holds_in_its_middle(p.crop.lower, at, (16,) * 3) for at in PLACES) for p in plans]))

    anywhere = around(drawn(0.0))
    assert anywhere < 0.5
    assert around(drawn(0.5)) == pytest.approx(0.5 + anywhere / 2, abs=0.07)


def test_boxes_that_may_lie_anywhere_follow_and_related_ones_do_not() -> None:
    free, related = View(box=BoxRanges(sides=[[8, 8, 8]])), View(box=BoxRanges(sides=[[4, 4, 4]], inside="free"))
    plans = drawn(1.0, free=free, related=related)
    lowers = [plan.views["free"].box.lower for plan in plans]
    assert all(any(holds_in_its_middle(lower, place, (8, 8, 8)) for place in PLACES) for lower in lowers)
    offsets = [plan.views["related"].box.lower[0] - plan.views["free"].box.lower[0] for plan in plans]
    assert_equally_probable(offsets, range(5))


def test_boxes_of_a_slice_are_drawn_around_places_of_that_slice() -> None:
    case = replace(CASE, foreground=flat_places((*PLACES, (3, 30, 40))))
    spec = ViewSpec((16, 16), {name: View(box=BoxRanges(sides=[[8, 8]])) for name in ("one", "two")})
    planner = Planner([case], spec, 3, global_batch=1, foreground=0.5)
    around = 0
    for step in range(400):
        plan = planner.plan(step, 0)
        shown = [
            any(place[0] == lower[0] and holds_in_its_middle(lower, place, (1, 8, 8)) for place in case.places)
            for lower in (view.box.lower for view in plan.views.values())
        ]
        around += all(shown)
    assert around / 400 == pytest.approx(0.5, abs=0.1), "both or, but for chance, none"


def test_without_foreground_nothing_is_drawn_for_it() -> None:
    planner = Planner([replace(CASE, foreground=())], ViewSpec((16, 16, 16), {"x": View()}), 3, global_batch=1)
    assert all(planner.plan(step, 0).crop == plan.crop for step, plan in enumerate(drawn(0.0, 20)))


def test_an_index_without_places_is_refused() -> None:
    with pytest.raises(UserError, match=r"sampling\.foreground 0\.5: .* case case0 .*prepare into a new folder"):
        Planner(CASES, ViewSpec((16, 16, 16), {"x": View()}), 0, global_batch=1, foreground=0.5)


def test_places_are_where_a_volume_is_bright() -> None:
    generator = np.random.default_rng(0)
    volume = generator.normal(0, 0.1, (120, 130, 140)).astype(np.float16)  # looked at on a coarser grid
    volume[30:60, 50:90, 20:80] += 2
    places = np.array(foreground_places(volume, -0.2, 2.2))
    assert len(places) == 64
    assert ((places >= (30, 50, 20)) & (places < (60, 90, 80))).all()
    assert places[:, 0].max() - places[:, 0].min() >= 25  # all over it
    assert len(np.unique(places[:, 2])) > 10


@pytest.mark.parametrize("values", [[0.0] * 999 + [5.0], [1.0, 2.0]])
def test_few_bright_voxels_are_found_whatever_the_percentiles_say(values: list[float]) -> None:
    volume = np.array(values, np.float32).reshape(1, 1, -1)
    assert foreground_places(volume, 0.0, 0.0) == [[0, 0, len(values) - 1]]


def test_the_threshold_parts_two_classes_best() -> None:
    generator = np.random.default_rng(1)
    values = np.concatenate([generator.normal(0, 0.5, 5000), generator.normal(4, 0.8, 2000)])
    found = otsu_threshold(values, -2.0, 7.0)

    def within(threshold: float) -> float:
        parts = values[values <= threshold], values[values > threshold]
        return sum(part.size * part.var() for part in parts)

    best = min(np.linspace(0.0, 4.0, 500), key=within)
    assert found == pytest.approx(best, abs=9 / 256 * 2)
