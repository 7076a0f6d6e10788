"""Points of views and of their volume, against the fields that the operators write."""

from pathlib import Path

import numpy as np
import pytest
from view_samples import make_store, slots

from voxtrast.engine.data.matching import Points, to_view, to_volume
from voxtrast.engine.data.planner import ViewPlan
from voxtrast.methods.views import AffineRanges, BoxRanges, ElasticRanges, View, ViewSpec

ELASTIC = ElasticRanges(spacing_voxels=7, magnitude_voxels=[1, 2.5])


def every_index(view: ViewPlan) -> Points:
    return np.stack(np.meshgrid(*map(np.arange, view.size), indexing="ij"), -1).reshape(-1, 3).astype(np.float64)


@pytest.mark.parametrize("crop", [(14, 16, 18), (16, 18)])
def test_points_go_where_the_field_says_and_back(crop: tuple[int, ...], tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [(30, 34, 38)] * 2)
    other = View(box=BoxRanges(sides=[[size + 4 for size in crop]]), affine=AffineRanges(), flips=[0.5] * len(crop))
    moved = View(affine=AffineRanges(), elastic=ELASTIC, flips=[0.5] * len(crop), displacement=True)
    moved.displacement_to = "other"
    for plan, _, sample in slots(store, ViewSpec(crop, {"moved": moved, "other": other}), 2):
        view, partner = plan.views["moved"], plan.views["other"]
        points = every_index(view)
        there = to_view(partner, to_volume(view, points))
        field = sample["displacement"].reshape(len(crop), -1).T
        np.testing.assert_allclose((there - points)[:, -len(crop) :], field, atol=1e-4)
        np.testing.assert_allclose(to_view(view, to_volume(view, points)), points, atol=1e-9)
