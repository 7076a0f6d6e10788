"""The views of five published methods, as recipes would declare them: every one can be planned as it stands."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from plan_samples import make_case

from voxtrast.engine.config import load_config
from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.engine.runs import build_method
from voxtrast.methods import METHODS, recipe_names
from voxtrast.methods.views import ViewSpec

DIRA_2D = """
crop: [224, 224]
views:
  x1: &view
    box: {scale: [0.2, 1], aspect: [0.75, 1.3333]}
    flips: [0, 0.5]
    clean: true
    appearance:
      order: [brightness, contrast, blur, cut_out|cut_out_outside|patch_swap]
      brightness: {std: 0, shift: [-0.4, 0.4], probability: 0.8}
      contrast: {factor: [0.6, 1.4], probability: 0.8}
      blur: {sigma_voxels: [0.1, 2], probability: 0.5}
      cut_out: {count: 10, least: 1, go_on: 0.9, side_voxels: [[10, 70], [10, 70]], probability: 0.3}
      cut_out_outside: {count: 10, least: 1, go_on: 0.9, side_voxels: [[154, 174], [154, 174]], probability: 0.05}
      patch_swap: {count: 10, side_voxels: [[10, 15], [10, 15]], probability: 0.3}
  x2: *view
"""

DIRA_3D = """
crop: [32, 64, 64]
views:
  x1: &view
    elastic: {spacing_voxels: 16, magnitude_voxels: [0, 4]}
    clean: true
    appearance:
      order: [pixel_shuffle|bezier|in_paint|out_paint]
      pixel_shuffle: {count: 100, probability: 0.25}
      bezier: {probability: 0.25}
      in_paint: {count: 5, least: 1, side_voxels: [[10, 20], [10, 20], [10, 20]], probability: 0.25}
      out_paint: {count: 5, least: 1, probability: 0.25}
  x2: *view
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


# The networks play no part in the views; these are built in no time.
SMALL = {
    2: ["backbone.architecture=plain_unet", "backbone.features=[8,8,8,8,8,8]"],
    3: ["backbone.features=[8,8,8,8]"],
}


def spec_of(declared: str) -> ViewSpec:
    """The views of a recipe, by its name, or those that are written out."""
    if declared in recipe_names():
        dimensions = load_config(declared).backbone.dimensions
        config = load_config(declared, SMALL[dimensions])
        return build_method(config).views
    spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ViewSpec), OmegaConf.create(declared)))
    assert isinstance(spec, ViewSpec)
    return spec


def planned(declared: str, shape: tuple[int, int, int], count: int = 40) -> list[Plan]:
    spec = spec_of(declared)
    planner = Planner([make_case("a", shape)], spec, 0, global_batch=1)
    return [planner.plan(step, 0) for step in range(count)]


def sizes(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: view.size for name, view in plan.views.items()}


@pytest.mark.parametrize(
    ("declared", "shape", "expected"),
    [
        ("pcrl-3d", THORAX, dict.fromkeys(("x1", "x2"), (32, 64, 64))),
        ("pcrl-2d-paper", CHEST, dict.fromkeys(("x1", "x2"), (1, 224, 224))),
        (
            "pcrlv2-3d",
            THORAX,
            dict.fromkeys(("x1", "x2"), (32, 64, 64)) | {f"local{index}": (16, 16, 16) for index in range(1, 7)},
        ),
        (
            "pcrlv2-2d-paper",
            CHEST,
            dict.fromkeys(("x1", "x2"), (1, 224, 224)) | {f"local{index}": (1, 96, 96) for index in range(1, 7)},
        ),
        (DIRA_2D, CHEST, dict.fromkeys(("x1", "x2"), (1, 224, 224))),
        (DIRA_3D, THORAX, dict.fromkeys(("x1", "x2"), (32, 64, 64))),
        (PCL, SLICES, dict.fromkeys(("x1", "x2"), (1, 352, 352))),
        (MACL, SLICES, dict.fromkeys(("i1", "v1"), (1, 512, 512)) | dict.fromkeys(("i2", "v2"), (1, 128, 128))),
    ],
    ids=["pcrl-3d", "pcrl-2d", "pcrlv2-3d", "pcrlv2-2d", "dira-2d", "dira-3d", "pcl", "macl"],
)
def test_the_views_of_a_method_can_be_planned(
    declared: str, shape: tuple[int, int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    for plan in planned(declared, shape):
        assert sizes(plan) == expected
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


def test_slices_of_the_positional_methods_know_where_they_are() -> None:
    for plan in planned(MACL, SLICES):
        assert {view.box.lower[0] for view in plan.views.values()} == {round(plan.position * 39)}
