"""Views of real volumes and of their labels, through files, DALI and our operators, against scipy.ndimage."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from scipy import ndimage

from voxtrast.engine.data.matching import to_volume
from voxtrast.engine.data.native import STORED_TYPES, load_plugin
from voxtrast.engine.data.planner import Planner, ViewPlan
from voxtrast.engine.data.prepare import prepare
from voxtrast.engine.data.store import Store
from voxtrast.methods.views import AffineRanges, ElasticRanges, View, ViewSpec

SOURCES = {
    "ct": ("misc_pretrain", "ct_abdomen_totalseg"),
    "lumbar": ("lumbar_myosegmentum_2mm", "lumbar_01"),
    "hippocampus": ("msd_hippocampus", "hippocampus_001"),
}
# Never smaller than the volume: nothing is smoothed before it is sampled.
VIEW = View(
    affine=AffineRanges(scale=[0.6, 0.9]),
    elastic=ElasticRanges(spacing_voxels=12, magnitude_voxels=[2, 4]),
    flips=[0.5, 0.5, 0.5],
)


@pytest.fixture(scope="module", params=SOURCES)
def store(request: pytest.FixtureRequest, real_volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder, name = SOURCES[request.param]
    raw = tmp_path_factory.mktemp("real")
    for file in (real_volumes / folder).rglob(f"{name}*.nii*"):
        copy = raw / "raw" / file.relative_to(real_volumes / folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    prepare(raw / "raw", raw / "store", spacing_mm=1.5 if request.param == "ct" else 1.0, workers=1)
    return Store(raw / "store")


def made(file: Any, offset: int, dtype: str, plan: NDArray[np.uint8], labels: bool) -> NDArray[np.float32]:
    load_plugin()
    described = np.array([file.fileno(), offset, STORED_TYPES.index(dtype)], np.int64)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)
    with pipeline:
        sent = fn.external_source(source=lambda: [plan], batch=True)
        opened = fn.external_source(source=lambda: [described], batch=True)
        region = fn.voxtrast_read(opened, sent, labels=labels)
        pipeline.set_outputs(fn.voxtrast_view(region, sent, view=0, labels=labels))
    pipeline.build()
    return np.array(pipeline.run()[0].at(0))


def sampled(volume: NDArray[Any], view: ViewPlan, background: float, order: int) -> NDArray[np.float64]:
    index = np.stack(np.meshgrid(*map(np.arange, view.size), indexing="ij"), -1).reshape(-1, 3).astype(np.float64)
    padded = np.pad(volume.astype(np.float64), 1, constant_values=background)
    places = to_volume(view, index).T + 1
    if order == 0:
        places = np.floor(places + 0.5)
    return ndimage.map_coordinates(padded, places, order=order, mode="nearest").reshape(view.size)


def test_images_and_labels_are_sampled_where_scipy_samples_them(store: Store) -> None:
    (case,) = store.cases
    planner = Planner([case], ViewSpec((40, 40, 40), {"x": VIEW}), 5, global_batch=1, foreground=1.0)
    span = case.intensity["high"] - case.intensity["low"]
    labelled = 0
    for step in range(4):
        plan = planner.plan(step, 0)
        sent = np.frombuffer(plan.to_bytes(), np.uint8)
        view = plan.views["x"]
        volume = store.volume(case)
        with open(store.path / "volumes" / f"{case.id}.npy", "rb") as file:
            image = made(file, volume.offset, case.dtype, sent, labels=False)
        expected = sampled(volume, view, case.intensity["background"], order=1)
        assert expected.std() > 0.02 * span, "something is seen"
        assert np.abs(image - expected).max() < 2e-4 * span
        label = store.label(case)
        with open(store.path / "labels" / f"{case.id}.npy", "rb") as file:
            found = made(file, label.offset, case.label_dtype, sent, labels=True)
        nearest = sampled(label, view, 0.0, order=0)
        labelled += len(np.unique(nearest)) > 1
        # Where a place is half-way between two voxels float32 and float64 may differ.
        assert (found != nearest).mean() < 1e-3
        assert set(np.unique(found)) <= set(np.unique(label)) | {0.0}
    assert labelled >= 2
