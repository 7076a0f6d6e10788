"""Stores of noise and the views made of them, for the tests of the view pipeline."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from voxtrast.engine.data.foreground import foreground_places
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.planner import Plan
from voxtrast.engine.data.store import Case, Store, flat_places, write_array, write_index, write_settings
from voxtrast.methods.cover import cover_appearance
from voxtrast.methods.views import AffineRanges, View, ViewSpec

EPSILON = 2.0**-24  # relative rounding of float32
COVER = {"moving": View(appearance=cover_appearance()), "fixed": View(affine=AffineRanges(), displacement=True)}
WIDE = AffineRanges(rotation_degrees=40, scale=[0.6, 1.6], shear_degrees=15, translation_voxels=8)


def make_store(folder: Path, shapes: list[tuple[int, int, int]], dtype: str = "float16", seed: int = 0) -> Store:
    """Volumes of white noise: no interpolation goes unnoticed."""
    for name in ("volumes", "labels"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(seed)
    cases = []
    for index, shape in enumerate(shapes):
        volume = (generator.standard_normal(shape) * 0.7 + 0.3).astype(dtype)
        low, high = np.percentile(volume.astype(np.float64), [0.5, 99.5]).tolist()
        intensity = {"background": float(volume.min()), "low": low, "high": high, "mean": 0.3, "std": 0.7}
        name = f"case{index}"
        sha256 = write_array(folder / "volumes" / f"{name}.npy", volume)
        affine = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
        places = flat_places(foreground_places(volume, low, high))
        source = f"{'ab'[index % 2]}/{name}.nii"
        case = Case(name, shape, (1.0, 1.0, 1.0), affine, "mr", dtype, intensity, source, "", sha256, foreground=places)
        cases.append(case)
    write_settings(folder, {"format": 1})
    write_index(folder, cases)
    return Store(folder)


def varied_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three volumes of different odd shapes, all larger than the crops of the tests."""
    return make_store(tmp_path_factory.mktemp("view") / "store", [(40, 36, 44), (30, 50, 34), (33, 34, 35)])


def take(store: Store, spec: ViewSpec, steps: int, **settings: Any) -> list[list[dict[str, Any]]]:
    settings = {"seed": 7, "global_batch": 4, "threads": 1, **settings}
    with ViewPipeline(store, store.cases, spec, **settings) as pipeline:
        return list(itertools.islice(pipeline, steps))


def slots(store: Store, spec: ViewSpec, steps: int, **settings: Any) -> Iterator[tuple[Plan, Case, dict[str, Any]]]:
    """Each slot with its plan; tensors without their batch axis, as float64 arrays."""
    settings = {"seed": 7, "global_batch": 4, **settings}
    with ViewPipeline(store, store.cases, spec, threads=1, **settings) as pipeline:
        for step, (batch,) in zip(range(steps), pipeline, strict=False):
            for slot in range(settings["global_batch"]):
                plan = pipeline.planner.plan(step, slot)
                sample = {key: item[slot] for key, item in batch.items()}
                numbers = {key: item.double().numpy() for key, item in sample.items() if key not in ("case", "origin")}
                case = pipeline.planner.cases[plan.case_index]
                assert sample["case"] == case.id
                assert tuple(sample["origin"].tolist()) == plan.origin
                yield plan, case, numbers


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert set(first) == set(second)
    for key in first:
        same = first[key] == second[key] if key == "case" else torch.equal(first[key], second[key])
        assert same, key
