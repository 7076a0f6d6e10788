"""A store of spheres with labels, small enough to train on in seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from voxtrast.engine.data.store import LABELS, VOLUMES, Case, Store, write_array, write_index, write_settings
from voxtrast.engine.weights import save_weights
from voxtrast.methods.backbone import Backbone, BackboneConfig

BACKBONE = BackboneConfig(features=[8, 16, 16])


def sphere_case(folder: Path, number: int, values: tuple[int, ...], size: int = 24, labelled: bool = True) -> Case:
    """A bright ball in noise, its halves labelled with the two values (one value: the whole ball)."""
    generator = np.random.default_rng(number)
    centre = generator.uniform(size * 0.4, size * 0.6, size=3)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), axis=-1)
    inside = np.linalg.norm(grid - centre, axis=-1) < size * 0.28
    label = np.where(inside, values[0], 0)
    if len(values) > 1:
        label[inside & (grid[..., 0] > centre[0])] = values[1]
    image = (generator.normal(0, 0.2, label.shape) + inside + (label == values[-1])).astype(np.float16)
    name = f"case{number:02d}"
    sha256 = write_array(folder / VOLUMES / f"{name}.npy", image)
    stored = label.astype(np.uint8)
    label_sha256 = write_array(folder / LABELS / f"{name}.npy", stored) if labelled else None
    return Case(
        id=name,
        shape=image.shape,
        spacing_mm=(1.0, 1.0, 1.0),
        modality="mr",
        dtype="float16",
        affine=((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
        intensity={
            "background": float(image.min()),
            "low": 0.0,
            "high": 2.0,
            "mean": float(image.mean(dtype=float)),
            "std": float(image.std(dtype=float)),
        },
        source=f"{name}.nii.gz",
        source_sha256="0" * 64,
        sha256=sha256,
        label_sha256=label_sha256,
        label_dtype="uint8" if labelled else None,
        label_classes=values if labelled else (),
    )


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    def make(values: list[tuple[int, ...]], labelled: bool = True, size: int = 24) -> Store:
        folder = tmp_path / "store"
        (folder / VOLUMES).mkdir(parents=True)
        (folder / LABELS).mkdir()
        cases = [sphere_case(folder, number, each, size, labelled) for number, each in enumerate(values)]
        write_settings(folder, {"format": 1, "spacing_mm": 1.0})
        write_index(folder, cases)
        return Store(folder)

    return make


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    """Six cases with the classes 2 and 5: as in real stores the values have gaps."""
    return make_store([(2, 5)] * 6)


def write_weights(path: Path, config: BackboneConfig) -> Path:
    save_weights(
        path,
        Backbone(config).transferable(),
        {
            "format": 1,
            "method": "cover",
            "recipe": "cover-3d",
            "step": 7,
            "backbone": config.to_dict(),
            "version": "0",
        },
    )
    return path


@pytest.fixture
def make_weights() -> Callable[[Path, BackboneConfig], Path]:
    return write_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)  # other initial weights than those of the from-scratch arm
    return write_weights(tmp_path / "run" / "weights.safetensors", BACKBONE)
