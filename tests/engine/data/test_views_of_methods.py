"""The views of five published methods, as recipes would declare them: every one can be planned as it stands."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from plan_samples import make_case

from voxtrast.engine.config import load_config
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.methods import METHODS, recipe_names
from voxtrast.methods.views import ViewSpec

PCRL_3D = """
crop: [32, 64, 64]
views:
  x1: &view             # the view is y = A_t(x): the method turns it back by the code, flips and quarter turns
    box: &sides {sides: [[32, 64, 64], [48, 96, 96], [96, 96, 96], [16, 32, 32], [64, 112, 112]]}
    affine: {rotation_degrees: 10, scale: [0.9, 1.1], translation_voxels: 0}
    flips: [0.5, 0.5, 0.5]
    quarter_turns: true
    clean: true
    appearance:
      order: [blur, pixel_shuffle, out_paint|in_paint]
      same_choice: true
      blur: {sigma_voxels: [0, 2]}
      pixel_shuffle: {count: 10000, side: [0, 0.1], probability: 0.5}
      out_paint: {count: 5, side: [0.4286, 0.5714], probability: 0.72}
      in_paint: {count: 5, side: [0.1667, 0.3333], probability: 0.18}
  x2:
    <<: *view
    box: {<<: *sides, iou_with: x1, iou: [0.25, 1]}
"""

PCRL_2D = """
crop: [224, 224]
views:
  x1: &view
    box: {scale: [0.2, 1], aspect: [0.75, 1.3333]}
    affine: {rotation_degrees: 10, scale: [1, 1], translation_voxels: 0}
    flips: [0, 0.5]
    quarter_turns: true
    clean: true
    appearance:
      order: [blur, brightness, contrast, cut_out]
      blur: {sigma_voxels: [0.1, 2], probability: 0.5}
      brightness: {std: 0, shift: [-0.4, 0.4]}
      contrast: {factor: [0.6, 1.4]}
      cut_out: {count: 3, least: 3, side_voxels: [[32, 32], [32, 32]]}
  x2: *view
"""

PCRLV2_3D = """
crop: [32, 64, 64]
views:
  x1: &global
    box: &sides {sides: [[32, 64, 64], [48, 96, 96], [96, 96, 96], [16, 32, 32], [64, 112, 112]]}
    flips: [0.5, 0.5, 0.5]
    clean: true
    appearance: &appearance
      order: [blur, noise, gamma, patch_swap]
      patch_swap: {count: 1, side_voxels: [[4, 4], [4, 4], [8, 8]]}
  x2:
    <<: *global
    box: {<<: *sides, iou_with: x1, iou: [0.3, 1]}
  local1: &local
    size: [16, 16, 16]
    box: {sides: [[16, 32, 32], [16, 16, 16], [32, 32, 32], [8, 8, 8]], near: [x1, x2], margin_voxels: 3}
    appearance: {<<: *appearance, order: [blur, noise, gamma]}
  local2: *local
  local3: *local
  local4: *local
  local5: *local
  local6: *local
"""

PCRLV2_2D = """
crop: [224, 224]
views:
  x1: &global
    box: {scale: [0.3, 1], aspect: [0.75, 1.3333]}
    flips: [0, 0.5]
    clean: true
    appearance: {order: [cut_out], cut_out: {count: 3, least: 3, side_voxels: [[32, 32], [32, 32]]}}
  x2: *global
  local1: &local
    size: [96, 96]
    box: {scale: [0.05, 0.3], aspect: [0.75, 1.3333]}
    affine: {rotation_degrees: 10, scale: [1, 1], translation_voxels: 0}
    flips: [0, 0.5]
  local2: *local
"""

PCL = """
crop: [352, 352]
views:
  x1: &view
    box: {sides: [[352, 352]]}
    affine: {rotation_degrees: 180, scale: [0.7, 1.3], translation_voxels: 0, probability: 0.67}
    # a Gaussian of 15.5 voxels moves neighbours alike over as many voxels as these control points are apart
    elastic: {spacing_voxels: 28, magnitude_voxels: [3.2, 13], probability: 0.67}
    flips: [0.5, 0.5]
  x2: *view
