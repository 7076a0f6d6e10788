"""Versions of what voxtrast builds on, against the ranges that its package asks for."""

import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from .finding import BROKEN, GOOD, NOTE, Finding

NEEDED = ("engine", "dali", "dali-cuda12")  # extras without which `pretrain` does not run; the others are notes


def check_versions() -> Iterator[Finding]:
    yield Finding("versions", "python", GOOD, platform.python_version())
    yield Finding("versions", "voxtrast", GOOD, version("voxtrast"))
    for extra, requirement in _requirements():
        yield _judge(extra, requirement)
    if importlib.util.find_spec("apex") is None:
        yield Finding("versions", "apex", GOOD, "not installed; only optimizer.name=apex_fused_* needs NVIDIA's apex")


def _requirements() -> Iterator[tuple[str, Requirement]]:
    dali = "dali" if _installed("nvidia-dali-cuda120") is None else "dali-cuda12"
    gpu = "gpu" if _installed("cupy-cuda12x") is None else "gpu-cuda12"
    seen = set()
    for text in requires("voxtrast") or []:
        requirement = Requirement(text)
        for extra in ("", "engine", dali, gpu, "numba", "dask"):
            wanted = requirement.marker is None if not extra else _belongs(requirement, extra)
            if wanted and requirement.name not in seen and requirement.name != "voxtrast":
                seen.add(requirement.name)
                yield extra, requirement


def _belongs(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _judge(extra: str, requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    serious = BROKEN if extra in ("", *NEEDED) else NOTE
    remedy = f"pip install 'voxtrast[{extra}]'" if extra else f"pip install '{requirement}'"
    found = _installed(name)
    if found is None:
        wanting = f"extra {extra} has" if extra else "voxtrast needs"
        return Finding("versions", name, serious, f"not installed; {wanting} {name}{wanted}", remedy)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("versions", name, serious, f"{found} is not within {wanted}", remedy)
    return Finding("versions", name, GOOD, f"{found} ({wanted})")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
