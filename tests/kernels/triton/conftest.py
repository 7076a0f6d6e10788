"""Puts the Triton operators where the tests can call them: compiled on a GPU, else interpreted on the CPU."""

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from voxtrast.kernels import triton as backend

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from voxtrast.kernels.triton import operators, pairwise  # noqa: E402
from voxtrast.kernels.triton.configurations import Configuration, choose  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles in this process")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The public functions run the Triton operators on tensors of this device."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    monkeypatch.setattr(interpreter, "_convert_float", _round_to_nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _multiply_bfloat16)
    options = interpreter.interpreter_builder.options
    # Checks of whole numbers that take a quarter of the time.
    monkeypatch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
    monkeypatch.setattr(pairwise, "choose", small_blocks)
    library = torch.library.Library("voxtrast", "IMPL")
    for name in backend.OPERATORS:
        library.impl(name, getattr(operators, name), "CPU", allow_override=True)
    yield torch.device("cpu")
    library._destroy()


def small_blocks(*arguments: object) -> Configuration:
    """Blocks so small that problems which an interpreter can do have many."""
    found = choose(*arguments)  # type: ignore[arg-type]
    return Configuration(min(found.own, 16), min(found.other, 16), found.warps, found.stages, None, 2)


_convert, _multiply = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _round_to_nearest(data, source, target, rounding):  # type: ignore[no-untyped-def]
    """The interpreter cuts the bits off."""
    if source.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()
    return _convert(data, source, target, rounding)


def _multiply_bfloat16(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
    """The interpreter keeps bfloat16 as whole numbers, and multiplies those."""
    if a.dtype.scalar == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle(_convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return _multiply(self, a, b, d, *rest)
