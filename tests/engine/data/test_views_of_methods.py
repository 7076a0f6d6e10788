"""The views of the recipes: every one can be planned as it stands, and they are what their papers say."""

import numpy as np
import pytest
import torch
from plan_samples import make_case

from voxtrast.engine.config import load_config
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.methods import METHODS, recipe_names
from voxtrast.methods.views import ViewSpec

CHEST, SLICES, THORAX, HIPPOCAMPUS = (1, 600, 560), (40, 512, 500), (150, 220, 220), (24, 33, 23)
LOCAL = [f"local{index}" for index in range(1, 7)]

# Volumes of a size that the recipe is for, and the sizes of its views.
EXPECTED = {
    "cover-2d-paper": (SLICES, {("moving", "fixed"): (1, 384, 384)}),
    "cover-3d": (THORAX, {("moving", "fixed"): (96, 96, 96)}),
    "cover-tiny": ((40, 48, 40), {("moving", "fixed"): (40, 48, 40)}),
    "dira-2d-paper": (CHEST, {("x1", "x2"): (1, 224, 224)}),
    "dira-3d": (THORAX, {("x1", "x2"): (32, 64, 64)}),
    "dira-tiny": (HIPPOCAMPUS, {("x1", "x2"): (24, 32, 24)}),
    "jcl-2d-paper": (SLICES, {("i1", "v1"): (1, 512, 512), ("i2", "v2"): (1, 128, 128)}),
    "jcl-3d": (THORAX, {("i1", "v1"): (32, 96, 96), ("i2", "v2"): (8, 24, 24)}),
    "jcl-tiny": (HIPPOCAMPUS, {("i1", "v1"): (8, 32, 24), ("i2", "v2"): (4, 16, 12)}),
    "mae-3d": (THORAX, {("x",): (96, 96, 96)}),
    "mae-tiny": (HIPPOCAMPUS, {("x",): (24, 32, 24)}),
    "pcl-2d-paper": (SLICES, {("x1", "x2"): (1, 512, 512)}),
    "pcl-3d": (THORAX, {("x1", "x2"): (16, 128, 128)}),
    "pcl-tiny": (HIPPOCAMPUS, {("x1", "x2"): (8, 32, 24)}),
    "pcrl-2d-paper": (CHEST, {("x1", "x2"): (1, 224, 224)}),
    "pcrl-3d": (THORAX, {("x1", "x2"): (32, 64, 64)}),
    "pcrl-tiny": (HIPPOCAMPUS, {("x1", "x2"): (24, 24, 24)}),
    "pcrlv2-2d-paper": (CHEST, {("x1", "x2"): (1, 224, 224), tuple(LOCAL): (1, 96, 96)}),
    "pcrlv2-3d": (THORAX, {("x1", "x2"): (32, 64, 64), tuple(LOCAL): (16, 16, 16)}),
    "pcrlv2-tiny": (HIPPOCAMPUS, {("x1", "x2"): (24, 32, 24), tuple(LOCAL): (8, 8, 8)}),
}


def spec_of(recipe: str) -> ViewSpec:
    config = load_config(recipe)
    with torch.device("meta"):  # the networks play no part
        spec = METHODS[config.method.name](config.method, config.backbone, config.views).views
    assert isinstance(spec, ViewSpec)
    return spec


def planned(recipe: str, shape: tuple[int, int, int], count: int = 40) -> list[Plan]:
    planner = Planner([make_case("a", shape)], spec_of(recipe), 0, global_batch=1)
    return [planner.plan(step, 0) for step in range(count)]


def test_every_recipe_is_planned_here() -> None:
    assert set(EXPECTED) == set(recipe_names())


@pytest.mark.parametrize("recipe", EXPECTED)
def test_the_views_of_a_recipe_can_be_planned(recipe: str) -> None:
    shape, sizes = EXPECTED[recipe]
    expected = {name: size for names, size in sizes.items() for name in names}
    for plan in planned(recipe, shape):
        assert {name: view.size for name, view in plan.views.items()} == expected
        assert (np.array(plan.region.upper) > plan.region.lower).all()


