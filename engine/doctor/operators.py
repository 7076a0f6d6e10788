"""Which implementation of every operator runs here, and why; the CPU's are tried on a small problem."""

import importlib.util
import os
from collections.abc import Iterator

import torch

from ...kernels import _native, warp, warp_reference
from ...kernels.triton import OPERATORS as IN_TRITON
from .finding import BROKEN, GOOD, NOTE, Finding

# What the methods call, by the operator that computes it.
OPERATORS = (
    "pairwise_logsumexp",
    "info_nce",
    "positional_info_nce",
    "softplus_sums",
    "local_correlation",
    "warp",
    "compose_displacement",
    "vector_regression_loss",
    "warped_cosine_loss",
)
TARGETS = {"avx512": "AVX-512", "avx2": "AVX2", "portable": "portable"}


def check_operators() -> Iterator[Finding]:
    for name in OPERATORS:
        yield _on_cpu(name)
    if torch.cuda.is_available():
        for name in OPERATORS:
            yield _on_gpu(name)
    yield _tried()


def _on_cpu(name: str) -> Finding:
    if _native.is_compiled(name, torch.device("cpu")):
        chosen = os.environ.get("VOXTRAST_CPU")
        reason = f"VOXTRAST_CPU={chosen}" if chosen else "what this processor has"
        return Finding("operators", f"{name} (cpu)", GOOD, f"compiled, {TARGETS[_native.cpu_target()]}: {reason}")
    reason = "the compiled library is missing" if not _native.load_cpu() else "the library lacks it"
    remedy = "install voxtrast again where a C++ compiler is found"
    return Finding("operators", f"{name} (cpu)", NOTE, f"torch reference: {reason}; several times slower", remedy)


def _on_gpu(name: str) -> Finding:
    where = f"{name} (cuda)"
    if _native.is_compiled(name, torch.device("cuda")):
        path = "Triton" if name in IN_TRITON else "CUDA"
        return Finding("operators", where, GOOD, f"{path}, compute capability {torch.cuda.get_device_capability()}")
    if name in IN_TRITON:
        reason = "AMD's GPUs" if torch.version.hip else "Triton is not installed"
        missing = importlib.util.find_spec("triton") is None
        remedy = "pip install 'voxtrast[gpu]'" if missing else "use an NVIDIA GPU"
    else:
        reason, remedy = "the CUDA library was not built or does not load", "install from source where nvcc is found"
    return Finding("operators", where, NOTE, f"torch reference: {reason}", remedy)


def _tried() -> Finding:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 9, 10, 11, generator=generator)
    displacement = torch.rand(1, 3, 9, 10, 11, generator=generator)
    error = (warp(image, displacement) - warp_reference(image, displacement)).abs().max().item()
    detail = f"warp of 9 x 10 x 11 voxels differs from its reference by {error:.1e}"
    if error < 1e-5:
        return Finding("operators", "tried", GOOD, detail)
    return Finding("operators", "tried", BROKEN, detail, "try VOXTRAST_CPU=portable, and report this processor")
