"""The honest cheap rival: one grid_sample a view with a composed grid, and intensities in place, in plain torch.

On a CPU one worker a core makes slot after slot; on a GPU one process does, from volumes on the device.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .recipe import VIEWS, Draw, Volume, draw_slot


def sample(volume: Tensor, draws: list[Draw], size: int, *, elastic: bool = True, lean: bool = False) -> Tensor:
    """Views (B, 1, n, n, n) of a volume (1, 1, D, H, W), 0 outside."""
    half = (np.array(volume.shape[2:]) - 1) / 2
    points = np.stack([draw.control_points if elastic else 0 * draw.control_points for draw in draws])
    points /= half[:, None, None, None].astype(np.float32)
    grid = _lean_grid if lean else _usual_grid
    source = volume.expand(len(draws), -1, -1, -1, -1)
    matrices = np.stack([(draw.to_volume - np.eye(1, 4, 3) * half[:, None]) / half[:, None] for draw in draws])
    return functional.grid_sample(source, grid(matrices, points, size, volume.device), align_corners=True)


# Grids (B, n, n, n, 3): where a voxel is read, x first, from -1 at the first voxel's centre to 1 at the last one's.


def _usual_grid(matrices: np.ndarray, points: np.ndarray, size: int, device: torch.device) -> Tensor:
    """As it is written everywhere: an affine grid, and a coarse field upsampled and added to it."""
    half = (size - 1) / 2
    linear, offset = matrices[:, :, :3] * half, matrices[:, :, 3] + matrices[:, :, :3].sum(2) * half
    theta = torch.from_numpy(np.concatenate([linear[:, ::-1, ::-1], offset[:, ::-1, None]], 2).astype(np.float32))
    grid = functional.affine_grid(theta.to(device), [len(matrices), 1, size, size, size], align_corners=True)
    control = torch.from_numpy(points[:, ::-1].copy()).to(device)
    field = functional.interpolate(control, (size,) * 3, mode="trilinear", align_corners=True)
    return grid.add_(field.permute(0, 2, 3, 4, 1))


def _lean_grid(matrices: np.ndarray, points: np.ndarray, size: int, device: torch.device) -> Tensor:
    """The affine added to the control points: linear interpolation keeps it, and one pass makes the grid."""
    places = np.linspace(0, size - 1, points.shape[2])
    index = np.stack(np.meshgrid(places, places, places, indexing="ij"))
    affine = np.einsum("bij,jdhw->bidhw", matrices[:, :, :3], index) + matrices[:, :, 3, None, None, None]
    control = torch.from_numpy((affine + points)[:, ::-1].astype(np.float32)).to(device)
    field = functional.interpolate(control, (size,) * 3, mode="trilinear", align_corners=True)
    return field.permute(0, 2, 3, 4, 1)


def change_intensities(views: Tensor, draws: list[Draw], background: float) -> Tensor:
    """In place; of views whose background is 0, which comes back."""

    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=views.device).view(-1, 1, 1, 1, 1)

    flat = views.flatten(1)
    low, high = (found.view(-1, 1, 1, 1, 1) for found in flat.aminmax(dim=1))
    span = (high - low).clamp(min=1e-6)
    views.sub_(low).mul_(1 / span).pow_(numbers([draw.exponent for draw in draws]))
    views.mul_(span).add_(low + numbers([draw.shift + background for draw in draws]))
    mean, factor = flat.mean(1).view(-1, 1, 1, 1, 1), numbers([draw.factor for draw in draws])
    views.mul_(factor).add_(mean * (1 - factor))
    return views.addcmul_(torch.randn_like(views), numbers([draw.noise_std for draw in draws]))


class SlotMaker:
    """Slot after slot of some volumes."""

    def __init__(self, volumes: list[Volume], size: int, *, device: str = "cpu", lean: bool = False) -> None:
        self._volumes, self._size, self._lean = volumes, size, lean
        self._sources = [
            torch.from_numpy(volume.voxels - np.float32(volume.background)).to(device)[None, None] for volume in volumes
        ]

    def __call__(self, generator: np.random.Generator) -> dict[str, Any]:
        number = int(generator.integers(len(self._volumes)))
        _, draws = draw_slot(generator, self._volumes[number], self._size)
        views = sample(self._sources[number], draws, self._size, lean=self._lean)
        change_intensities(views, draws, self._volumes[number].background)
        return {name: views[place : place + 1] for place, name in enumerate(VIEWS)}
