"""Refuses view specifications that cannot be met, each with the value that is wrong and what would be right.

What depends on the volumes (boxes that fit, overlaps that can be had) is checked where the cases are known.
"""

import math
from collections.abc import Sequence
from dataclasses import fields

from ...methods.views import (
    AffineRanges,
    AppearanceRanges,
    Bezier,
    Boxes,
    BoxRanges,
    ElasticRanges,
    Gamma,
    View,
    ViewSpec,
)
from ..errors import UserError

RESERVED_NAMES = ("displacement", "mask", "affine", "case", "origin", "position")
# A spline whose control points move further than their distance divided by this may fold (Choi and Lee, 2000).
FOLDS_BEYOND = {2: 2.046, 3: 2.479}
STEPS = tuple(item.name for item in fields(AppearanceRanges) if item.name not in ("order", "functions", "same_choice"))

Bounds = tuple[str, Sequence[float], float, float]  # what, its values in rising order, smallest, largest


def check_spec(spec: ViewSpec) -> None:
    """Raises: UserError for a specification that no volume could meet."""
    crop = list(spec.crop)
    if len(crop) not in (2, 3) or min(crop) < 1:
        raise UserError(f"crop {tuple(crop)}: expected two (H, W) or three (D, H, W) sizes of at least 1")
    if not spec.views:
        raise UserError("the view specification names no view; expected at least one")
    outputs: dict[str, str] = {}  # and the view that each comes from
    for name, view in spec.views.items():
        for output in outputs_of(name, view):
            if not name or output in RESERVED_NAMES:
                raise UserError(
                    f"view {name!r}: the name is taken by the batch itself; choose none of {RESERVED_NAMES}"
                )
            if output in outputs:
                raise UserError(f"views {outputs[output]!r} and {name!r} both give {output!r}; rename one")
            outputs[output] = name
        _check_view(name, view, spec)
    asking = [name for name, view in spec.views.items() if view.displacement]
    if len(asking) > 1:
        raise UserError(f"views {asking} all ask for a displacement, and a batch holds one; leave it on for one view")


def outputs_of(name: str, view: View) -> list[str]:
    """What a batch holds of a view, under these names."""
    wanted = {"clean": view.clean, "flips": any(view.flips), "quarter_turns": view.quarter_turns}
    return [name, *(f"{name}_{what}" for what, is_wanted in wanted.items() if is_wanted)]


def _check_view(name: str, view: View, spec: ViewSpec) -> None:
    axes = len(spec.crop)
    size = list(spec.crop if view.size is None else view.size)
    if len(size) != axes or min(size) < 1:
        raise UserError(f"view {name!r}: size {size}: expected {axes} numbers of at least 1")
    ranges: list[Bounds] = []
    if view.box is not None:
        _check_box(name, view.box, spec)
        ranges += _box_ranges(view.box)
    if view.affine is not None:
        ranges += _affine_ranges(view.affine)
    if view.elastic is not None:
        ranges += _elastic_ranges(view.elastic, axes)
    ranges += [(f"flips[{axis}]", (chance,), 0.0, 1.0) for axis, chance in enumerate(view.flips)]
    if len(view.flips) not in (0, axes):
        raise UserError(f"view {name!r}: flips {list(view.flips)}: expected {axes} probabilities, or none")
    if view.quarter_turns and size[-1] != size[-2]:
        raise UserError(f"view {name!r}: quarter_turns need equal sides on the last two axes, not {size[-2:]}")
    if view.appearance is not None:
        _check_order(name, view.appearance)
        ranges += _appearance_ranges(name, view.appearance, axes)
    for what, values, smallest, largest in ranges:
        _check_bounds(name, what, values, smallest, largest)
    _check_displacement(name, view, spec)


