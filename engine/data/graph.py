"""The DALI graph of a view specification: what Python sends for each slot, and the operators that make views of it.

Only operators that DALI brings along; an operator of ours that does all of this in one pass would sit behind the same
two functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...methods.views import AppearanceRanges, ViewSpec
from ..errors import UserError

try:
    from nvidia.dali import Pipeline, fn, math
    from nvidia.dali.types import DALIDataType
except ImportError as error:
    raise UserError("the data plane needs NVIDIA DALI, which is not installed: pip install 'voxtrast[dali]'") from error

# A Gaussian narrower than this is one voxel wide in float32: the blur is the identity, and nothing divides by zero.
SMALLEST_SIGMA_VOXELS = 1e-3
STEPS = ("noise", "blur", "contrast", "brightness", "in_paint")
FLOAT, INTEGER = np.dtype(np.float32), np.dtype(np.int32)
DALI_TYPES = {np.dtype(np.float16): DALIDataType.FLOAT16, FLOAT: DALIDataType.FLOAT, INTEGER: DALIDataType.INT32}

Source = Callable[[], tuple[list[NDArray[Any]], ...]]  # one list an input, one array a slot


@dataclass(frozen=True)
class Input:
    """One array that Python sends for each slot."""

    name: str
    ndim: int
    layout: str = ""
    dtype: np.dtype[Any] = FLOAT


def graph_inputs(spec: ViewSpec, dtype: np.dtype[Any]) -> list[Input]:
    """What Python sends for each slot, in the order in which it is sent."""
    dimensions = len(spec.crop)
    layout = "DHWC"[-dimensions - 1 :]
    inputs = [Input("region", dimensions + 1, layout, dtype)]
    for name, view in spec.views.items():
        if view.affine is None:
            inputs.append(Input(f"{name}/start", 1, dtype=INTEGER))
        else:
            inputs.append(Input(f"{name}/matrix", 2))
        if view.displacement:
            inputs += [Input(part, dimensions + 1) for part in ("rows", "columns", "position_rows", "position_columns")]
            inputs.append(Input("position_limit", 1))
        if view.appearance is not None:
            made = steps_made(view.appearance)
            if "noise" in made:
                inputs.append(Input(f"{name}/noise", dimensions + 1, layout))
                inputs.append(Input(f"{name}/noise_scale", 0))
            if "blur" in made:
                inputs.append(Input(f"{name}/sigma", 0))
            if "contrast" in made or "brightness" in made:
                inputs += [Input(f"{name}/contrast", 0), Input(f"{name}/brightness", 0)]
            if "in_paint" in made:
                inputs += [Input(f"{name}/box_start", 1), Input(f"{name}/box_size", 1)]
                inputs.append(Input(f"{name}/box_fill", dimensions + 1, layout))
    return inputs


def check_views(spec: ViewSpec) -> None:
    """Raises: UserError for views that DALI's built-in operators cannot make: all but affine ones in COVER's order."""
    for name, view in spec.views.items():
        unmade = {
            "size": view.size,
            "box": view.box,
            "elastic": view.elastic,
            "flips": any(view.flips),
            "quarter_turns": view.quarter_turns,
            "clean": view.clean,
            "displacement_to": view.displacement_to,
        }
        for what, wanted in unmade.items():
            if wanted:
                raise UserError(f"view {name!r}: {what} cannot be made by this version's pipeline; leave it out")
        order = [] if view.appearance is None else list(view.appearance.order)
        if [step for step in STEPS if step in order] != order:
            raise UserError(
                f"view {name!r}: appearance.order {order}: this version's pipeline makes {', '.join(STEPS)}, each once "
                "and in this order; leave the others out"
            )


def steps_made(ranges: AppearanceRanges) -> set[str]:
    """The steps of the order that may change anything."""
    nothing = {
        "noise": max(ranges.noise.std) == 0,
        "blur": max(ranges.blur.sigma_voxels) == 0,
        "contrast": list(ranges.contrast.factor) == [1.0, 1.0],
        "brightness": ranges.brightness.std == 0 and list(ranges.brightness.shift) == [0.0, 0.0],
        "in_paint": ranges.in_paint.count == 0,
    }
    return {step for step in ranges.order if not nothing[step]}


def build_pipeline(
    spec: ViewSpec,
    inputs: list[Input],
    source: Source,
    *,
    slots: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
) -> tuple[Pipeline, list[str]]:
    """The DALI pipeline, fed by `source` with arrays in the order of `inputs`, and the names of its outputs.

    The arrays may be read where they are: they must stay alive until the outputs made of them have been taken.
    """
    pipeline = Pipeline(
        batch_size=slots,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch + 1,  # and the step that is being asked for
        exec_dynamic=True,  # every output in memory of its own, which torch may keep for as long as it wants
    )
    with pipeline:
        sent = fn.external_source(
            source=source,
            num_outputs=len(inputs),
            dtype=[DALI_TYPES[item.dtype] for item in inputs],
            ndim=[item.ndim for item in inputs],
            layout=[item.layout for item in inputs],
            no_copy=device_id is None,  # a GPU wants its own copies, in page-locked memory
        )
        nodes = {item.name: node for item, node in zip(inputs, sent, strict=True)}
        outputs = _outputs(spec, nodes, on_gpu=device_id is not None)
        pipeline.set_outputs(*outputs.values())
    pipeline.build()
    return pipeline, list(outputs)


def _outputs(spec: ViewSpec, nodes: dict[str, Any], *, on_gpu: bool) -> dict[str, Any]:
    crop = list(spec.crop)

    def placed(name: str) -> Any:
        return nodes[name].gpu() if on_gpu else nodes[name]

    outputs: dict[str, Any] = {}
    region = placed("region")
    warped_from = fn.cast(region, dtype=DALIDataType.FLOAT)  # pruned by DALI where no view is warped
    for name, view in spec.views.items():
        # Coordinates are clamped: the border of the region is background wherever the volume ends.
        if view.affine is None:
            cut = {"start": nodes[f"{name}/start"], "shape": crop, "axes": list(range(len(crop)))}
            image = fn.slice(region, **cut, out_of_bounds_policy="edge", dtype=DALIDataType.FLOAT)
        else:
            image = fn.warp_affine(warped_from, matrix=nodes[f"{name}/matrix"], size=crop)
        if view.appearance is not None:
            image = _appearance(view.appearance, image, name, len(crop), nodes, placed)
        outputs[name] = image
        if view.displacement:
            outputs["displacement"] = placed("rows") + placed("columns")
            outputs["mask"] = _mask(len(crop), placed)
    return outputs


def _appearance(
    ranges: AppearanceRanges,
    image: Any,
    name: str,
    dimensions: int,
    nodes: dict[str, Any],
    placed: Callable[[str], Any],
) -> Any:
    """Noise, blur, contrast, brightness, boxes: COVER's order."""
    made = steps_made(ranges)
    if "noise" in made:
        image = image + placed(f"{name}/noise") * placed(f"{name}/noise_scale")
    if "blur" in made:
        image = fn.gaussian_blur(image, sigma=nodes[f"{name}/sigma"])
    if "contrast" in made or "brightness" in made:
        contrast = placed(f"{name}/contrast")
        image = image * contrast + (fn.reductions.mean(image) * (1.0 - contrast) + placed(f"{name}/brightness"))
    if "in_paint" in made:
        boxes = {"anchor": nodes[f"{name}/box_start"], "shape": nodes[f"{name}/box_size"]}
        # The fill is zero outside the boxes.
        image = fn.erase(image, **boxes, axis_names="DHW"[-dimensions:]) + placed(f"{name}/box_fill")
    return image


def _mask(dimensions: int, placed: Callable[[str], Any]) -> Any:
    rows, columns, limit = placed("position_rows"), placed("position_columns"), placed("position_limit")
    inside = math.abs(rows[0] + columns[0]) <= limit[0]
    for axis in range(1, dimensions):
        inside = inside & (math.abs(rows[axis] + columns[axis]) <= limit[axis])
    return fn.cast(inside, dtype=DALIDataType.FLOAT)