"""

MACL = """
crop: [512, 512]
views:
  i1: {}
  i2: {size: [128, 128]}
  v1: &spatial
    affine: {rotation_degrees: 180, scale: [0.7, 1.3], translation_voxels: 0, probability: 0.67}
    elastic: {spacing_voxels: 28, magnitude_voxels: [3.2, 13], probability: 0.67}
    flips: [0.5, 0.5]
  v2:
    <<: *spatial
    size: [128, 128]
    elastic: {spacing_voxels: 7, magnitude_voxels: [0.8, 3.25], probability: 0.67}
"""

CHEST, SLICES, THORAX = (1, 600, 560), (40, 512, 500), (150, 220, 220)


def declared(text: str) -> ViewSpec:
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ViewSpec), OmegaConf.create(text)))
    assert isinstance(spec, ViewSpec)
    return spec


def of_recipe(name: str) -> ViewSpec:
    config = load_config(name)
    spec: ViewSpec = METHODS[config.method.name](config.method, config.backbone, config.views).views
    return spec


def planned(text: str, shape: tuple[int, int, int], count: int = 40) -> list[Plan]:
    spec = of_recipe(text) if text in recipe_names() else declared(text)
    planner = Planner([make_case("a", shape)], spec, 0, global_batch=1)
    return [planner.plan(step, 0) for step in range(count)]


def sizes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: view.size for name, view in plan.views.items()}


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        (PCRL_3D, THORAX, dict.fromkeys(("x1", "x2"), (32, 64, 64))),
        (PCRL_2D, CHEST, dict.fromkeys(("x1", "x2"), (1, 224, 224))),
        (
            PCRLV2_3D,
            THORAX,
            dict.fromkeys(("x1", "x2"), (32, 64, 64)) | {f"local{index}": (16, 16, 16) for index in range(1, 7)},
        ),
        (
            PCRLV2_2D,
            CHEST,
            dict.fromkeys(("x1", "x2"), (1, 224, 224)) | dict.fromkeys(("local1", "local2"), (1, 96, 96)),
        ),
        ("dira-2d-paper", CHEST, dict.fromkeys(("x1", "x2"), (1, 224, 224))),
        ("dira-3d", THORAX, dict.fromkeys(("x1", "x2"), (32, 64, 64))),
        (PCL, SLICES, dict.fromkeys(("x1", "x2"), (1, 352, 352))),
        (MACL, SLICES, dict.fromkeys(("i1", "v1"), (1, 512, 512)) | dict.fromkeys(("i2", "v2"), (1, 128, 128))),
    ],
    ids=["pcrl-3d", "pcrl-2d", "pcrlv2-3d", "pcrlv2-2d", "dira-2d", "dira-3d", "pcl", "macl"],
)
def test_the_views_of_a_method_can_be_planned(
    text: str, shape: tuple[int, int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    for plan in planned(text, shape):
        assert sizes(plan) == expected
        assert (np.array(plan.region.upper) > plan.region.lower).all()


@pytest.mark.parametrize("recipe", ["cover-3d", "cover-2d-paper", "cover-tiny"])
def test_the_views_of_cover_s_recipes_are_the_official_ones(recipe: str) -> None:
    spec = of_recipe(recipe)
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

    found = planned(PCRL_3D, THORAX, 60)
    # An in-painting without a box (5 %) is none.
    equal = [painted(plan, "x1") == painted(plan, "x2") for plan in found]
    assert np.mean(equal) > 0.9
    assert {kind for plan in found for kind in painted(plan, "x1")} == {"in_paint", "out_paint"}


def test_slices_of_the_positional_methods_know_where_they_are() -> None:
    for plan in planned(MACL, SLICES):
        assert {view.box.lower[0] for view in plan.views.values()} == {round(plan.position * 39)}


def test_the_distortions_of_dira_are_the_official_ones() -> None:
    """At most one that hides or moves something; the query is also made as it was before."""
    kinds = {"pixel_shuffle", "bezier", "in_paint", "out_paint"}
    of_volumes = [plan.views["x1"] for plan in planned("dira-3d", THORAX, 60)]
    assert {tuple(step.kind for step in view.steps) for view in of_volumes} == {(kind,) for kind in kinds}
    kinds = {"cut_out", "cut_out_outside", "patch_swap"}
    of_slices = [{step.kind for step in plan.views["x1"].steps} & kinds for plan in planned("dira-2d-paper", CHEST, 60)]
    assert all(len(found) <= 1 for found in of_slices)
    assert set().union(*of_slices) == kinds
    for recipe in ("dira-tiny", "dira-3d", "dira-2d-paper"):
        assert of_recipe(recipe).views["x1"].clean
