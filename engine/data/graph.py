"""The DALI graph of a view specification: what Python sends for each slot, and the operators that make views of it.

Every slot sends two small arrays: its file, open, and its plan. Our own operators (csrc/dali/) read the region and make
each view of it in one go: on the GPU that holds the results, where the operators were compiled for one.
"""

import warnings
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from ...methods.views import ViewSpec
from ..errors import UserError
from .native import load_plugin
from .user_functions import apply_function, functions_of

try:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType
except ImportError as error:
    raise UserError("the data plane needs NVIDIA DALI, which is not installed: pip install 'voxtrast[dali]'") from error

OPERATORS: Any = fn  # ours appear there when the plugin is loaded

# Of each slot its file, its plan and, where views ask for functions of the user, the numbers for those.
Source = Callable[[], tuple[list[NDArray[Any]], ...]]


def build_pipeline(
    spec: ViewSpec,
    source: Source,
    *,
    half: bool,
    slots: int,
    threads: int,
    device_id: int | None,
    prefetch: int,
) -> tuple[Pipeline, list[str]]:
    """The DALI pipeline, fed by `source`, and the names of its outputs: (slots, *size), fields (slots, D, *size).

    Files and arrays are read where they are: they must stay open and alive until the outputs made of them have been
    taken. `half`: all volumes are float16, and their regions stay so.

    Raises: UserError where the operators cannot be compiled.
    """
    without_cuda = load_plugin()
    on_gpu = device_id is not None and without_cuda is None
    if device_id is not None and not on_gpu:
        warnings.warn(
            f"views are made on the CPU and copied to GPU {device_id}, at a fraction of its speed: {without_cuda}",
            RuntimeWarning,
            stacklevel=3,
        )
    pipeline = Pipeline(
        batch_size=slots,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch + 1,  # and the step that is being asked for
        exec_dynamic=True,  # every output in memory of its own, which torch may keep for as long as it wants
    )
    with pipeline:
        types, axes = [DALIDataType.INT64, DALIDataType.UINT8], [1, 1]
        if functions_of(spec):
            types, axes = [*types, DALIDataType.FLOAT], [*axes, 2]
        files, plans, *numbers = fn.external_source(
            source=source, num_outputs=len(axes), dtype=types, ndim=axes, no_copy=True
        )
        region = OPERATORS.voxtrast_read(files, plans, half=half)
        outputs = _views(spec, region, plans, on_gpu)
        _apply_functions(spec, outputs, *numbers)
        if device_id is not None:
            outputs = {name: output.gpu() for name, output in outputs.items()}
        pipeline.set_outputs(*outputs.values())
    pipeline.build()
    return pipeline, list(outputs)


def _views(spec: ViewSpec, region: Any, plans: Any, on_gpu: bool) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for number, (name, view) in enumerate(spec.views.items()):
        names = [name]
        if view.clean:
            names.append(f"{name}_clean")
        if view.displacement:
            names += ["displacement", "mask"]
        device = "gpu" if on_gpu and name not in functions_of(spec) else "cpu"  # where numba's functions run
        made = OPERATORS.voxtrast_view(
            region.gpu() if device == "gpu" else region,
            plans,
            device=device,
            view=number,
            dimensions=len(spec.crop),
            clean=view.clean,
            displacement=view.displacement,
            mask=view.displacement,
        )
        outputs.update(zip(names, made if isinstance(made, list | tuple) else [made], strict=True))
    return outputs


def _apply_functions(spec: ViewSpec, outputs: dict[str, Any], numbers: Any = None) -> None:
    row = 0
    for view, names in functions_of(spec).items():
        for name in names:
            outputs[view] = apply_function(outputs[view], numbers[row], name, len(spec.crop))
            row += 1
