"""Where the voxels of a view come from, and where another view shows them: a plan's geometry, for people and tests.

Points are (N, 3) indices (D, H, W), depth 0 in views of two dimensions.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .planner import ViewPlan

Points = NDArray[np.float64]


def to_volume(view: ViewPlan, points: Points) -> Points:
    """Indices of the view -> indices of the volume."""
    return points @ view.to_volume[:, :3].T + view.to_volume[:, 3] + deformation(view, points)


def to_view(view: ViewPlan, places: Points, iterations: int = 50) -> Points:
    """Indices of the volume -> indices of the view; it may not show them.

    By fixed-point iteration where the view is deformed: a field that cannot fold can be undone.
    """
    linear, offset = view.to_volume[:, :3], view.to_volume[:, 3]
    inverse = np.linalg.inv(linear).T
    points = (places - offset) @ inverse
    for _ in range(iterations if view.control_points.size else 0):
        points = (places - offset - deformation(view, points)) @ inverse
    return points


def deformation(view: ViewPlan, points: Points) -> Points:
    """What the cubic B-spline adds, in voxels of the volume; outside the view as at its border."""
    if not view.control_points.size:
        return np.zeros_like(points)
    inside = np.clip(points, 0, np.array(view.size) - 1) / np.array(view.spacing)
    places = inside.T + 1  # control point k stands at (k - 1) spacings
    options = {"order": 3, "prefilter": False, "mode": "nearest"}
    shifts = view.control_points.astype(np.float64)
    return np.stack([ndimage.map_coordinates(component, places, **options) for component in shifts], axis=1)