def _check_bounds(name: str, what: str, values: Sequence[float], smallest: float, largest: float) -> None:
    finite = all(math.isfinite(value) for value in values)
    if finite and smallest <= values[0] <= values[-1] <= largest:
        return
    expected = f"low <= high in [{smallest:g}, {largest:g}]" if len(values) > 1 else f"[{smallest:g}, {largest:g}]"
    found = list(values) if len(values) > 1 else values[0]
    raise UserError(f"view {name!r}: {what} is {found}; expected {expected}, and finite")


def _pair(what: str, values: Sequence[float], smallest: float, largest: float) -> Bounds:
    if len(values) != 2:
        raise UserError(f"{what} is {list(values)}; expected two numbers, low <= high")
    return what, values, smallest, largest


def _box_ranges(box: BoxRanges) -> list[Bounds]:
    found = [_pair("box.iou", box.iou, 0.0, 1.0), ("box.margin_voxels", (box.margin_voxels,), 0.0, math.inf)]
    if box.scale is not None:
        found.append(_pair("box.scale", box.scale, 1e-6, 1.0))
    if box.aspect is not None:
        found.append(_pair("box.aspect", box.aspect, 1e-3, 1e3))
    return found


def _check_box(name: str, box: BoxRanges, spec: ViewSpec) -> None:
    axes, here = len(spec.crop), f"view {name!r}: box"
    if bool(box.sides) == (box.scale is not None):
        raise UserError(f"{here}: expected one of sides and scale, got {'both' if box.sides else 'neither'}")
    for sides in box.sides:
        if len(sides) != axes or min(sides) < 1:
            raise UserError(f"{here}.sides {list(sides)}: expected {axes} numbers of at least 1")
    if box.aspect is not None and (box.scale is None or axes == 3):
        raise UserError(f"{here}.aspect {list(box.aspect)}: goes with box.scale in 2-D only; leave it out")
    relations = {"iou_with": box.iou_with, "near": box.near, "inside": box.inside}
    given = [key for key, value in relations.items() if value]
    if len(given) > 1:
        raise UserError(f"{here}: {' and '.join(given)} are both given, and a box has one relation; keep one")
    for other in (*box.near, *([box.iou_with] if box.iou_with else []), *([box.inside] if box.inside else [])):
        if other not in spec.views:
            raise UserError(f"{here}.{given[0]}: view {other!r} is unknown; expected one of {list(spec.views)}")
    if box.iou_with is None and list(box.iou) != [0.0, 1.0]:
        raise UserError(f"{here}.iou {list(box.iou)}: needs box.iou_with, the view that the overlap is with")
    if box.margin_voxels and not box.near:
        raise UserError(f"{here}.margin_voxels {box.margin_voxels}: needs box.near, the views that it is measured from")
    _check_partner(here, box, spec)


def _check_partner(here: str, box: BoxRanges, spec: ViewSpec) -> None:
    """Only where the sides of the other box are known beforehand can it be said that a place is always found."""
    other = None if box.iou_with is None else spec.views[box.iou_with].box
    if box.iou_with is not None and box.scale is not None:
        raise UserError(f"{here}.scale {list(box.scale)}: with iou_with the sides must be known; give box.sides")
    if other is not None and (other.scale is not None or other.inside is not None):
        raise UserError(
            f"{here}.iou_with {box.iou_with!r}: that view's box must have box.sides and lie anywhere in the volume; "
            "take another view, or give it box.sides without inside"
        )
    outer = None if box.inside is None else spec.views[box.inside].box
    if box.sides and outer is not None and outer.scale is not None:
        raise UserError(f"{here}.sides: the sides of view {box.inside!r} vary with its scale; give box.scale here too")


def _affine_ranges(affine: AffineRanges) -> list[Bounds]:
    return [
        _pair("affine.scale", affine.scale, 1e-3, 1e3),
        ("affine.rotation_degrees", (affine.rotation_degrees,), 0.0, math.inf),
        ("affine.shear_degrees", (affine.shear_degrees,), 0.0, 89.0),
        ("affine.translation_voxels", (affine.translation_voxels,), 0.0, math.inf),
        ("affine.probability", (affine.probability,), 0.0, 1.0),
    ]


