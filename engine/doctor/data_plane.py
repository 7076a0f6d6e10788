"""The compiled part of the data plane: DALI's operators, from the cache or compiled now."""

import time
from collections.abc import Iterator

from ..data.native import build, cache_folder, compiler, load_plugin, plugin_library
from ..errors import UserError
from .finding import GOOD, NOTE, Finding, from_error


def check_data_plane() -> Iterator[Finding]:
    import torch

    try:
        yield Finding("data plane", "compiler", GOOD, " ".join(compiler()))
    except UserError as error:
        yield from_error("data plane", "compiler", error, NOTE)
    before = _built()
    began = time.perf_counter()
    try:
        without_cuda = load_plugin()
        path = build(plugin_library()) if without_cuda else None
    except UserError as error:
        yield from_error("data plane", "DALI operators", error)
        return
    new = _built() - before
    how = f"compiled now in {time.perf_counter() - began:.0f} s" if new else "found compiled"
    yield Finding("data plane", "DALI operators", GOOD, f"{how}: {path or cache_folder()}")
    if torch.cuda.is_available():
        where = f"on the CPU: {without_cuda}" if without_cuda else "on the GPU"
        yield Finding(
            "data plane", "views", NOTE if without_cuda else GOOD, where, "see docs/pretrain.md" if without_cuda else ""
        )


def _built() -> set[str]:
    return {path.parent.name for path in cache_folder().glob("*/*.so")}
