"""From a configuration or a run's folder to the objects it describes."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..methods import METHODS, Method
from . import checkpoint
from .config import Config, read_config
from .data.planner import usable_cases
from .data.splits import held_aside
from .data.store import Case, Store
from .errors import UserError
from .versions import versions


@dataclass(frozen=True)
class LoadedRun:
    """A finished or unfinished run, with its method as of the last checkpoint."""

    config: Config
    method: Method
    step: int
    store: Store
    cases: list[Case]  # those that it trains on
    validation_cases: list[Case]  # those held aside


def build_method(config: Config) -> Method:
    """The method of a configuration with its initial weights, which depend on the seed alone."""
    torch.manual_seed(config.seed)
    try:
        method: Method = METHODS[config.method.name](config.method, config.backbone, config.views)
        method.set_stages(config.stages, config.train.steps)
    except ValueError as error:
        raise UserError(str(error)) from None
    method.seed = config.seed
    return method


def open_cases(config: Config) -> tuple[Store, list[Case], list[Case], list[tuple[Case, str]]]:
    """The store of a run, its training cases, those held aside, and those that the crop cannot use, with the reason."""
    store = Store(Path(config.data))
    usable, excluded = usable_cases(store.cases, tuple(config.views.crop))
    large_enough = {case.id for case in usable}
    # All cases are split, whatever the crop: so are they where the weights are tested.
    kept, aside = (
        [case for case in part if case.id in large_enough]
        for part in held_aside(store.cases, config.validation.fraction)
    )
    if not kept:
        raise UserError(f"validation.fraction: {config.validation.fraction} leaves no case to train on; lower it")
    return store, kept, aside, excluded


def describe(config: Config, cases: Sequence[Case]) -> dict[str, Any]:
    """What the weights file says of itself; the spacing is that of the cases where they share one."""
    spacings = {case.spacing_mm for case in cases}
    return {
        "format": 1,
        "method": config.method.name,
        "recipe": Path(config.recipe).name,  # of one's own: without the folders that it lies in
        "backbone": config.backbone.to_dict(),
        "crop": list(config.views.crop),
        "spacing_mm": list(spacings.pop()) if len(spacings) == 1 else None,
        "data": {
            "volumes": len(cases),
            "voxels": sum(math.prod(case.shape) for case in cases),
            "modalities": dict(sorted(Counter(case.modality for case in cases).items())),
            "index_sha256": config.data_sha256,
            "validation_fraction": config.validation.fraction,  # of that store: which cases were not trained on
        },
        "version": version("voxtrast"),
        "versions": versions(),
    }


def load_run(run: Path) -> LoadedRun:
    """Opens a run's folder: its configuration, its store, and the method with the newest whole checkpoint.

    Raises: UserError where the folder holds no run or no checkpoint.
    """
    config = read_config(run / "config.yaml")
    state, _ = checkpoint.load_latest(run / "checkpoints")
    if state is None:
        raise UserError(f"{run}: holds no checkpoint yet; let it run to its first one (checkpoint.every)")
    method = build_method(config)
    method.load_state_dict(state.model)
    method.load_state_dict(state.average, strict=False)  # what is exported, where the run keeps an average
    method.eval()
    store, kept, aside, _ = open_cases(config)
    return LoadedRun(config, method, state.step, store, kept, aside)
