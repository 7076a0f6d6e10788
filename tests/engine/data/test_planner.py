"""The plan of a slot: keyed draws, dealing of cases, affines and boxes."""

import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from voxtrast.engine.data.geometry import affine_box, compose_affine, crop_box, identity_affine
from voxtrast.engine.data.planner import Plan, Planner, usable_cases
from voxtrast.engine.data.store import Case
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import AffineRanges, AppearanceRanges, View, ViewSpec

COVER = {"moving": View(appearance=AppearanceRanges()), "fixed": View(affine=AffineRanges(), displacement=True)}


def make_case(name: str, shape: tuple[int, int, int]) -> Case:
    intensity = {"background": 0.0, "low": 0.0, "high": 1.0, "mean": 0.5, "std": 0.3}
    return Case(name, shape, (1.0, 1.0, 1.0), ((0.0,) * 4,) * 4, "mr", "float16", intensity, name, "", "")


CASES = [make_case(f"case{index}", (40, 50, 60)) for index in range(7)]


def content(plan: Plan) -> str:
    with np.printoptions(floatmode="unique", threshold=100_000):
        return repr({**asdict(plan), "split": None})


def test_a_plan_depends_on_its_coordinates_alone() -> None:
    spec = ViewSpec((16, 16, 16), COVER)
    first = Planner(CASES, spec, 3, global_batch=4)
    plans = {(step, slot): content(first.plan(step, slot)) for step in range(5) for slot in range(4)}
    second = Planner(CASES, spec, 3, global_batch=4)
    for step, slot in reversed(plans):  # another order, another planner, other draws in between
        second.plan(99, 1, "validation")
        assert content(second.plan(step, slot)) == plans[step, slot]
    assert len(set(plans.values())) == len(plans)


def test_the_numbers_of_a_plan_stay_what_they_are() -> None:
    """Runs of earlier versions are continued by these numbers. If a new numpy draws others, say so in the changelog."""
    planner = Planner(CASES, ViewSpec((16, 16, 16), COVER), 3, global_batch=4)
    plan = planner.plan(5, 2)
    assert (plan.case_index, plan.origin) == (1, (22, 25, 7))
    affine = [
        [0.8819152379476772, 0.06930848920875468, -0.14343205375561252, 2.412540698276648],
        [-0.0365793642160855, 0.9015081058296236, 0.21070789503849616, -3.866783292670987],
        [0.18656463043586444, -0.2341049679120814, 1.0339998969401367, 0.2883347503610709],
    ]
    np.testing.assert_allclose(plan.views["fixed"].affine, affine, rtol=0, atol=1e-12)
    appearance = plan.views["moving"].appearance
    assert appearance is not None
    assert appearance.contrast == pytest.approx(0.5662710701584452, abs=1e-12)
    assert appearance.brightness == pytest.approx(-0.06956859752390086, abs=1e-12)
    assert appearance.box_start[:4].tolist() == [[8, 9, 9], [1, 2, 1], [3, 9, 9], [0, 7, 12]]
    noise = planner.generator("train", 5, 2, "noise moving").standard_normal(3, np.float32)
    np.testing.assert_allclose(noise, [-1.1510696411132812, 0.45272722840309143, 1.3603187799453735], rtol=1e-6)


def test_every_coordinate_changes_the_draws() -> None:
    spec = ViewSpec((16, 16, 16), {"one": View(affine=AffineRanges()), "two": View(affine=AffineRanges())})

    def affine(seed: int = 0, step: int = 0, slot: int = 0, split: str = "train", view: str = "one") -> bytes:
        return Planner(CASES, spec, seed, global_batch=8).plan(step, slot, split).views[view].affine.tobytes()

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


def test_noise_streams_do_not_overlap() -> None:
    planner = Planner(CASES, ViewSpec((16, 16, 16), COVER), 0, global_batch=2)
    streams = [(0, 0, "noise moving"), (0, 1, "noise moving"), (1, 0, "noise moving"), (0, 0, "boxes moving")]
    draws = np.stack([planner.generator("train", *stream).random(4096) for stream in streams])
    assert len(np.unique(draws)) == draws.size
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 5 / math.sqrt(4096)


