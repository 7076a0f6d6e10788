"""Who makes views, how, and what each of them lacks of the recipe."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from ..place import Cannot
from .volumes import load_volumes

AHEAD_OF_DALI = 3  # steps, as ViewPipeline's by default
AHEAD_OF_WORKER = 2  # slots, as DataLoader's by default


@dataclass(frozen=True)
class Setting:
    store: Path
    size: int  # of a view, along each axis
    workers: int  # threads, or processes of one thread
    device: str  # cpu or cuda

    @property
    def slots(self) -> int:
        return 2 * self.workers

    @property
    def device_id(self) -> int | None:
        return torch.cuda.current_device() if self.device == "cuda" else None


Batches = Any  # next() gives tensors by name
Make = Callable[[], Batches]


@dataclass(frozen=True)
class Row:
    """`prepare` imports and loads, and gives what builds the stream of batches."""

    prepare: Callable[[Setting], Make]
    lacks: tuple[str, ...] = ()
    ahead_of_worker: bool = False  # made by processes, ahead of who asks
    devices: tuple[str, ...] = ("cpu",)
    reads: bool = False  # from the store, in place of volumes in memory

    @property
    def lacks_field(self) -> bool:
        return "no field" in self.lacks

    def ahead(self, setting: Setting) -> int:
        """Batches that may be ready before they are asked for."""
        if self.ahead_of_worker:
            return AHEAD_OF_WORKER * setting.workers if setting.device == "cpu" else 0
        return AHEAD_OF_DALI


class Slots(IterableDataset[dict[str, Any]]):
    """Slot after slot, other ones in each worker."""

    def __init__(self, make: Callable[[np.random.Generator], dict[str, Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        about = torch.utils.data.get_worker_info()
        generator = np.random.default_rng(0 if about is None else about.id)
        while True:
            yield self._make(generator)


def _imported(module: str, needs: str = "") -> Any:
    try:
        if needs:
            import_module(needs)
        return import_module(f".{module}", __package__)
    except ModuleNotFoundError as missing:
        raise Cannot(f"{missing.name} is not installed") from missing
    except ImportError as broken:
        raise Cannot(f"import: {(str(broken).splitlines() or [''])[0]}") from broken


def _reading(setting: Setting, *, cold: bool) -> Make:
    options = {"slots": setting.slots, "threads": setting.workers, "device_id": setting.device_id, "cold": cold}
    return functools.partial(_imported("ours").Reading, setting.store, setting.size, **options)


def _operator(setting: Setting) -> Make:
    options = {"slots": setting.slots, "threads": setting.workers, "device_id": setting.device_id}
    return functools.partial(_imported("ours").OperatorAlone, setting.store, setting.size, **options)


def _chain(setting: Setting, *, field: bool) -> Make:
    options = {"slots": setting.slots, "threads": setting.workers, "device_id": setting.device_id, "field": field}
    volumes = load_volumes(setting.store, setting.size)
    return functools.partial(_imported("by_dali").Chain, volumes, setting.size, **options)


def _workers(setting: Setting, *, module: str, needs: str = "", **options: Any) -> Make:
    """One process of one thread a core; on a GPU this process alone."""
    volumes = load_volumes(setting.store, setting.size)
    maker = _imported(module, needs).SlotMaker

    def make() -> Batches:
        if setting.device == "cuda":
            return iter(Slots(maker(volumes, setting.size, device="cuda", **options)))
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
        slots = Slots(maker(volumes, setting.size, **options))
        options_of_workers: dict[str, Any] = {"num_workers": setting.workers, "prefetch_factor": AHEAD_OF_WORKER}
        return iter(DataLoader(slots, batch_size=None, multiprocessing_context="fork", **options_of_workers))

    return make


def core_seconds_by_part(setting: Setting) -> dict[str, float]:
    """Of ViewPipeline, a slot; to be called in a process of its own, as DALI stays where it was imported."""
    found: dict[str, float] = _imported("profile").profile(setting.store, setting.size)
    return found


def _by_workers(module: str, *lacks: str, on_gpu: bool = False, needs: str = "", **options: Any) -> Row:
    devices = ("cpu", "cuda") if on_gpu else ("cpu",)
    prepare = functools.partial(_workers, module=module, needs=needs, **options)
    return Row(prepare, lacks, ahead_of_worker=True, devices=devices)


BOTH = ("cpu", "cuda")
OURS = "ours"
ROWS = {
    OURS: Row(functools.partial(_reading, cold=False), devices=BOTH, reads=True),
    "ours, cold files": Row(functools.partial(_reading, cold=True), devices=BOTH, reads=True),
    "ours, operator alone": Row(_operator, devices=BOTH),
    "DALI operators": Row(functools.partial(_chain, field=False), ("no elastic", "no field"), devices=BOTH),
    "DALI operators, field": Row(functools.partial(_chain, field=True), ("no elastic",), devices=BOTH),
    "grid_sample": _by_workers("by_grid_sample", "no field", on_gpu=True),
    "grid_sample, lean grid": _by_workers("by_grid_sample", "no field", on_gpu=True, lean=True),
    "batchgeneratorsv2": _by_workers("by_batchgenerators", "no field", needs="batchgeneratorsv2"),
    "MONAI": _by_workers("by_monai", "no field", needs="monai"),
    "MONAI, no elastic": _by_workers("by_monai", "no elastic", "no field", needs="monai", elastic=False),
    "TorchIO": _by_workers("by_torchio", "padded", "no contrast", "no brightness", "no field", needs="torchio"),
}
