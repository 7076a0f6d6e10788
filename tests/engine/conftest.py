"""Runs of the stand-in method, in this process."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from stand_in import Run, StandIn, recipe

from voxtrast.engine.config import load_config
from voxtrast.engine.pretrain import pretrain
from voxtrast.methods import METHODS


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method is known by its name."""
    monkeypatch.setitem(METHODS, "stand_in", StandIn)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(stand_in: None, tiny_store: Path, tmp_path: Path) -> Run:
    """Pretrains: run(name, "key=value", ..., stages=YAML) gives the run's folder."""

    def start(name: str, *words: str, stages: str = "") -> Path:
        output = tmp_path / name
        pretrain(load_config(str(recipe(tmp_path, stages)), [f"data={tiny_store}", f"output={output}", *words]))
        return output

    return start


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """What a run in this process leaves: other tests make groups of their own."""
    yield
    if dist.is_initialized():
        import deepspeed

        dist.destroy_process_group()
        # DeepSpeed would go on with groups that are gone.
        deepspeed.comm.comm.cdb = None
        importlib.reload(deepspeed.utils.groups)
