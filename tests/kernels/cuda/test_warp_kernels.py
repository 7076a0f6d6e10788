"""The kernels of `warp` and `compose_displacement`, emulated, through the public functions."""

import math
from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_as_accurate, assert_operator_accurate, gradients
from torch import Tensor
from warp_family import in_place_of_the_cpu

from voxtrast.kernels import compose_displacement, compose_displacement_reference, warp, warp_reference

SIZES = [(7, 5), (1, 1), (1, 9), (6, 7, 5), (1, 1, 1), (13, 1, 8), (5, 11, 23)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _emulated(emulate) -> Iterator[None]:
    with in_place_of_the_cpu(emulate("warp_family")):
        yield


def make(sizes: tuple[int, ...], channels: int = 3, amplitude: float = 2.0, dtype: torch.dtype = torch.float32):
    image = torch.randn(2, channels, *sizes).to(dtype).requires_grad_()
    return image, (amplitude * torch.randn(2, len(sizes), *sizes)).requires_grad_()


def fast(image: Tensor, displacement: Tensor) -> Tensor:
    return warp(image, displacement, deterministic=False)


@pytest.mark.parametrize("function", [warp, fast])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(function, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    image, displacement = make(sizes, dtype=dtype)
    gradient = torch.randn(image.shape).to(dtype)
    assert_operator_accurate(function, warp_reference, (image, displacement), gradient)