@pytest.mark.parametrize("recipe", ["cover-3d", "cover-2d-paper", "cover-tiny"])
def test_the_views_of_cover_s_recipes_are_the_official_ones(recipe: str) -> None:
    config = load_config(recipe)
    spec = METHODS["cover"](config.method, config.backbone, config.views).views
    planner = Planner([make_case("a", (120, 400, 400))], spec, 0, global_batch=1)
    found = [planner.plan(step, 0).views for step in range(60)]
    # 0.95 for a first box; the others always.
    official = ["noise", "blur", "contrast", "brightness", "in_paint"]
    assert {tuple(step.kind for step in views["moving"].steps) for views in found} == {
        tuple(official),
        tuple(official[:-1]),
    }
    assert not any(views["fixed"].steps for views in found)
    boxes = np.concatenate([step.boxes for views in found for step in views["moving"].steps if step.kind == "in_paint"])
    crop = np.array(spec.crop)
    share = boxes[:, -len(crop) :] / crop
    assert (np.rint(0.1 * crop) <= boxes[:, -len(crop) :]).all()
    assert (boxes[:, -len(crop) :] <= np.rint(0.13 * crop)).all()
    assert share.max() > 0.12


def test_pcrl_paints_both_views_the_same_way() -> None:
    def painted(plan: Plan, name: str) -> list[str]:
        return [step.kind for step in plan.views[name].steps if "paint" in step.kind]

    found = planned("pcrl-3d", THORAX, 60)
    # An in-painting without a box (5 %) is none.
    equal = [painted(plan, "x1") == painted(plan, "x2") for plan in found]
    assert np.mean(equal) > 0.9
    assert {kind for plan in found for kind in painted(plan, "x1")} == {"in_paint", "out_paint"}


@pytest.mark.parametrize("recipe", ["pcl-2d-paper", "jcl-2d-paper"])
def test_slices_of_the_positional_methods_know_where_they_are(recipe: str) -> None:
    for plan in planned(recipe, SLICES):
        assert {view.box.lower[0] for view in plan.views.values()} == {round(plan.position * 39)}


@pytest.mark.parametrize("recipe", ["pcl-3d", "jcl-3d"])
def test_all_views_of_a_slab_show_the_same_place_of_the_first_axis(recipe: str) -> None:
    """But for what the affine and the deformation move; the position is that of the slab."""
    for plan in planned(recipe, THORAX):
        assert {(view.box.lower[0], view.box.upper[0]) for view in plan.views.values()} == {
            (plan.crop.lower[0], plan.crop.upper[0])
        }
        assert not any(view.flips[0] for view in plan.views.values())
    assert len({plan.origin[0] for plan in planned(recipe, THORAX)}) > 10


def test_the_two_views_of_a_slice_are_cropped_and_transformed_independently() -> None:
    plans = planned("pcl-2d-paper", (40, 700, 700))
    assert np.mean([plan.views["x1"].box.lower != plan.views["x2"].box.lower for plan in plans]) > 0.9
    deformed = [bool(np.any(view.control_points)) for plan in plans for view in plan.views.values()]
    assert 0.5 < np.mean(deformed) < 0.85  # 0.67


def test_the_small_views_of_jcl_show_what_the_large_ones_show() -> None:
    for plan in planned("jcl-3d", THORAX, 10):
        large, small = plan.views["i1"], plan.views["i2"]
        assert large.box == small.box
        # Centres of voxels: 4 p + 1.5 of the large view is p of the small one.
        index = np.array([1, 5, 7])
        np.testing.assert_allclose(small.to_volume @ [*index, 1], large.to_volume @ [*(4 * index + 1.5), 1], atol=1e-9)
        for view in (large, small):
            assert not view.steps
            assert not np.any(view.control_points)


def test_the_distortions_of_dira_are_the_official_ones() -> None:
    """At most one that hides or moves something; the query is also made as it was before."""
    kinds = {"pixel_shuffle", "bezier", "in_paint", "out_paint"}
    of_volumes = [plan.views["x1"] for plan in planned("dira-3d", THORAX, 60)]
    assert {tuple(step.kind for step in view.steps) for view in of_volumes} == {(kind,) for kind in kinds}
    # One box: of 10 to 20 voxels a side, or of all but that.
    painted = [step for view in of_volumes for step in view.steps if "paint" in step.kind]
    for step in painted:
        sides = step.boxes[0, 3:] if step.kind == "in_paint" else np.array([32, 64, 64]) - step.boxes[0, 3:]
        assert len(step.boxes) == 1
        assert ((sides >= 10) & (sides <= 20)).all()
    kinds = {"cut_out", "cut_out_outside", "patch_swap"}
    of_slices = [{step.kind for step in plan.views["x1"].steps} & kinds for plan in planned("dira-2d-paper", CHEST, 60)]
    assert all(len(found) <= 1 for found in of_slices)
    assert set().union(*of_slices) == kinds
    for recipe in ("dira-tiny", "dira-3d", "dira-2d-paper"):
        assert spec_of(recipe).views["x1"].clean
