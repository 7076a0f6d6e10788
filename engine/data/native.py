"""C++ of ours that is compiled on the user's machine, the first time it is asked for.

Two things cannot travel compiled: a DALI operator, whose interface changes with every version of DALI, and modules of
pybind11, which are made for one version of Python. Their sources travel instead, as `voxtrast/csrc`; what comes of
them is kept in a cache folder, in one subfolder for each state of sources, flags, compiler and versions.

Environment: CXX chooses the compiler; VOXTRAST_CACHE the cache folder, which is XDG_CACHE_HOME/voxtrast or
~/.cache/voxtrast otherwise. For CUDA see cuda_toolkit.py.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..errors import UserError
from .cuda_toolkit import NoToolkit, find_toolkit

LEFTOVER_S = 3600.0
SOURCES = Path(__file__).parents[2] / "csrc"  # of a checkout and of an installed wheel alike
# Nobody reads floating-point flags or errno: without them selections become vector code, with the same values.
FLAGS = ("-O3", "-g0", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno")


# What voxtrast_read reads, numbered in this order: StoredType of csrc/view/read_region.h.
STORED_TYPES = ("float16", "float32", "uint8", "int8", "uint16", "int16", "uint32", "int32")


@dataclass(frozen=True)
class Library:
    """What is compiled into one shared library.

    sources: files below csrc/, as patterns of Path.glob.
    includes: folders of headers besides csrc/.
    flags, links: for the compiler, and for the linker.
    versions: of whatever else the result depends on.
    nvcc: the CUDA compiler with its flags, in place of the C++ compiler.
    """

    name: str
    sources: tuple[str, ...]
    includes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    nvcc: tuple[str, ...] = ()


def build(library: Library, root: Path = SOURCES) -> Path:
    """The compiled library, from the cache or compiled now; processes that ask at the same time wait for the first.

    Raises: UserError where there is no compiler, the sources do not compile or the cache cannot be written.
    """
    cache, key = cache_folder(), _key(library, root)
    result = cache / f"{library.name}-{key}" / f"{library.name}.so"
    if result.is_file():
        return result
    with _locked(cache, result.parent.name):
        if not result.is_file():
            _compile(library, root, result)
    return result


def load_module(
    name: str, sources: tuple[str, ...], root: Path = SOURCES, *, flags: tuple[str, ...] = ()
) -> ModuleType:
    """The pybind11 module `name` (as its PYBIND11_MODULE says), compiled if need be. Raises UserError like `build`."""
    if name in sys.modules:
        return sys.modules[name]
    path = build(module_library(name, sources, flags), root)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise UserError(
            f"{path}: Python does not load it ({error}); delete that folder and start again, or set VOXTRAST_CACHE to "
            "a folder of this machine from which programs may run"
        ) from None
    sys.modules[name] = module
    return module


def module_library(name: str, sources: tuple[str, ...], flags: tuple[str, ...] = ()) -> Library:
    try:
        import pybind11
    except ImportError:
        raise UserError(f"pybind11: not installed, and {name} is compiled with it: pip install pybind11") from None
    python = sysconfig.get_path("include")
    if not (Path(python) / "Python.h").is_file():
        raise UserError(
            f"{python}/Python.h: missing, and {name} is compiled with it: install Python's development files "
            "(apt install python3-dev, dnf install python3-devel)"
        )
    return Library(
        name,
        sources,
        includes=(pybind11.get_include(), python),
        flags=flags,
        versions=(pybind11.__version__, sys.implementation.cache_tag or "", sys.version),
    )


# Views without DALI; the operators are linked to it, and csrc/view/c_interface.cpp opens it to Python.
VIEWS = Library("views", ("view/*.cpp", "geometry/plan.cpp", "cpu/target.cpp"), flags=("-fvisibility=default",))


def views_cuda_library() -> Library:
    """Views on a GPU, to which the operators are linked where there is a CUDA compiler. Raises: NoToolkit."""
    try:
        from nvidia.dali import __cuda_version__

        dali_cuda: int | None = int(str(__cuda_version__)[:2])
    except ImportError:
        dali_cuda = None  # views without DALI, through csrc/view/cuda/c_interface.cpp
    toolkit = find_toolkit(dali_cuda)
    return Library(
        "views_cuda",
        ("view/cuda/*.cu", "view/cuda/*.cpp"),
        links=(str(build(VIEWS)),),
        versions=(toolkit.release,),
        nvcc=toolkit.command(host[0] if len(host := compiler()) == 1 else "g++"),  # nvcc takes no command
    )


def plugin_library(views_cuda: Library | None = None) -> Library:
    """DALI's operators `fn.voxtrast_read` and `fn.voxtrast_view`, for the DALI that is installed."""
    try:
        import nvidia.dali
        from nvidia.dali import sysconfig as dali
    except ImportError:
        raise UserError("the data plane needs NVIDIA DALI: not installed; pip install 'voxtrast[dali]'") from None
    return Library(
        "dali_operators",
        ("dali/*.cpp", "dali/cuda/*.cpp") if views_cuda else ("dali/*.cpp",),
        includes=() if views_cuda else (str(cuda_headers()),),  # nvcc has headers of its own
        flags=tuple(dali.get_compile_flags()),
        links=(*([str(build(views_cuda))] if views_cuda else []), str(build(VIEWS)), *dali.get_link_flags()),
        versions=(nvidia.dali.__version__,),
        nvcc=views_cuda.nvcc if views_cuda else (),
    )


