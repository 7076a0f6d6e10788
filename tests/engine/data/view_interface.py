"""Views made through the plain C interface of csrc/view, and the plan of one as plain arrays."""

import ctypes
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtrast.engine.data import native

KINDS = ("noise", "blur", "contrast", "brightness", "gamma", "bias_field", "low_resolution", "bezier", "pixel_shuffle",
         "patch_swap", "in_paint", "out_paint", "cut_out", "cut_out_outside")  # fmt: skip
TARGETS = ("portable", "avx2", "avx512")
IDENTITY = np.eye(3, 4)


class _Step(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32),
        ("stream", ctypes.c_uint32),
        ("numbers", ctypes.c_void_p),
        ("boxes", ctypes.c_void_p),
        ("number_count", ctypes.c_int64),
        ("box_numbers", ctypes.c_int64),
    ]


class _View(ctypes.Structure):
    _fields_ = [
        ("voxels", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("interpolation", ctypes.c_int32),
        ("lower", ctypes.c_int64 * 3),
        ("upper", ctypes.c_int64 * 3),
        ("volume", ctypes.c_int64 * 3),
        ("background", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("slot", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("size", ctypes.c_int64 * 3),
        ("to_volume", ctypes.c_double * 12),
        ("points", ctypes.c_int64 * 3),
        ("spacing", ctypes.c_double * 3),
        ("shift", ctypes.c_void_p),
        ("antialias", ctypes.c_double * 3),
        ("from_volume", ctypes.c_double * 12),
        ("partner", ctypes.c_int64 * 3),
        ("steps", ctypes.c_void_p),
        ("step_count", ctypes.c_int64),
        ("view", ctypes.c_void_p),
        ("clean", ctypes.c_void_p),
        ("displacement", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("message_bytes", ctypes.c_int64),
    ]


@dataclass
class ViewCase:
    """One view of a region; `steps` are (kind, stream, numbers, boxes)."""

    region: NDArray[Any]
    size: tuple[int, int, int]
    to_volume: NDArray[np.float64] = field(default_factory=lambda: IDENTITY)
    lower: tuple[int, int, int] = (0, 0, 0)
    volume: tuple[int, int, int] | None = None
    background: float = 0.0
    seed: int = 7
    slot: int = 0
    step: int = 0
    shift: NDArray[np.float32] | None = None  # (3, points)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    antialias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    from_volume: NDArray[np.float64] = field(default_factory=lambda: IDENTITY)
    partner: tuple[int, int, int] | None = None
    steps: list[tuple[str, int, Any, Any]] = field(default_factory=list)
    interpolation: str = "linear"


_chosen = TARGETS[-1]


def use_target(target: str) -> str:
    """Instruction set of the calls that follow, unless the processor lacks it; returns what it is."""
    global _chosen
    _chosen = target
    return TARGETS[library().voxtrast_target()]


def library() -> ctypes.CDLL:
    return _library(_chosen)


@functools.cache
def _library(target: str) -> ctypes.CDLL:
    """A library chooses its instruction set at the first call and for good: each gets a copy of its own."""
    before = os.environ.get("VOXTRAST_CPU")
    os.environ["VOXTRAST_CPU"] = target
    with tempfile.TemporaryDirectory() as folder:
        loaded = ctypes.CDLL(shutil.copy(native.build(native.VIEWS), Path(folder) / f"view_{target}.so"))
        loaded.voxtrast_target()
    del os.environ["VOXTRAST_CPU"]
    if before is not None:
        os.environ["VOXTRAST_CPU"] = before
    return loaded


class _Call:
    """The arguments in C, and what must outlive them."""

    def __init__(self, case: ViewCase) -> None:
        region = np.ascontiguousarray(case.region)
        shift = np.ascontiguousarray(np.zeros((3, 0, 0, 0)) if case.shift is None else case.shift, np.float32)
        self.alive: list[Any] = [region, shift]
        self.message = ctypes.create_string_buffer(400)
        steps = (_Step * len(case.steps))(*(self._step(*step) for step in case.steps))
        self.alive.append(steps)
        upper = [low + side for low, side in zip(case.lower, region.shape, strict=True)]
        self.arguments = _View(
            voxels=region.ctypes.data,
            type={"float32": 0, "float16": 1}[str(region.dtype)],
            interpolation={"linear": 0, "nearest": 1}[case.interpolation],
            lower=(ctypes.c_int64 * 3)(*case.lower),
            upper=(ctypes.c_int64 * 3)(*upper),
            volume=(ctypes.c_int64 * 3)(*(case.volume or upper)),
            background=case.background,
            seed=case.seed,
            slot=case.slot,
            step=case.step,
            size=(ctypes.c_int64 * 3)(*case.size),
            to_volume=(ctypes.c_double * 12)(*np.asarray(case.to_volume).ravel()),
            points=(ctypes.c_int64 * 3)(*shift.shape[1:]),
            spacing=(ctypes.c_double * 3)(*case.spacing),
            shift=shift.ctypes.data,
            antialias=(ctypes.c_double * 3)(*case.antialias),
            from_volume=(ctypes.c_double * 12)(*np.asarray(case.from_volume).ravel()),
            partner=(ctypes.c_int64 * 3)(*(case.partner or case.size)),
            steps=ctypes.addressof(steps),
            step_count=len(case.steps),
            message=ctypes.cast(self.message, ctypes.c_char_p),
            message_bytes=len(self.message),
        )

    def _step(self, kind: str, stream: int, numbers: Any, boxes: Any) -> _Step:
        values, sides = np.asarray(numbers, np.float32).ravel(), np.asarray(boxes, np.int32).ravel()
        self.alive += [values, sides]
        return _Step(KINDS.index(kind), stream, values.ctypes.data, sides.ctypes.data, values.size, sides.size)


def make_view(case: ViewCase, *wanted: str) -> dict[str, NDArray[np.float32]]:
    """The view, and of clean, displacement and mask what is wanted. Raises ValueError with what the library said."""
    call = _Call(case)
    result = {name: np.full(case.size, np.nan, np.float32) for name in ("view", *wanted)}
    if "displacement" in result:
        result["displacement"] = np.full((2 if case.size[0] == 1 else 3, *case.size), np.nan, np.float32)
    for name, array in result.items():
        setattr(call.arguments, name, array.ctypes.data)
    if library().voxtrast_make_view(ctypes.byref(call.arguments)):
        raise ValueError(call.message.value.decode())
    return result


def encoded(case: ViewCase) -> NDArray[np.uint8]:
    """The plan with this one view, as the operators are sent it."""
    call = _Call(case)
    room = np.empty(1 << 22, np.uint8)
    library().voxtrast_encode.restype = ctypes.c_int64
    count = library().voxtrast_encode(ctypes.byref(call.arguments), room.ctypes.data_as(ctypes.c_void_p), room.size)
    assert count <= room.size
    return room[:count].copy()


def permuted(size: int, key: tuple[int, int, int, int]) -> list[int]:
    function = library().voxtrast_permuted
    function.restype = ctypes.c_uint32
    keys = (ctypes.c_uint32 * 4)(*key)
    return [function(index, size, keys) for index in range(size)]
