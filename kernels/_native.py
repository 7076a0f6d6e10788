"""Loads the compiled libraries: `_C` (C++, CPU) with the package, `_C_cuda` when an operator first needs it.

Both only implement operators whose schemas the modules of this package have registered before. Where a library is
missing, the operators run as their torch reference, and a warning says so once.
"""

import importlib
import os
import warnings
from pathlib import Path

import torch

TARGETS = ("avx512", "avx2", "portable")
_CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")
_loaded: dict[str, bool] = {}
_reasons: dict[str, str] = {}
_warned: set[str] = set()


def load_cpu() -> bool:
    """Imports `_C`, which registers the CPU implementations. False where the package was built without it."""
    if "cpu" not in _loaded:
        try:
            importlib.import_module("._C", __package__)
        except ImportError as error:
            _reasons["cpu"] = str(error)
        _loaded["cpu"] = "cpu" not in _reasons
        wanted = os.environ.get("VOXTRAST_CPU", TARGETS[0])
        if wanted not in TARGETS:
            _warn("target", f"VOXTRAST_CPU={wanted}: expected {', '.join(TARGETS)} or nothing; portable code runs")
    return _loaded["cpu"]


def cpu_target() -> str:
    """One of TARGETS: what the compiled operators take on this processor, which VOXTRAST_CPU lowers.

    To be called where `load_cpu()` is true.
    """
    return str(importlib.import_module("._C", __package__).target())


def load_cuda() -> bool:
    """Loads `_C_cuda`, which registers the CUDA implementations. False, with a warning, where that is impossible.

    To be called only where CUDA is in use: CPU builds of torch lack the symbols that the library needs.
    """
    if not _try_cuda():
        reason = f"voxtrast.kernels: the CUDA library cannot be loaded ({_reasons['cuda']}); "
        _warn("cuda library", reason + "install from source where nvcc and a CUDA build of torch are found.")
    return _loaded["cuda"]


def _try_cuda() -> bool:
    if "cuda" not in _loaded:
        try:
            if not _CUDA_LIBRARY.exists():
                raise OSError(f"{_CUDA_LIBRARY.name} was not built")
            torch.ops.load_library(str(_CUDA_LIBRARY))
        except OSError as error:
            _reasons["cuda"] = str(error.__cause__ or error)
        _loaded["cuda"] = "cuda" not in _reasons
    return _loaded["cuda"]


def is_compiled(operator: str, device: torch.device) -> bool:
    """Whether `operator` has a compiled implementation for the tensors of `device`. Loads what may hold it."""
    return _has_kernel(operator, device) or becomes_compiled(operator, device)


def becomes_compiled(operator: str, device: torch.device) -> bool:
    """Whether `operator` had no compiled implementation for `device`, and has one now that the library was loaded."""
    if device.type != "cuda" or _has_kernel(operator, device):
        return False
    return _try_cuda() and _has_kernel(operator, device)


def _has_kernel(operator: str, device: torch.device) -> bool:
    key = torch._C._dispatch_key_for_device(device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"voxtrast::{operator}", key)


def warn_of_reference(operator: str, device: torch.device) -> None:
    """Says, once for every device type, that operators run as their torch reference, and why."""
    if device.type == "cpu":
        reason = f"the compiled library is missing ({_reasons.get('cpu', 'it was not loaded')}). "
        reason += "That is several times slower: install voxtrast again where a C++ compiler is found."
    elif device.type == "cuda" and "cuda" in _reasons:
        reason = f"the CUDA library cannot be loaded ({_reasons['cuda']}). "
        reason += "Install from source where nvcc and a CUDA build of torch are found."
    else:
        reason = "this version has no compiled implementation for it."
    _warn(device.type, f"voxtrast.kernels: {operator} and its like run as plain torch on {device.type}: {reason}")


def _warn(topic: str, message: str) -> None:
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
