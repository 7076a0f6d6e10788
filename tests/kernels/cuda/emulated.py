"""CUDA kernels, compiled for the CPU under emulation.h."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
# The one header of libcu++ that those of the 16-bit types include: here, only code for the host is wanted.
# It comes in parentheses or without.
TARGET = """#define NV_IF_ELSE_TARGET(condition, device, host) NV_JOIN(NV_MARK host)
#define NV_MARK(...) NV_MARK __VA_ARGS__
#define NV_JOIN(...) NV_REMOVE(__VA_ARGS__)
#define NV_REMOVE(...) NV_REMOVE_##__VA_ARGS__
#define NV_REMOVE_NV_MARK
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def cuda_headers() -> Path | None:
    """Those that Triton or the toolkit come with."""
    triton, nvcc = importlib.util.find_spec("triton"), shutil.which("nvcc")
    folders = [Path(triton.origin).parent / "backends/nvidia/include"] if triton and triton.origin else []
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include")
    return next((folder for folder in folders if (folder / "crt" / "host_defines.h").exists()), None)


def build(source: Path, folder: Path, links: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """A source that includes emulation.h and kernels, as a library."""
    compiler, headers = os.environ.get("CXX") or shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None or not CSRC.exists():
        missing = "the source tree" if not CSRC.exists() else "g++" if compiler is None else "the headers of CUDA"
        pytest.skip(f"emulating CUDA needs {missing}")
    (folder / "nv").mkdir()
    (folder / "nv" / "target").write_text(TARGET)
    target = folder / f"{source.stem}.so"
    command = [*compiler.split(), "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas",
               "-fno-strict-aliasing", f"-I{folder}", f"-I{HERE}", f"-I{CSRC}", "-isystem", str(headers),
               str(source), *map(str, links), "-o", str(target)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(target))


class Emulated:
    """Entry points that take tensors, integers and floats, and return nullptr or what went wrong."""

    def __init__(self, library: ctypes.CDLL, *, backwards: bool) -> None:
        self.library, self.backwards = library, backwards
        self.addresses: list[int] = []
        library.emulation_allocate.restype = ctypes.c_void_p
        library.emulation_choose_order(int(backwards))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Full of NaN, and beside a page that nobody may touch."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        address = self.library.emulation_allocate(ctypes.c_size_t(size), ctypes.c_size_t(dtype.itemsize))
        self.addresses.append(address)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())

    def __call__(self, name: str, *arguments: Tensor | int | float) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*map(_argument, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def count(self, name: str, *arguments: Tensor | int) -> int:
        """What a function of the planners says, such as how much scratch memory a kernel takes."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*map(_argument, arguments))

    def release(self) -> None:
        """Frees the memory of all tensors."""
        while self.addresses:
            self.library.emulation_release(ctypes.c_void_p(self.addresses.pop()))


def _argument(value: Tensor | int | float) -> ctypes._SimpleCData:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr() if value.numel() else None)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
