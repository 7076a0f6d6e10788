"""The DALI graph of a view specification: what Python sends for each slot, and the operators that make views of it.

Every slot sends two small arrays: its file, open, and its plan. Our own operators (csrc/dali/) read the region and make
each view of it in one go: on the GPU that holds the results, where the operators were compiled for one.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...methods.views import ViewSpec
from ..errors import UserError
from .native import load_plugin

try:
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.types import DALIDataType
except ImportError as error:
    raise UserError("the data plane needs NVIDIA DALI, which is not installed: pip install 'voxtrast[dali]'") from error

OPERATORS: Any = fn  # ours appear there when the plugin is loaded

Source = Callable[[], tuple[list[NDArray[np.int64]], list[NDArray[np.uint8]]]]  # files and plans, one each a slot


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
        files, plans = fn.external_source(
            source=source,
            num_outputs=2,
            dtype=[DALIDataType.INT64, DALIDataType.UINT8],
            ndim=[1, 1],
            no_copy=True,
        )
        region = OPERATORS.voxtrast_read(files, plans, half=half)
        outputs = _views(spec, region.gpu() if on_gpu else region, plans, "gpu" if on_gpu else "cpu")
        if device_id is not None and not on_gpu:
            outputs = {name: output.gpu() for name, output in outputs.items()}
        pipeline.set_outputs(*outputs.values())
    pipeline.build()
    return pipeline, list(outputs)


def _views(spec: ViewSpec, region: Any, plans: Any, device: str) -> dict[str, Any]:
    outputs: dict[str, Any] = {}
    for number, (name, view) in enumerate(spec.views.items()):
        names = [name]
        if view.clean:
            names.append(f"{name}_clean")
        if view.displacement:
            names += ["displacement", "mask"]
        made = OPERATORS.voxtrast_view(
            region,
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
