"""Builds the kernels of csrc/cuda for the CPU (emulation.h), and hands them to the tests."""

from collections.abc import Callable, Iterator

import pytest
from emulated import HERE, Emulated, build


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], object]:
    libraries: dict[str, object] = {}

    def get(name: str) -> object:
        if name not in libraries:
            libraries[name] = build(HERE / f"{name}.cpp", tmp_path_factory.mktemp(name))
        return libraries[name]

    return get


# Backwards, the order that nobody had in mind, is the one for every day.
@pytest.fixture(params=[pytest.param("forwards", marks=pytest.mark.slow), "backwards"])
def emulate(request: pytest.FixtureRequest, emulated_library) -> Iterator[Callable[[str], Emulated]]:
    """emulate(name): the entry points of NAME.cpp in this folder, with threads and blocks in this order."""
    used: list[Emulated] = []

    def get(name: str) -> Emulated:
        used.append(Emulated(emulated_library(name), backwards=request.param == "backwards"))
        return used[-1]

    yield get
    for each in used:
        each.release()
