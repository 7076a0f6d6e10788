"""The views of five published methods, as recipes would declare them: every one can be planned as it stands."""

import numpy as np
import pytest
import torch
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

CHEST, SLICES, THORAX, HIPPOCAMPUS = (1, 600, 560), (40, 512, 500), (150, 220, 220), (24, 33, 23)


def spec_of(recipe: str) -> ViewSpec:
    config = load_config(recipe)
    with torch.device("meta"):
        spec = METHODS[config.method.name](config.method, config.backbone, config.views).views
    assert isinstance(spec, ViewSpec)
    return spec


def planned(text: str, shape: tuple[int, int, int], count: int = 40) -> list[Plan]:
    """Of a recipe by its name, or of a specification as YAML."""
    if text in recipe_names():
        spec = spec_of(text)
    else:
        spec = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ViewSpec), OmegaConf.create(text)))
        assert isinstance(spec, ViewSpec)
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
        (DIRA_2D, CHEST, dict.fromkeys(("x1", "x2"), (1, 224, 224))),
        (DIRA_3D, THORAX, dict.fromkeys(("x1", "x2"), (32, 64, 64))),
        ("pcl-2d-paper", SLICES, dict.fromkeys(("x1", "x2"), (1, 512, 512))),
        ("pcl-3d", THORAX, dict.fromkeys(("x1", "x2"), (16, 128, 128))),
        ("pcl-tiny", HIPPOCAMPUS, dict.fromkeys(("x1", "x2"), (8, 32, 24))),
        (
            "jcl-2d-paper",
            SLICES,
            dict.fromkeys(("i1", "v1"), (1, 512, 512)) | dict.fromkeys(("i2", "v2"), (1, 128, 128)),
        ),
        ("jcl-3d", THORAX, dict.fromkeys(("i1", "v1"), (32, 96, 96)) | dict.fromkeys(("i2", "v2"), (8, 24, 24))),
        ("jcl-tiny", HIPPOCAMPUS, dict.fromkeys(("i1", "v1"), (8, 32, 24)) | dict.fromkeys(("i2", "v2"), (4, 16, 12))),
    ],
    ids=[
        "pcrl-3d",
        "pcrl-2d",
        "pcrlv2-3d",
        "pcrlv2-2d",
        "dira-2d",
        "dira-3d",
        "pcl-2d-paper",
        "pcl-3d",
        "pcl-tiny",
        "jcl-2d-paper",
        "jcl-3d",
        "jcl-tiny",
    ],
)
def test_the_views_of_a_method_can_be_planned(
    text: str, shape: tuple[int, int, int], expected: dict[str, tuple[int, ...]]
) -> None:
    for plan in planned(text, shape):
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

    found = planned(PCRL_3D, THORAX, 60)
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
