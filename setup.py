"""Builds the compiled half of the kernels; everything else about the package stands in pyproject.toml.

The folders kernels/, methods/ and engine/ become `voxtrast.kernels`, `voxtrast.methods` and `voxtrast.engine`; of
csrc/ the sources that are compiled on first use travel as data under `voxtrast/csrc` (engine/data/native.py).
`voxtrast.kernels._C` (C++, CPU) uses torch's stable ABI and Python's limited API: one wheel for every Python from
3.10 on. `_C_cuda` is a library of its own, built where nvcc is found, because torch's extension builder links CUDA
symbols that CPU builds of torch lack. Without a C++ compiler the package installs and says so: the torch
reference of every operator is complete.

Environment: CXX chooses the C++ compiler; VOXTRAST_CUDA=0 leaves the CUDA library out, =1 makes its failure an error
(otherwise it is a warning); VOXTRAST_CUDA_ARCHITECTURES ("80;90;100") chooses what it is built for.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
# The oldest torch that the extension must load in: nothing newer than its stable headers is used.
TORCH_TARGET = "0x020b000000000000"
PACKAGES = {"kernels": "voxtrast.kernels", "methods": "voxtrast.methods", "engine": "voxtrast.engine",
            "benchmarks": "voxtrast.benchmarks"}  # fmt: skip


def packages() -> list[str]:
    found = []
    for folder, name in PACKAGES.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            below = init.parent.relative_to(ROOT / folder).parts
            found.append(".".join((name, *below)))
    return found


# What engine/data/native.py compiles on the user's machine.
COMPILED_ON_FIRST_USE = ["cpu/*.h", "cpu/*.inl", "cpu/target.cpp", "geometry/*", "view/*", "view/cuda/*", "dali/*",
                        "dali/cuda/*", "cuda/shared_memory.cuh"]  # fmt: skip


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cpp_compiler() -> str | None:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name.split()[0])), None)


def cpu_extension() -> Any:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "voxtrast.kernels._C",
        sources("cpu/*.cpp"),
        depends=sources("**/*.h", "**/*.inl", "cuda/*.cu", "cuda/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        # Nobody reads floating-point flags or errno: without them selections become vector code, with the same values.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno",
                            "-DPy_LIMITED_API=0x030a0000", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
        py_limited_api=True,
    )  # fmt: skip


def build_command() -> Any:
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithCuda(BuildExtension):
        def run(self) -> None:
            super().run()
            build_cuda_library(Path(self.get_ext_fullpath("voxtrast.kernels._C")).parent)

    return BuildWithCuda.with_options(use_ninja=shutil.which("ninja") is not None)


def build_cuda_library(target: Path) -> None:
    """csrc/cuda/*.cu -> target/_C_cuda.so by nvcc directly: it compiles on machines without a GPU."""
    wanted = os.environ.get("VOXTRAST_CUDA", "auto")
    nvcc = shutil.which("nvcc")
    if wanted == "0" or (nvcc is None and wanted != "1"):
        print("voxtrast: CUDA library left out:", "VOXTRAST_CUDA=0" if wanted == "0" else "nvcc not found")
        return
    target.mkdir(parents=True, exist_ok=True)
    command = cuda_command(nvcc or "nvcc", target / "_C_cuda.so")
    print(" ".join(command))
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        if wanted == "1":
            raise
        print(f"voxtrast: WARNING: the CUDA library is left out, because nvcc failed ({error}). CPU kernels are not "
              "concerned. VOXTRAST_CUDA=0 skips it, VOXTRAST_CUDA=1 makes this an error.", file=sys.stderr)  # fmt: skip


def cuda_command(nvcc: str, output: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    architectures = os.environ.get("VOXTRAST_CUDA_ARCHITECTURES", "80;90;100").split(";")
    command = [nvcc, "-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v",
               "--threads", "0", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA"]  # fmt: skip
    command += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    # Python keeps torch's symbols to itself: the library must name torch, which brings its CUDA part where it has one.
    command += [*(f"-L{path}" for path in library_paths()), "-Xlinker", "--no-as-needed", "-ltorch"]
    return [*command, "-o", str(output), *sources("cuda/*.cu")]


def compiled_parts() -> dict[str, Any]:
    """The arguments of setup() that concern compiled code; none where nothing can be compiled."""
    compiler = cpp_compiler()
    if compiler is None:
        print("voxtrast: WARNING: no C++ compiler found (CXX, c++, g++, clang++): the operators will run as plain "
              "torch, several times slower. Install one and voxtrast again.", file=sys.stderr)  # fmt: skip
        return {}
    os.environ.setdefault("CXX", compiler)
    return {
        "ext_modules": [cpu_extension()],
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(
        packages=[*packages(), "voxtrast.csrc"],
        package_dir={**{name: folder for folder, name in PACKAGES.items()}, "voxtrast.csrc": "csrc"},
        include_package_data=False,  # what the sdist holds and what is installed are two lists
        package_data={"voxtrast.kernels": ["py.typed"],
                      "voxtrast.kernels.triton": ["configurations.json"],
                      "voxtrast.methods": ["py.typed", "recipes/*.yaml"],
                      "voxtrast.engine": ["py.typed"],
                      "voxtrast.benchmarks": ["label_efficiency.yaml"],
                      "voxtrast.engine.reporting": ["page.css", "page.js"],
                      "voxtrast.csrc": COMPILED_ON_FIRST_USE},
        **compiled_parts(),
    )  # fmt: skip
