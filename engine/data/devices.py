"""The array module of a device: numpy, or cupy where there is a GPU."""

import importlib
from typing import Any

import numpy as np

from ..errors import UserError

DEVICES = ("cpu", "cuda")


def array_module(device: str) -> Any:
    """Raises UserError where the device is none that this machine can compute on."""
    if device not in DEVICES:
        raise UserError(f"device is {device!r}, expected one of {', '.join(DEVICES)}: leave it out for cpu")
    if device == "cpu":
        return np
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        remedy = "install voxtrast[gpu], or leave the device out"
        raise UserError(f"device is 'cuda', and cupy cannot be imported ({error}): {remedy}") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UserError(f"device is 'cuda', and there is no GPU to be had ({error}): leave the device out") from None
    if count < 1:
        raise UserError("device is 'cuda', and there is no GPU on this machine: leave the device out")
    return cupy
