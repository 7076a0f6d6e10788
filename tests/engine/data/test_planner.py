"""The plan of a slot: what it depends on, the dealing of cases, crops, and what is refused."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from plan_samples import CASES, COVER, assert_equally_probable, make_case

from voxtrast.engine.data.planner import Planner, usable_cases
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import AffineRanges, View, ViewSpec


def test_a_plan_depends_on_its_coordinates_alone() -> None:
    spec = ViewSpec((16, 16, 16), COVER)
    first = Planner(CASES, spec, 3, global_batch=4)
    plans = {(step, slot): first.plan(step, slot).to_bytes() for step in range(5) for slot in range(4)}
    second = Planner(CASES, spec, 3, global_batch=4)
    for step, slot in reversed(plans):  # another order, another planner, other draws in between
        second.plan(99, 1, "validation")
        assert second.plan(step, slot).to_bytes() == plans[step, slot]
    assert len(set(plans.values())) == len(plans)


def test_threads_that_plan_side_by_side_get_the_same_plans() -> None:
    spec = ViewSpec((16, 16, 16), COVER)
    planner = Planner(CASES, spec, 3, global_batch=4)
    places = [(step, slot, split) for step in range(40) for slot in range(4) for split in ("train", "validation")]
    one_by_one = [Planner(CASES, spec, 3, global_batch=4).plan(*place).to_bytes() for place in places]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda place: planner.plan(*place).to_bytes(), places)) == one_by_one


def test_the_numbers_of_a_plan_stay_what_they_are() -> None:
    """Runs of earlier versions are continued by these numbers. Where others are drawn, the changelog says so."""
    plan = Planner(CASES, ViewSpec((16, 16, 16), COVER), 3, global_batch=4).plan(5, 2)
    assert (plan.case_index, plan.origin) == (5, (16, 0, 10))
    affine = [
        [1.1786605877839318, -0.06617287997449191, 0.3265967649853145, 13.243983913955523],
        [0.11708239749463158, 0.8824022149387689, -0.24375413392531645, 4.22226518901011],
        [-0.23896453119021982, 0.28594089248679905, 0.9203385929558119, 11.487417840929059],
    ]
    np.testing.assert_allclose(plan.views["fixed"].to_volume, affine, rtol=0, atol=1e-12)
    steps = {step.kind: step for step in plan.views["moving"].steps}
    assert steps["contrast"].numbers[0] == pytest.approx(0.5313098430633545, abs=1e-7)
    assert steps["brightness"].numbers[0] == pytest.approx(0.02966487593948841, abs=1e-7)
    assert steps["in_paint"].boxes[:2].tolist() == [[0, 7, 0, 2, 2, 2], [5, 11, 4, 2, 2, 2]]
    assert steps["noise"].stream == 4068525283


def test_every_coordinate_changes_the_draws() -> None:
    spec = ViewSpec((16, 16, 16), {"one": View(affine=AffineRanges()), "two": View(affine=AffineRanges())})

    def affine(seed: int = 0, step: int = 0, slot: int = 0, split: str = "train", view: str = "one") -> bytes:
        return Planner(CASES, spec, seed, global_batch=8).plan(step, slot, split).views[view].to_volume.tobytes()

    variants = [
        affine(),
        affine(seed=1),
        affine(step=1),
        affine(slot=1),
        affine(split="validation"),
        affine(view="two"),
    ]
    assert len(set(variants)) == len(variants)
    assert affine(seed=2**64 - 1) != affine()


def test_another_view_leaves_the_others_as_they_were() -> None:
    alone = Planner(CASES, ViewSpec((16, 16, 16), {"fixed": COVER["fixed"]}), 5, global_batch=2).plan(3, 1)
    both = Planner(CASES, ViewSpec((16, 16, 16), COVER), 5, global_batch=2).plan(3, 1)
    assert alone.origin == both.origin
    np.testing.assert_array_equal(alone.views["fixed"].to_volume, both.views["fixed"].to_volume)


@pytest.mark.parametrize("global_batch", [1, 3, 7, 10])
def test_each_epoch_visits_every_case_once(global_batch: int) -> None:
    planner = Planner(CASES, ViewSpec((16, 16, 16), COVER), 1, global_batch=global_batch)
    steps = math.ceil(4 * len(CASES) / global_batch)
    dealt = [planner.plan(step, slot).case_index for step in range(steps) for slot in range(global_batch)]
    epochs = [tuple(dealt[start : start + len(CASES)]) for start in range(0, 4 * len(CASES), len(CASES))]
    assert all(Counter(epoch) == Counter(range(len(CASES))) for epoch in epochs)
    assert len(set(epochs)) == 4  # shuffled anew
    single = Planner(CASES, ViewSpec((16, 16, 16), COVER), 1, global_batch=1)
    assert dealt[:20] == [single.plan(step, 0).case_index for step in range(20)]  # one sequence, however it is cut


def test_several_crops_of_a_visit_are_consecutive_and_differ() -> None:
    spec = ViewSpec((16, 16, 16), COVER)
    planner = Planner(CASES, spec, 1, global_batch=4, crops_per_visit=3)
    plans = [planner.plan(step, slot) for step in range(21) for slot in range(4)]
    visits = [[plan.case_index for plan in plans[start : start + 3]] for start in range(0, len(plans), 3)]
    assert all(len(set(visit)) == 1 for visit in visits)
    single = Planner(CASES, spec, 1, global_batch=1)
    assert [visit[0] for visit in visits] == [single.plan(step, 0).case_index for step in range(28)]
    assert len({plan.origin for plan in plans}) > 75


def test_orders_of_epochs_are_equally_probable() -> None:
    planner = Planner(CASES[:3], ViewSpec((16, 16, 16), {"x": View()}), 1, global_batch=3)
    orders = [tuple(planner.plan(step, slot).case_index for slot in range(3)) for step in range(1200)]
    assert_equally_probable(orders, [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])


MIXED = {"case0": "ct", "case1": "mr", "case2": "mr", "case3": "ct", "case4": "ct", "case5": "ct", "case6": "us"}


def dealt_by_weight(weights: dict[str, float], count: int, batch: int = 5) -> tuple[list[int], int]:
    spec = ViewSpec((16, 16, 16), {"x": View()})
    planner = Planner(CASES, spec, 1, global_batch=batch, groups=MIXED, weights=weights)
    block = sum(planner.visits_in_a_block)
    return [planner.plan(*divmod(place, batch)).case_index for place in range(count)], block


@pytest.mark.parametrize(
    ("weights", "block"),
    [
        ({"ct": 1, "mr": 2, "us": 1}, 4),
        ({"ct": 0.5, "mr": 0.2, "us": 0.3}, 10),
        ({"ct": 0.7123, "mr": 2, "us": 0.01}, None),
    ],
)
def test_data_sets_have_the_share_of_their_weights_in_any_run_of_slots(
    weights: dict[str, float], block: int | None
) -> None:
    dealt, length = dealt_by_weight(weights, 6000)
    assert length == block if block else length == pytest.approx(1024, abs=2)
    total = sum(weights.values())
    for name, weight in weights.items():
        hits = np.cumsum([0, *(MIXED[f"case{index}"] == name for index in dealt)])
        for run in (length, 3 * length, 5000):
            share = (hits[run:] - hits[:-run]) / run
            # A block more or less, and the weights as whole visits of a block.
            assert np.abs(share - weight / total).max() <= length / run + 1 / length


def test_each_data_set_walks_through_epochs_of_its_own() -> None:
    dealt, _ = dealt_by_weight({"ct": 1, "mr": 2, "us": 1}, 3000)
    for name in ("ct", "mr", "us"):
        members = [index for index in range(7) if MIXED[f"case{index}"] == name]
        walk = [index for index in dealt if index in members]
        epochs = [tuple(walk[at : at + len(members)]) for at in range(0, len(walk) - len(members), len(members))]
        assert all(sorted(epoch) == members for epoch in epochs)
        assert len(set(epochs)) == math.factorial(len(members))


def test_the_order_of_data_sets_is_drawn_anew_for_each_block() -> None:
    dealt, block = dealt_by_weight({"ct": 1, "mr": 2, "us": 1}, 4000)
    orders = [tuple(MIXED[f"case{index}"] for index in dealt[at : at + block]) for at in range(0, 4000, block)]
    assert_equally_probable(orders, sorted(set(orders)))
    assert len(set(orders)) == 12


def test_a_resumed_or_divided_run_deals_the_same_cases_of_mixed_data_sets() -> None:
    weights = {"ct": 1, "mr": 2, "us": 1}
    assert dealt_by_weight(weights, 300, batch=1)[0] == dealt_by_weight(weights, 300, batch=7)[0]


@pytest.mark.parametrize(
    ("groups", "weights", "message"),
    [
        (MIXED, {"ct": 1, "mr": 0, "us": 1}, "'mr' is 0"),
        (MIXED, {"ct": 1, "mr": float("nan"), "us": 1}, "'mr' is nan"),
        (MIXED, {"ct": 1, "mr": 1}, "case6.*'us' has no weight"),
        (MIXED, {"ct": 1, "mr": 1, "us": 1, "pet": 1}, "'pet' has a weight and no usable case"),
        ({}, {"ct": 1}, "case0.*None has no weight"),
    ],
)
def test_weights_that_do_not_fit_the_cases_are_refused(
    groups: dict[str, str], weights: dict[str, float], message: str
) -> None:
    spec = ViewSpec((16, 16, 16), {"x": View()})
    with pytest.raises(UserError, match=message):
        Planner(CASES, spec, 0, global_batch=1, groups=groups, weights=weights)


def test_crops_reach_every_part_of_the_volume_and_stay_inside() -> None:
    planner = Planner([make_case("a", (12, 10, 9))], ViewSpec((10, 10, 8), {"x": View()}), 0, global_batch=1)
    origins = Counter(planner.plan(step, 0).origin for step in range(600))
    assert set(origins) == {(d, 0, w) for d in range(3) for w in range(2)}
    assert min(origins.values()) > 60  # of 100 expected, standard deviation 9


def test_a_smaller_volume_is_centred() -> None:
    planner = Planner([make_case("a", (10, 11, 40))], ViewSpec((16, 16, 16), {"x": View()}), 0, global_batch=1)
    origin = planner.plan(0, 0).origin
    assert origin[:2] == (-3, -2)
    assert 0 <= origin[2] <= 24


def test_volumes_below_half_of_the_crop_are_left_out_with_a_reason() -> None:
    cases = [make_case("big", (40, 40, 40)), make_case("half", (16, 40, 40)), make_case("thin", (15, 40, 40))]
    usable, excluded = usable_cases(cases, (32, 32, 32))
    assert [case.id for case in usable] == ["big", "half"]
    assert [(case.id, reason) for case, reason in excluded] == [
        ("thin", "thin: 15x40x40 voxels cover less than half of the crop 32x32x32")
    ]
    assert len(usable_cases(cases, (32, 32))[0]) == 3  # slices are large enough
    planner = Planner(cases, ViewSpec((32, 32, 32), COVER), 0, global_batch=1)
    assert {planner.cases[planner.plan(step, 0).case_index].id for step in range(20)} == {"big", "half"}
    with pytest.raises(UserError, match=r"crop 96x96x96.*largest is 40x40x40.*smaller crop"):
        usable_cases(cases, (96, 96, 96))
    with pytest.raises(UserError, match="empty"):
        usable_cases([], (32, 32, 32))


def test_a_seed_or_batch_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="seed -1"):
        Planner(CASES, ViewSpec((16, 16, 16), COVER), -1, global_batch=1)
    with pytest.raises(UserError, match="global batch 0"):
        Planner(CASES, ViewSpec((16, 16, 16), COVER), 0, global_batch=0)
    with pytest.raises(UserError, match="crops per visit 0"):
        Planner(CASES, ViewSpec((16, 16, 16), COVER), 0, global_batch=1, crops_per_visit=0)
    planner = Planner(CASES, ViewSpec((16, 16, 16), COVER), 0, global_batch=1)
    for step, slot in ((-1, 0), (0, -1), (2**32, 0)):
        with pytest.raises(UserError, match=f"step {step}, slot {slot}"):
            planner.plan(step, slot)
    assert planner.plan(2**32 - 1, 0).step == 2**32 - 1


def test_views_whose_names_share_a_hash_are_refused() -> None:
    one, other = "view80389", "view940946"
    views = {one: View(), other: View()}
    with pytest.raises(UserError, match=f"'{one}/.*'{other}/.*rename"):
        Planner(CASES, ViewSpec((16, 16, 16), views), 0, global_batch=1)
