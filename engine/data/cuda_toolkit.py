"""The CUDA half of our DALI operators: which nvcc compiles it, and for which GPUs.

Environment: CUDACXX names the compiler, which is searched in CUDA_HOME, PATH and the wheel nvidia-cuda-nvcc otherwise;
VOXTRAST_CUDA_ARCHITECTURES ("80;90") what it compiles for, which are the GPUs of this machine otherwise;
VOXTRAST_CUDA=0 leaves it out.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")


class NoToolkit(UserError):
    """Nothing here compiles CUDA; says why and what to do."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    release: str  # "13.0"
    architectures: tuple[str, ...]  # "90" for compute capability 9.0

    def command(self, host_compiler: str) -> tuple[str, ...]:
        """Compiles one source, or links with -shared."""
        targets = (f"-gencode=arch=compute_{number},code=sm_{number}" for number in self.architectures)
        library = Path(self.nvcc).resolve().parents[1] / "lib"  # of the wheel, where nvcc does not look by itself
        return (
            *(self.nvcc, "-ccbin", host_compiler, "-O3", "-std=c++20", "-Xcompiler", "-fPIC", "-cudart", "static"),
            *targets,
            f"-L{library}",
        )


def find_toolkit(dali_cuda: int | None) -> Toolkit:
    """`dali_cuda`: the major version of CUDA that the DALI here is made for, if there is one. Raises: NoToolkit."""
    if os.environ.get("VOXTRAST_CUDA") == "0":
        raise NoToolkit("VOXTRAST_CUDA=0 leaves CUDA out: unset it")
    architectures = _architectures()
    nvcc = _find_nvcc()
    try:
        said = subprocess.run(
            [nvcc, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoToolkit(f"{nvcc} --version fails ({error}): point CUDACXX at an nvcc that works") from None
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise NoToolkit(f"{nvcc} --version does not say of which CUDA it is: point CUDACXX at NVIDIA's nvcc")
    if dali_cuda is not None and int(release[1]) != dali_cuda:
        raise NoToolkit(
            f"{nvcc} is of CUDA {release[1]}.{release[2]}, and the DALI that is installed of CUDA {dali_cuda}: point "
            f"CUDACXX at an nvcc of CUDA {dali_cuda}, or install the DALI for yours"
        )
    return Toolkit(nvcc, f"{release[1]}.{release[2]}", architectures)


def _architectures() -> tuple[str, ...]:
    chosen = os.environ.get("VOXTRAST_CUDA_ARCHITECTURES")
    if chosen is not None:
        numbers = tuple(word.strip() for word in chosen.split(";"))
        if not all(re.fullmatch(r"\d+[af]?", number) for number in numbers):
            raise UserError(f'VOXTRAST_CUDA_ARCHITECTURES={chosen}: expected compute capabilities such as "80;90"')
        return numbers
    import torch  # on first use: who makes views on the CPU alone needs none

    if not torch.cuda.is_available():
        raise NoToolkit("torch finds no GPU here")
    devices = (torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    return tuple(sorted({f"{major}{minor}" for major, minor in devices}))


def _find_nvcc() -> str:
    chosen = os.environ.get("CUDACXX")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise NoToolkit(f"CUDACXX={chosen} is not there: point it at nvcc, or unset it")
        return found
    home = os.environ.get("CUDA_HOME")
    nvidia = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (nvidia.submodule_search_locations or [])] if nvidia else []
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(which)] if (which := shutil.which("nvcc")) else []
    places += [nvcc for wheel in wheels for nvcc in sorted(wheel.glob("*/bin/nvcc"), reverse=True)]
    places.append(USUAL_PLACE)
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    raise NoToolkit(
        "nvcc not found (CUDACXX, CUDA_HOME, PATH, the wheel nvidia-cuda-nvcc): install a CUDA toolkit, or "
        "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
    )