def test_another_view_leaves_the_others_as_they_were() -> None:
    alone = Planner(CASES, ViewSpec((16, 16, 16), {"fixed": COVER["fixed"]}), 5, global_batch=2).plan(3, 1)
    both = Planner(CASES, ViewSpec((16, 16, 16), COVER), 5, global_batch=2).plan(3, 1)
    assert alone.origin == both.origin
    np.testing.assert_array_equal(alone.views["fixed"].affine, both.views["fixed"].affine)


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


def test_a_flat_crop_takes_any_slice() -> None:
    planner = Planner([make_case("a", (5, 40, 40))], ViewSpec((16, 16), COVER), 0, global_batch=1)
    plans = [planner.plan(step, 0) for step in range(100)]
    assert {plan.origin[0] for plan in plans} == set(range(5))
    assert plans[0].views["fixed"].affine.shape == (2, 3)


def test_affine_rotates_then_scales_then_shears_then_translates_about_the_centre() -> None:
    crop = (11, 21, 31)
    affine = compose_affine(
        crop,
        rotation_degrees=[0, 0, 90],  # about the last axis: in the plane of D and H
        scale=[2, 1, 1],
        shear_degrees=[45, 0, 0],  # D moves along H
        translation_voxels=[0, 0, 3],
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


def test_ranges_of_nothing_give_exactly_the_identity() -> None:
    still = View(affine=AffineRanges(rotation_degrees=0, scale=[1, 1], translation_voxels=0))
    for crop in ((16, 17, 18), (16, 17)):
        plan = Planner(CASES, ViewSpec(crop, {"x": still}), 0, global_batch=1).plan(0, 0)
        np.testing.assert_array_equal(plan.views["x"].affine, identity_affine(len(crop)))


def test_affines_fill_their_ranges() -> None:
    ranges = AffineRanges(rotation_degrees=0, scale=[0.5, 2.0], translation_voxels=4)
    planner = Planner(CASES, ViewSpec((16, 16, 16), {"x": View(affine=ranges)}), 0, global_batch=1)
    affines = np.stack([planner.plan(step, 0).views["x"].affine for step in range(1000)])
    scale = affines[:, range(3), range(3)]
    assert scale.min() > 0.5
    assert scale.max() < 2
    assert abs(np.log(scale).mean()) < 4 * (np.log(4) / math.sqrt(12)) / math.sqrt(scale.size)  # log-uniform
    shift = affines[:, :, :3] @ np.full(3, 7.5) + affines[:, :, 3] - 7.5
    assert 3.9 < np.abs(shift).max() <= 4
    turning = AffineRanges(rotation_degrees=20, scale=[1, 1], translation_voxels=0)
    planner = Planner(CASES, ViewSpec((16, 16), {"x": View(affine=turning)}), 0, global_batch=1)
    angles = [np.degrees(np.arcsin(planner.plan(step, 0).views["x"].affine[1, 0])) for step in range(500)]
    assert -20 <= min(angles) < -19
    assert 19 < max(angles) <= 20


def test_appearance_fills_its_ranges() -> None:
    ranges = AppearanceRanges(noise_std=[0.1, 0.2], blur_sigma_voxels=[0.5, 1], contrast=[0.5, 1.5], brightness_std=0.1)
    planner = Planner(CASES, ViewSpec((40, 40, 40), {"x": View(appearance=ranges)}), 0, global_batch=1)
    drawn = [planner.plan(step, 0).views["x"].appearance for step in range(1000)]
    for name, low, high in (("noise_std", 0.1, 0.2), ("blur_sigma_voxels", 0.5, 1.0), ("contrast", 0.5, 1.5)):
        values = np.array([getattr(plan, name) for plan in drawn])
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    brightness = np.array([plan.brightness for plan in drawn if plan])
    assert abs(brightness.std() - 0.1) < 4 * 0.1 / math.sqrt(2 * len(brightness))
    size = np.stack([plan.box_size for plan in drawn if plan])
    start = np.stack([plan.box_start for plan in drawn if plan])
    count = (size[..., 0] > 0).sum(axis=1)
    expected = sum(0.95**k for k in range(1, 11))  # boxes go on with probability 0.95, ten at most
    assert abs(count.mean() - expected) < 4 * count.std() / math.sqrt(len(count))
    assert set(np.unique(size)) == {0, 4, 5}  # 10 to 13 % of 40
    assert (start >= 0).all()
    assert (start + size <= 40).all()


def test_boxes_of_voxels_hold_every_tap_of_the_interpolation() -> None:
    generator = np.random.default_rng(0)
    crop, volume = (9, 8, 7), (20, 21, 22)
    index = np.stack(np.meshgrid(*map(np.arange, crop), indexing="ij")).reshape(3, -1)
    for _ in range(50):
        affine = compose_affine(
            crop,
            rotation_degrees=generator.uniform(-60, 60, 3).tolist(),
            scale=generator.uniform(0.5, 2, 3).tolist(),
            shear_degrees=generator.uniform(-20, 20, 3).tolist(),
            translation_voxels=generator.uniform(-9, 9, 3).tolist(),
        )
        origin = generator.integers(-3, 15, 3)
        box = affine_box(affine, origin.tolist(), crop, volume)
        position = affine[:, :3] @ index + affine[:, 3:] + origin[:, None]
        # Whatever lies farther out than one voxel is background, and so is the shell.
        lowest = np.clip(np.floor(position.min(axis=1)), -1, volume)
        highest = np.clip(np.floor(position.max(axis=1)) + 1, -1, volume)
        assert (np.array(box.lower) <= lowest).all()
        assert (np.array(box.upper) > highest).all()
        assert (lowest - box.lower <= 1).all()  # and hardly more
        assert (box.upper - highest <= 3).all()
    assert crop_box((-2, 3, 15), crop, volume).lower == (-1, 3, 15)
    assert crop_box((-2, 3, 15), crop, volume).upper == (7, 11, 22)


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


@pytest.mark.parametrize(
    ("crop", "views", "message"),
    [
        ((16,), COVER, r"crop \(16,\)"),
        ((16, 0, 16), COVER, "at least 1"),
        ((16, 16, 16), {}, "no view"),
        ((16, 16, 16), {"mask": View()}, "'mask'.*taken"),
        ((16, 16, 16), {"a": View(displacement=True), "b": View(displacement=True)}, r"\['a', 'b'\].*one view"),
        ((16, 16, 16), {"a": View(affine=AffineRanges(scale=[0.0, 1.0]))}, "scale.*positive"),
        ((16, 16, 16), {"a": View(affine=AffineRanges(scale=[1.2, 1.0]))}, "low <= high"),
        ((16, 16, 16), {"a": View(affine=AffineRanges(shear_degrees=90))}, "shear_degrees"),
        ((16, 16, 16), {"a": View(appearance=AppearanceRanges(noise_std=[-0.1, 0.1]))}, "noise_std"),
        ((16, 16, 16), {"a": View(appearance=AppearanceRanges(box_side=[0.1, 1.3]))}, "box_side"),
        ((16, 16, 16), {"a": View(appearance=AppearanceRanges(contrast=[1.0]))}, "contrast"),
        ((16, 16, 16), {"a": View(appearance=AppearanceRanges(boxes=-1))}, "boxes"),
    ],
)
def test_a_specification_that_cannot_be_met_is_refused(
    crop: tuple[int, ...], views: dict[str, View], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Planner(CASES, ViewSpec(crop, views), 0, global_batch=1)


def test_a_seed_or_batch_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match="seed -1"):
        Planner(CASES, ViewSpec((16, 16, 16), COVER), -1, global_batch=1)
    with pytest.raises(UserError, match="global batch 0"):
        Planner(CASES, ViewSpec((16, 16, 16), COVER), 0, global_batch=0)
