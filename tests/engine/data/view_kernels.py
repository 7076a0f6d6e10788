"""Views by the kernels of csrc/view/cuda: emulated (tests/kernels/cuda/emulation.h), or on a GPU."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulated import Emulated
from numpy.typing import NDArray
from torch import Tensor
from view_interface import ViewCase, encoded

EMULATED_SOURCE = Path(__file__).with_name("emulated_views.cpp")
OUTPUTS = ("view", "clean", "displacement", "mask")
# ViewKernel of csrc/view/cuda/program.h
KERNELS = ("smooth", "sample_float32", "sample_float16", "finish_statistics", "clear_windows", "mark_windows",
           "shuffle_pixels", "swap_patches", "lower_resolution", "pass")  # fmt: skip


class ViewKernels:
    """Makes the views of all cases in one call; `launches` counts those of the last call by kernel."""

    def __init__(self) -> None:
        self.launches: dict[str, int] = {}

    def __call__(self, cases: list[ViewCase], *wanted: str) -> list[dict[str, NDArray[np.float32]]]:
        plans = [encoded(case) for case in cases]
        regions = [self.copy(torch.from_numpy(np.ascontiguousarray(case.region))) for case in cases]
        results = [{name: self.empty(_shape(case, name)) for name in ("view", *wanted)} for case in cases]
        rows = []
        for case, plan, region, result in zip(cases, plans, regions, results, strict=True):
            addresses = [result[name].data_ptr() if name in result else 0 for name in OUTPUTS]
            half, nearest = case.region.dtype == np.float16, case.interpolation == "nearest"
            rows.append([plan.ctypes.data, plan.size, region.data_ptr(), half, nearest, 0, *addresses])
        counts = torch.zeros(len(KERNELS), dtype=torch.int64)
        try:
            self.make(torch.tensor(rows), counts)
            for case, region in zip(cases, regions, strict=True):
                assert region.cpu().numpy().tobytes() == case.region.tobytes(), "a region was written to"
            self.launches = {name: int(n) for name, n in zip(KERNELS, counts, strict=True) if n}
            return [{name: tensor.cpu().numpy().copy() for name, tensor in result.items()} for result in results]
        finally:
            self.release()

    def make(self, rows: Tensor, counts: Tensor) -> None:
        raise NotImplementedError

    def copy(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def release(self) -> None:
        pass


class EmulatedKernels(ViewKernels):
    def __init__(self, library: ctypes.CDLL, *, backwards: bool) -> None:
        super().__init__()
        self.run = Emulated(library, backwards=backwards)

    def make(self, rows: Tensor, counts: Tensor) -> None:
        self.run("make_views", len(rows), rows, counts)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.run.copy(tensor)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return self.run.empty(*shape)

    def release(self) -> None:
        self.run.release()


class GpuKernels(ViewKernels):
    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library = library

    def make(self, rows: Tensor, counts: Tensor) -> None:
        message = ctypes.create_string_buffer(400)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (rows, counts)]
        arguments: list[Any] = [ctypes.c_int64(len(rows)), addresses[0], stream, addresses[1], message]
        if self.library.voxtrast_make_views_on_gpu(*arguments, ctypes.c_int64(len(message))):
            raise RuntimeError(message.value.decode())

    def copy(self, tensor: Tensor) -> Tensor:
        return tensor.cuda()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, torch.nan, device="cuda")


def _shape(case: ViewCase, output: str) -> tuple[int, ...]:
    return (2 if case.size[0] == 1 else 3, *case.size) if output == "displacement" else case.size
