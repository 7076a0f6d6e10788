"""A user's own changes of intensity: Python functions, compiled by numba and run inside the DALI pipeline, on the CPU.

    # my_changes.py, in a folder of PYTHONPATH; in the recipe: appearance: {functions: [my_changes:stripes]}
    def stripes(out, image, numbers):
        period = 4 + int(12 * numbers[0])
        for d in range(image.shape[0]):
            out[d] = image[d] + 0.1 * (d % period == 0)

`image` and `out` are float32 (D, H, W), or (H, W) of a 2-D crop; every value of `out` must be written. `numbers` are 16
float32, uniform over [0, 1), drawn for this function from (seed, split, step, slot, view): what is made of them is the
same on every rank and after every restart. What numpy draws inside is not.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...methods.views import ViewSpec
from ..errors import UserError

NUMBERS = 16

Function = Callable[[Any, Any, Any], None]


def functions_of(spec: ViewSpec) -> dict[str, list[str]]:
    """By the name of the view, those that it asks for, in order."""
    asking = {name: view.appearance.functions for name, view in spec.views.items() if view.appearance is not None}
    return {name: list(functions) for name, functions in asking.items() if functions}


@functools.cache
def load_function(name: str, axes: int) -> Function:
    """The function MODULE:NAME, which numba has compiled once to see that it can.

    Raises: UserError for one that is not there, is no function or cannot be compiled, and where there is no numba.
    """
    try:
        import numba
    except ImportError:
        raise UserError(f"function {name!r}: needs numba: not installed; pip install 'voxtrast[numba]'") from None
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"function {name!r}: expected MODULE:NAME, as in my_changes:stripes")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError(
            f"function {name!r}: {module} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from error
    except AttributeError:
        raise UserError(f"function {name!r}: {module} has no {attribute}") from None
    function: Function = getattr(found, "py_func", found)  # of one that numba has compiled already
    image = numba.types.Array(numba.float32, axes, "C")
    try:
        numba.njit(function).compile((image, image, numba.types.Array(numba.float32, 1, "C")))
    except (numba.core.errors.NumbaError, TypeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"function {name!r}: numba cannot compile it for (out, image, numbers), {axes}-D float32: {reason}"
        ) from error
    return function


def apply_function(image: Any, numbers: Any, name: str, axes: int) -> Any:
    """A node of the DALI graph: the image as the function leaves it."""
    from nvidia.dali.plugin.numba.fn.experimental import numba_function
    from nvidia.dali.types import DALIDataType

    return numba_function(
        image,
        numbers,
        run_fn=load_function(name, axes),
        setup_fn=_same_shape,
        out_types=[DALIDataType.FLOAT],
        in_types=[DALIDataType.FLOAT, DALIDataType.FLOAT],
        outs_ndim=[axes],
        ins_ndim=[axes, 1],
        batch_processing=False,
    )


def _same_shape(outs: Any, ins: Any) -> None:
    """Compiled by numba as well: the shape of every sample's output is that of its image."""
    for sample in range(len(outs[0])):
        for axis in range(len(outs[0][sample])):
            outs[0][sample][axis] = ins[0][sample][axis]


def draw_numbers(generator: Callable[[str], np.random.Generator], spec: ViewSpec) -> np.ndarray:
    """(functions, 16) float32 of one slot, for all functions of all views; `generator` gives that of a purpose."""
    rows = [
        generator(f"{view}/{name}").random(NUMBERS, np.float32)
        for view, functions in functions_of(spec).items()
        for name in functions
    ]
    return np.stack(rows) if rows else np.zeros((0, NUMBERS), np.float32)
