"""Which array module computes, and what is said where there is none."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from voxtrast.engine.data.devices import array_module
from voxtrast.engine.errors import UserError


class CUDARuntimeError(RuntimeError):
    pass


def cupy_with(count: int | None) -> SimpleNamespace:
    def count_devices() -> int:
        if count is None:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return count

    runtime = SimpleNamespace(getDeviceCount=count_devices, CUDARuntimeError=CUDARuntimeError)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


def test_each_device_has_its_array_module(monkeypatch: pytest.MonkeyPatch) -> None:
    assert array_module("cpu") is np
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(1))
    assert array_module("cuda") is sys.modules["cupy"]


@pytest.mark.parametrize(
    ("cupy", "words"),
    [
        (None, r"cupy cannot be imported .*: install voxtrast\[gpu\], or leave the device out"),
        (cupy_with(None), r"no GPU to be had \(cudaErrorNoDevice.*\): leave the device out"),
        (cupy_with(0), "there is no GPU on this machine: leave the device out"),
    ],
)
def test_a_device_that_is_not_there_is_one_clear_line(
    cupy: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(UserError, match=words):
        array_module("cuda")
