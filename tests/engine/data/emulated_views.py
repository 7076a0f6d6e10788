"""Views of the kernels of csrc/view/cuda under the emulation of CUDA (tests/kernels/cuda/emulation.h)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulated import Emulated
from numpy.typing import NDArray
from view_interface import ViewCase, encoded

SOURCE = Path(__file__).with_suffix(".cpp")
OUTPUTS = ("view", "clean", "displacement", "mask")
# ViewKernel of csrc/view/cuda/program.h
KERNELS = ("smooth", "sample_float32", "sample_float16", "finish_statistics", "clear_windows", "mark_windows",
           "shuffle_pixels", "swap_patches", "lower_resolution", "pass")  # fmt: skip


class EmulatedViews:
    """Makes the views of all cases in one call; `launches` counts those of the last call by kernel."""

    def __init__(self, run: Emulated) -> None:
        self.run = run
        self.launches: dict[str, int] = {}

    def __call__(self, cases: list[ViewCase], *wanted: str) -> list[dict[str, NDArray[np.float32]]]:
        plans: list[Any] = []
        regions: list[torch.Tensor] = []
        results: list[dict[str, Any]] = []
        rows = []
        for case in cases:
            plans.append(encoded(case))
            regions.append(self.run.copy(torch.from_numpy(np.ascontiguousarray(case.region))))
            fields = 2 if case.size[0] == 1 else 3
            result = {
                name: self.run.empty(*((fields, *case.size) if name == "displacement" else case.size))
                for name in ("view", *wanted)
            }
            results.append(result)
            half, nearest = case.region.dtype == np.float16, case.interpolation == "nearest"
            addresses = [result[name].data_ptr() if name in result else 0 for name in OUTPUTS]
            sent = plans[-1].ctypes.data, plans[-1].size, regions[-1].data_ptr()
            rows.append([*sent, half, nearest, *addresses])
        counts = torch.zeros(len(KERNELS), dtype=torch.int64)
        try:
            self.run("make_views", len(cases), torch.tensor(rows), counts)
            for case, region in zip(cases, regions, strict=True):
                assert region.numpy().tobytes() == case.region.tobytes(), "the region was written to"
            self.launches = {name: int(n) for name, n in zip(KERNELS, counts, strict=True) if n}
            return [{name: tensor.numpy().copy() for name, tensor in result.items()} for result in results]
        finally:
            self.run.release()