@functools.cache
def load_plugin() -> str | None:
    """Makes our operators known to DALI, compiled if need be. Says why there is none for a GPU; None where there is.

    Raises: UserError like `build`.
    """
    without_cuda = None
    try:
        library = plugin_library(views_cuda_library())
    except NoToolkit as reason:
        library, without_cuda = plugin_library(), str(reason)
    path = build(library)
    from nvidia.dali import plugin_manager

    try:
        plugin_manager.load_library(str(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: DALI {library.versions[0]} does not load it ({error}); delete that folder and start again, "
            "and if it comes back install NVIDIA DALI again"
        ) from None
    return without_cuda


def cache_folder() -> Path:
    if chosen := os.environ.get("VOXTRAST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voxtrast"


def compiler() -> list[str]:
    """The C++ compiler and its first arguments. Raises UserError where there is none."""
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["g++", "c++", "clang++"]:
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    looked = f"CXX={chosen}" if chosen else "g++, c++, clang++"
    raise UserError(
        f"no C++ compiler found ({looked}), and the data plane compiles its operators on first use: install g++ "
        "(apt install g++, dnf install gcc-c++) or point CXX at a compiler"
    )


# One of each wheel that they come in.
CUDA_HEADERS = ("cuda_runtime.h", "crt/host_config.h", "nv/target")


def cuda_headers() -> Path:
    """The folder with cuda_runtime.h and what that includes, which DALI's headers ask for even where there is no GPU.

    Raises: UserError where there is none.
    """
    nvidia = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (nvidia.submodule_search_locations or [])] if nvidia else []
    found = [folder for package in packages for folder in sorted(package.glob("*/include"), reverse=True)]
    found += [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "include"]
    for folder in found:
        if all((folder / header).is_file() for header in CUDA_HEADERS):
            return folder
    raise UserError(
        f"{', '.join(CUDA_HEADERS)}: not found together, and a DALI operator is compiled with them: "
        "pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl (CUDA 12: nvidia-cuda-runtime-cu12 "
        "nvidia-cuda-nvcc-cu12 nvidia-cuda-cccl-cu12), or set CUDA_HOME to a CUDA toolkit"
    )


@functools.lru_cache
def _compiler_version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        remedy = "point CXX at a compiler that works"
        raise UserError(f"{shlex.join(command)} --version fails ({error}): {remedy}") from None
    return done.stdout.partition("\n")[0]


def _files(library: Library, root: Path) -> list[Path]:
    files = [path for pattern in library.sources for path in sorted(root.glob(pattern))]
    if not files:
        raise UserError(f"{root}: holds none of {', '.join(library.sources)}: install voxtrast again")
    return files


def _key(library: Library, root: Path) -> str:
    headers = sorted(path for suffix in ("h", "inl", "cuh") for path in root.rglob(f"*.{suffix}"))
    digest = hashlib.sha256(repr((platform.machine(), platform.libc_ver())).encode())
    command = compiler()
    for word in (*command, _compiler_version(tuple(command)), *FLAGS, repr(library)):
        digest.update(word.encode() + b"\0")
    for path in [*_files(library, root), *headers]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\0".encode() + content)
    return digest.hexdigest()[:20]


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """Alone among all processes that use the cache; the lock of one that is killed falls with it.

    On a disk without locks several processes may compile the same: that costs time, and the first result counts.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        stream = open(cache / f"{name}.lock", "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(cache, error) from None
    with stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _unwritable(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"{cache}: the folder for compiled operators cannot be written ({error.strerror or error}); set VOXTRAST_CACHE "
        "to one that can"
    )


def _compile(library: Library, root: Path, result: Path) -> None:
    """Compile beside the place of the result and rename the folder: it is there complete, or not at all."""
    log = result.parent.with_name(f"{result.parent.name}.log")
    folder = result.parent.with_name(f"{result.parent.name}.{secrets.token_hex(4)}.building")
    try:
        _remove_leftovers(result.parent.parent)
        folder.mkdir()
        objects = [folder / f"{number}.o" for number in range(len(_files(library, root)))]
        command = library.nvcc or (*compiler(), *FLAGS)
        common = [*command, *library.flags, *(f"-I{path}" for path in (root, *library.includes))]
        commands = [
            [*common, "-c", str(source), "-o", str(target)]
            for source, target in zip(_files(library, root), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(_run, commands))
        if not any(code for code, _ in outputs):
            temporary = folder / result.name
            linker = library.nvcc or compiler()
            outputs.append(_run([*linker, "-shared", *map(str, objects), "-o", str(temporary), *library.links]))
        if any(code for code, _ in outputs):
            log.write_text("".join(output for _, output in outputs))
            raise _failure(library, [output for code, output in outputs if code], log)
        for path in objects:
            path.unlink()
        try:
            folder.rename(result.parent)
        except OSError:
            if not result.is_file():  # as another process left it that compiled the same
                raise
        log.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(result.parent.parent, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(cache: Path) -> None:
    """What builds left that were killed; the young ones may be at work."""
    for folder in cache.glob("*.building"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    return done.returncode, f"{shlex.join(command)}\n{done.stdout}"


def _failure(library: Library, outputs: list[str], log: Path) -> UserError:
    lines = [line.strip() for output in outputs for line in output.splitlines()[1:]]
    wrong = [line for line in lines if re.search("error|fatal|undefined|not found", line)]
    first = (wrong or lines or ["the compiler said nothing"])[0]
    used, remedy = _compiler_version(tuple(compiler())), "point CXX at g++ 11 or newer, or install voxtrast again"
    if library.nvcc:
        used = f"{library.nvcc[0]} {library.versions[0]} and {used}"
        remedy = (
            "point CUDACXX at an nvcc that knows this GPU and CXX at a compiler that it takes, or set VOXTRAST_CUDA=0: "
            "views are then made on the CPU"
        )
    return UserError(f"{library.name} does not compile with {used}: {first} (all of it: {log}); {remedy}")