def _elastic_ranges(elastic: ElasticRanges, axes: int) -> list[Bounds]:
    return [
        ("elastic.spacing_voxels", (elastic.spacing_voxels,), 1.0, math.inf),
        _pair("elastic.magnitude_voxels", elastic.magnitude_voxels, 0.0, elastic.spacing_voxels / FOLDS_BEYOND[axes]),
        ("elastic.probability", (elastic.probability,), 0.0, 1.0),
    ]


def _check_order(name: str, appearance: AppearanceRanges) -> None:
    named = [step for entry in appearance.order for step in entry.split("|")]
    for step in named:
        if step not in STEPS:
            raise UserError(f"view {name!r}: appearance.order names {step!r}; expected some of {', '.join(STEPS)}")
        if named.count(step) > 1:
            raise UserError(f"view {name!r}: appearance.order names {step!r} twice; a step has one place")
    for entry in appearance.order:
        total = sum(getattr(appearance, step).probability for step in entry.split("|"))
        if total > 1 + 1e-9:
            raise UserError(
                f"view {name!r}: appearance.order {entry!r}: the probabilities sum to {total:g}, and one of the steps "
                "is made at most; lower them to a sum of 1"
            )


def _appearance_ranges(name: str, appearance: AppearanceRanges, axes: int) -> list[Bounds]:
    found = [
        _pair("appearance.noise.std", appearance.noise.std, 0.0, math.inf),
        _pair("appearance.blur.sigma_voxels", appearance.blur.sigma_voxels, 0.0, math.inf),
        _pair("appearance.contrast.factor", appearance.contrast.factor, -math.inf, math.inf),
        ("appearance.brightness.std", (appearance.brightness.std,), 0.0, math.inf),
        _pair("appearance.brightness.shift", appearance.brightness.shift, -math.inf, math.inf),
        _pair("appearance.gamma.exponent", appearance.gamma.exponent, 1e-3, 1e3),
        ("appearance.bias_field.coefficient", (appearance.bias_field.coefficient,), 0.0, math.inf),
        _pair("appearance.low_resolution.factor", appearance.low_resolution.factor, 1.0, math.inf),
    ]
    for step in STEPS:
        ranges = getattr(appearance, step)
        found.append((f"appearance.{step}.probability", (ranges.probability,), 0.0, 1.0))
        if isinstance(ranges, Gamma | Bezier):
            found.append((f"appearance.{step}.invert", (ranges.invert,), 0.0, 1.0))
        if isinstance(ranges, Boxes):
            found += _boxes_ranges(f"appearance.{step}", ranges)
            if len(ranges.side_voxels) not in (0, axes):
                raise UserError(
                    f"view {name!r}: appearance.{step}.side_voxels {ranges.side_voxels}: expected {axes} pairs"
                )
    return found


def _boxes_ranges(here: str, boxes: Boxes) -> list[Bounds]:
    return [
        (f"{here}.count", (boxes.count,), 0.0, 1e6),
        (f"{here}.least", (boxes.least,), 0.0, boxes.count),
        (f"{here}.go_on", (boxes.go_on,), 0.0, 1.0),
        _pair(f"{here}.side", boxes.side, 0.0, 1.0),
        *(_pair(f"{here}.side_voxels[{axis}]", pair, 1.0, 2**20) for axis, pair in enumerate(boxes.side_voxels)),
    ]


def _check_displacement(name: str, view: View, spec: ViewSpec) -> None:
    other = view.displacement_to
    if other is None:
        return
    if not view.displacement:
        raise UserError(f"view {name!r}: displacement_to {other!r} needs displacement=true")
    if other not in spec.views:
        raise UserError(f"view {name!r}: displacement_to: view {other!r} is unknown; expected {list(spec.views)}")
    if spec.views[other].elastic is not None:
        raise UserError(
            f"view {name!r}: displacement_to {other!r}: that view is deformed, and no field leads into it; "
            "deform this view instead, or take another"
        )
