"""Specifications that cannot be met are refused when they are made, with what would be right."""

import pytest
from plan_samples import CASES, COVER, view_with

from voxtrast.engine.data.planner import Planner
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import (
    AffineRanges,
    Blur,
    BoxRanges,
    Brightness,
    Contrast,
    ElasticRanges,
    Gamma,
    InPaint,
    LowResolution,
    Noise,
    View,
    ViewSpec,
)

CUBE = (16, 16, 16)
SIDES = [[8, 8, 8]]


def boxed(**box: object) -> View:
    return View(box=BoxRanges(**box))  # type: ignore[arg-type]


def refused(crop: tuple[int, ...], views: dict[str, View], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Planner(CASES, ViewSpec(crop, views), 0, global_batch=1)


@pytest.mark.parametrize(
    ("crop", "views", "message"),
    [
        ((16,), COVER, r"crop \(16,\)"),
        ((16, 0, 16), COVER, "at least 1"),
        (CUBE, {}, "no view"),
        (CUBE, {"mask": View()}, "'mask'.*taken"),
        (CUBE, {"": View()}, "''.*taken"),
        (CUBE, {"a": View(clean=True), "a_clean": View()}, "'a' and 'a_clean' both give 'a_clean'"),
        (CUBE, {"a": View(flips=[0, 0, 0.5]), "a_flips": View()}, "'a' and 'a_flips' both give 'a_flips'"),
        (CUBE, {"a_quarter_turns": View(), "a": View(quarter_turns=True)}, "both give 'a_quarter_turns'"),
        (CUBE, {"a": View(displacement=True), "b": View(displacement=True)}, r"\['a', 'b'\].*one view"),
        (CUBE, {"a": View(displacement_to="b"), "b": View()}, "needs displacement"),
        (CUBE, {"a": View(displacement=True, displacement_to="c")}, "'c' is unknown"),
        (
            CUBE,
            {"a": View(displacement=True, displacement_to="b"), "b": View(elastic=ElasticRanges())},
            "'b'.*deformed",
        ),
    ],
)
def test_views_that_do_not_go_together_are_refused(crop: tuple[int, ...], views: dict[str, View], message: str) -> None:
    refused(crop, views, message)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View(size=[16, 16]), r"size \[16, 16\]: expected 3"),
        (View(size=[16, 0, 16]), "at least 1"),
        (View(affine=AffineRanges(scale=[0.0, 1.0])), r"affine.scale is \[0.0, 1.0\]"),
        (View(affine=AffineRanges(scale=[1.2, 1.0])), "low <= high"),
        (View(affine=AffineRanges(scale=[1.0])), "'x': affine.scale is .*two numbers"),
        (View(affine=AffineRanges(shear_degrees=90)), "shear_degrees"),
        (View(affine=AffineRanges(rotation_degrees=float("nan"))), "rotation_degrees is nan.*finite"),
        (View(affine=AffineRanges(probability=1.5)), "affine.probability is 1.5"),
        (View(elastic=ElasticRanges(spacing_voxels=0.5)), "spacing_voxels"),
        (View(elastic=ElasticRanges(spacing_voxels=10, magnitude_voxels=[0, 4.1])), r"magnitude_voxels.*4\.03"),
        (View(affine=AffineRanges(translation_voxels=1e9)), "'x': affine.translation_voxels"),
        (View(elastic=ElasticRanges(spacing_voxels=1e8, magnitude_voxels=[0, 3e7])), "spacing_voxels"),
        (View(size=[2000, 2000, 2000]), r"'x': size .*less than 2\^31"),
        (View(flips=[0.5]), r"flips \[0.5\]: expected 3"),
        (View(flips=[0.5, 0.5, 1.5]), r"flips\[2\] is 1.5"),
        (View(size=[16, 8, 16], quarter_turns=True), r"quarter_turns.*\[8, 16\]"),
    ],
)
def test_geometry_out_of_range_is_refused(view: View, message: str) -> None:
    refused(CUBE, {"x": view}, message)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (boxed(), "sides and scale, got neither"),
        (boxed(sides=SIDES, scale=[0.1, 0.2]), "sides and scale, got both"),
        (boxed(sides=[[8, 8]]), "expected 3 numbers"),
        (boxed(scale=[0.0, 0.5]), "box.scale"),
        (boxed(scale=[0.1, 0.5], aspect=[1, 1]), "2-D only"),
        (boxed(sides=SIDES, iou_with="y"), "'y' is unknown"),
        (boxed(sides=SIDES, iou=[0.3, 1.0]), "needs box.iou_with"),
        (boxed(sides=SIDES, margin_voxels=3), "needs box.near"),
        (boxed(sides=SIDES, iou_with="a", iou=[0.5, 0.3]), "box.iou is .*low <= high"),
        (boxed(sides=SIDES, iou_with="a", iou=[0.5, 1.3]), r"\[0, 1\]"),
        (boxed(sides=SIDES, iou_with="a", near=["a"]), "iou_with and near are both given"),
        (boxed(scale=[0.1, 0.5], iou_with="a"), "give box.sides"),
        (boxed(sides=SIDES, iou_with="scaled"), "must have box.sides"),
        (boxed(sides=SIDES, inside="scaled"), "give box.scale here too"),
        (boxed(sides=SIDES, inside="x"), "'x': its box refers to itself in a circle"),
        (boxed(sides=SIDES, near=["b"]), "in a circle"),
    ],
)
def test_boxes_that_contradict_themselves_are_refused(view: View, message: str) -> None:
    others = {"a": boxed(sides=SIDES), "b": boxed(sides=SIDES, inside="x"), "scaled": boxed(scale=[0.1, 0.5])}
    if "circle" not in message:
        del others["b"]
    refused(CUBE, {"x": view, **others}, message)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (view_with(["sharpen"]), "names 'sharpen'; expected some of noise, blur"),
        (view_with(["noise", "blur|noise"], blur=Blur(probability=0)), "'noise' twice"),
        (
            view_with(["noise|blur"], noise=Noise(probability=0.7), blur=Blur(probability=0.4)),
            "'noise.blur'.*sum to 1.1",
        ),
        (view_with([], noise=Noise(std=[-0.1, 0.1])), "noise.std"),
        (view_with([], noise=Noise(probability=-0.1)), "noise.probability"),
        (view_with([], blur=Blur(sigma_voxels=[0, float("inf")])), "blur.sigma_voxels.*finite"),
        (view_with(["blur"], blur=Blur(sigma_voxels=[1500, 2000])), r"blur.sigma_voxels.*\[0, 1000\]"),
        (view_with([], functions=["a:b", "c:d", "a:b"]), "'a:b' twice"),
        (view_with([], contrast=Contrast(factor=[1.0])), "contrast.factor"),
        (view_with([], brightness=Brightness(std=-1)), "brightness.std"),
        (view_with([], gamma=Gamma(exponent=[0, 1])), "gamma.exponent"),
        (view_with([], gamma=Gamma(invert=2)), "gamma.invert"),
        (view_with([], low_resolution=LowResolution(factor=[0.5, 2])), "low_resolution.factor"),
        (view_with([], in_paint=InPaint(side=[0.1, 1.3])), "in_paint.side"),
        (view_with([], in_paint=InPaint(side_voxels=[[3, 4]])), "in_paint.side_voxels.*3 pairs"),
        (view_with([], in_paint=InPaint(side_voxels=[[3, 4], [3, 4], [0, 4]])), r"side_voxels\[2\]"),
        (view_with([], in_paint=InPaint(count=-1)), "in_paint.count"),
        (view_with([], in_paint=InPaint(count=2, least=3)), "in_paint.least"),
        (view_with([], in_paint=InPaint(go_on=1.2)), "in_paint.go_on"),
    ],
)
def test_appearances_out_of_range_are_refused(view: View, message: str) -> None:
    refused(CUBE, {"x": view}, message)
