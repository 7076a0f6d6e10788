"""The grid of a store: resampling keeps places, range and classes."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage

from voxtrast.engine.data import resampling
from voxtrast.engine.data.reading import read_volume


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (10.0, -20.0, 15.0)])
def test_resampling_reproduces_a_ramp_in_world_millimetres(angles: tuple, tmp_path: Path, ras_affine: Callable) -> None:
    affine = ras_affine("LPS", (0.7, 1.0, 3.1), angles)
    index = np.stack(np.meshgrid(np.arange(60), np.arange(50), np.arange(30), indexing="ij"), axis=-1)
    gradient = np.array([0.31, -0.17, 0.23])
    nibabel.save(
        nibabel.Nifti1Image((apply_affine(affine, index) @ gradient).astype(np.float32), affine), tmp_path / "a.nii"
    )
    volume = read_volume([tmp_path / "a.nii"], dicom=False)
    grid = resampling.isotropic_grid(volume.values.shape, volume.spacing_mm, 1.5)
    result = resampling.resample_image(volume.values, grid)
    affine = grid.affine(volume.affine)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), 1.5, rtol=1e-6)
    where = np.stack(np.meshgrid(*map(np.arange, result.shape), indexing="ij"), axis=-1)
    error = np.abs(result - apply_affine(affine, where) @ gradient)
    # 4 old voxels from a side neither the splines nor the low-pass notice that the ramp ends
    inside = tuple(slice(int(np.ceil(4 / ratio)) + 1, -int(np.ceil(4 / ratio)) - 1) for ratio in grid.ratio)
    assert error[inside].max() < 1e-3
    assert error.max() < 0.5


def test_grid_shares_the_centre_and_stays_within_the_outer_voxels() -> None:
    for length, ratio in ((35, 1.5), (36, 0.37), (20, 2.0), (1, 3.0), (16, 1.0005)):
        grid = resampling.isotropic_grid((length, 20, 20), np.array([1.0, 1.0, 1.0]), ratio)
        first = grid.offset[0]
        last = first + (grid.shape[0] - 1) * grid.ratio[0]
        assert first >= -1e-5
        assert last <= length - 1 + 1e-5
        assert first == pytest.approx(length - 1 - last)
        assert first < grid.ratio[0] / 2 + 1e-5, "no whole voxel is given away"


def test_spacing_within_a_thousandth_is_left_alone() -> None:
    values = np.random.default_rng(0).normal(size=(20, 21, 22)).astype(np.float32)
    grid = resampling.isotropic_grid(values.shape, np.array([1.5, 1.5 * 1.0009, 1.5 * 0.9991]), 1.5)
    assert grid.same
    assert resampling.resample_image(values, grid) is values
    assert resampling.resample_label(values, grid) is values
    assert not resampling.isotropic_grid(values.shape, np.array([1.5, 1.5 * 1.002, 1.5]), 1.5).same


def centres(label: np.ndarray, grid: resampling.Grid | None = None) -> dict[int, np.ndarray]:
    """Centre of mass of each class in voxels of the input."""
    places = {int(each): np.argwhere(label == each).mean(axis=0) for each in np.unique(label)}
    return places if grid is None else {each: place * grid.ratio + grid.offset for each, place in places.items()}


@pytest.mark.parametrize("size", [40, 41])
@pytest.mark.parametrize("ratio", [2.0, 1.5, 0.5, 2.0000002])
def test_labels_keep_their_centre_of_mass_and_volume(ratio: float, size: int) -> None:
    """Two balls that touch, at many places of the grid: on average nothing moves, and nothing moves far."""
    zyx = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    shifts, growths = [], []
    for middle in np.random.default_rng(0).uniform(-1, 1, (40, 3)) + size / 2:
        label = np.zeros((size,) * 3, np.uint8)
        for number, side in ((3, -8), (200, 8)):
            away = zyx - (middle + np.array([0, side / 2, side]))[:, None, None, None]
            label[(away**2).sum(axis=0) < 64] = number
        grid = resampling.isotropic_grid(label.shape, np.ones(3), ratio)
        result = resampling.resample_label(label, grid)
        before, after = centres(label), centres(result, grid)
        assert after.keys() == before.keys()
        shifts += [after[each] - before[each] for each in (3, 200)]
        growths += [np.sum(result == each) * ratio**3 / np.sum(label == each) - 1 for each in (3, 200)]
    # in voxels of the input; taking the nearest one and rounding halves up is off by 0.5 at a ratio of 2
    assert np.abs(shifts).max() < 0.125 * max(ratio, 1)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.03
    assert abs(np.mean(growths)) < 0.02, "ties favour no class"


def test_resampling_invents_no_class() -> None:
    draw = np.random.default_rng(1)
    label = np.array([0, 2, 7, 300, 65535], np.uint16)[draw.integers(0, 5, (17, 20, 23))]
    for ratio in (0.45, 1.3, 2.0):
        result = resampling.resample_label(label, resampling.isotropic_grid(label.shape, np.ones(3), ratio))
        assert result.dtype == np.uint16
        assert set(np.unique(result)) <= {0, 2, 7, 300, 65535}


def test_a_new_voxel_that_lies_on_an_old_one_has_its_class() -> None:
    label = np.random.default_rng(2).integers(0, 9, (21, 21, 21)).astype(np.uint8)
    finer = resampling.resample_label(label, resampling.isotropic_grid(label.shape, np.ones(3), 0.5))
    np.testing.assert_array_equal(finer[::2, ::2, ::2], label)
    everywhere = np.full((20, 20, 20), 5, np.uint8)
    coarser = resampling.resample_label(everywhere, resampling.isotropic_grid(everywhere.shape, np.ones(3), 1.7))
    assert (coarser == 5).all()


def test_downsampling_does_not_alias() -> None:
    stripes = np.zeros((60, 60, 60), np.float32)
    stripes[::2] = 1.0  # finer than the new voxels can show: must become grey, not a new pattern
    result = resampling.resample_image(stripes, resampling.isotropic_grid(stripes.shape, np.ones(3), 3.3))
    assert np.abs(result[2:-2] - 0.5).max() < 0.02


def test_resampled_values_stay_within_the_input_range() -> None:
    step = np.zeros((20, 20, 20), np.float32)
    step[10:] = 1.0
    result = resampling.resample_image(step, resampling.isotropic_grid(step.shape, np.ones(3), 0.45))
    assert (result.min(), result.max()) == (0.0, 1.0)


# Against others


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    values = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.2)
    return (values / values.std()).astype(np.float32)


@pytest.mark.parametrize("spacing", [(1.0, 1.2, 2.0), (5.0, 0.6, 0.6), (3.1, 0.31, 1.5)])
def test_three_matrices_are_the_filters_and_splines_of_scipy(spacing: tuple) -> None:
    values = blobs((30, 61, 50))
    grid = resampling.isotropic_grid(values.shape, np.array(spacing), 1.5)
    widths = [np.sqrt(max(ratio**2 - 1, 0)) / resampling.FWHM_PER_SIGMA for ratio in grid.ratio]
    expected = ndimage.gaussian_filter(values.astype(np.float64), widths, mode="nearest", truncate=3.0)
    expected = ndimage.affine_transform(expected, np.array(grid.ratio), grid.offset, grid.shape, order=3, mode="mirror")
    expected = np.clip(expected, values.min(), values.max())
    assert np.abs(resampling.resample_image(values, grid) - expected).max() < 3e-6


@pytest.mark.parametrize("length", [2, 5, 61, 900])
@pytest.mark.parametrize("ratio", [0.37, 1.002, 3.3, 150.0])
@pytest.mark.parametrize("order", [1, 3])
def test_the_band_of_an_axis_is_all_of_its_matrix(length: int, ratio: float, order: int) -> None:
    """Against the filters applied to every voxel of the axis alone: nothing that float32 can show lies outside."""
    grid = resampling.isotropic_grid((length,), np.ones(1), ratio)
    count, offset = grid.shape[0], grid.offset[0]
    band = resampling.axis_weights(length, count, ratio, offset, order, low_pass=True)
    result = np.zeros((count, length))
    for rows, columns, weights in band.blocks:
        assert weights.shape[1] < 128 + 60 + 3 * ratio, "not much more than what these new voxels need"
        result[rows, columns] = weights
    width = np.sqrt(max(ratio**2 - 1, 0)) / resampling.FWHM_PER_SIGMA
    every = ndimage.gaussian_filter(np.eye(length), (width, 0), mode="nearest", truncate=3.0)
    places = (np.arange(count) * ratio + offset)[None]
    expected = [ndimage.map_coordinates(line, places, order=order, mode="mirror") for line in every.T]
    assert np.abs(result - np.stack(expected, axis=1)).max() < 6e-8


def test_labels_on_a_long_axis_are_those_of_its_parts() -> None:
    """Classes begin and end in the middle of a block of weights, at its ends, and beyond a whole one."""
    draw = np.random.default_rng(3)
    label = np.repeat(draw.integers(0, 6, 150), draw.integers(1, 60, 150)).astype(np.uint8)[:, None, None]
    for ratio in (0.6, 1.5, 2.5):
        grid = resampling.isotropic_grid(label.shape, np.ones(3), ratio)
        places = np.arange(grid.shape[0]) * ratio + grid.offset[0]
        shares = [np.interp(places, np.arange(len(label)), label[:, 0, 0] == number) for number in range(6)]
        clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-3
        result = resampling.resample_label(label, grid)[:, 0, 0]
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(result[clear], np.argmax(shares, axis=0)[clear])


INTERPOLATORS = {0: (sitk.sitkNearestNeighbor, 0.0), 1: (sitk.sitkLinear, 2e-5), 3: (sitk.sitkBSpline, 2e-5)}


def by_simpleitk(values: np.ndarray, grid: resampling.Grid, order: int) -> np.ndarray:
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize(grid.shape[::-1])
    resampler.SetOutputSpacing(grid.ratio[::-1])
    resampler.SetOutputOrigin(grid.offset[::-1])
    resampler.SetInterpolator(INTERPOLATORS[order][0])
    return sitk.GetArrayFromImage(resampler.Execute(sitk.GetImageFromArray(values)))


@pytest.mark.parametrize("order", resampling.ORDERS)
@pytest.mark.parametrize("spacing", [(1.0, 1.21, 2.0), (5.0, 0.61, 0.61)])
def test_every_order_is_that_of_simpleitk(order: int, spacing: tuple) -> None:
    values = blobs((30, 61, 50))
    grid = resampling.isotropic_grid(values.shape, np.array(spacing), 1.5)
    result = resampling.resample_image(values, grid, order=order, low_pass=False)
    expected = np.clip(by_simpleitk(values, grid, order), values.min(), values.max())
    assert np.abs(result - expected).max() <= INTERPOLATORS[order][1]


def test_real_volumes_come_out_as_by_simpleitk(real_volumes: Path) -> None:
    for name in ("mr_pyradiomics_brain1", "ct_abdomen_totalseg"):
        volume = read_volume([real_volumes / f"misc_pretrain/{name}.nii.gz"], dicom=False)
        values = volume.values[:60, 60:130, 50:120].astype(np.float32)
        grid = resampling.isotropic_grid(values.shape, volume.spacing_mm, 1.2)
        result = resampling.resample_image(values, grid, low_pass=False)
        expected = np.clip(by_simpleitk(values, grid, 3), values.min(), values.max())
        assert np.abs(result - expected).max() < 1e-5 * np.abs(values).max()


def test_nearest_voxels_keep_their_values() -> None:
    values = blobs((20, 30, 25))
    result = resampling.resample_image(values, resampling.isotropic_grid(values.shape, np.ones(3), 1.7), order=0)
    assert np.isin(result, values).all()


class OnDevice:
    """An array as cupy's: it computes, and refuses to meet an array of the host."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getattr__(self, name: str) -> object:
        found = getattr(self.values, name)
        return (lambda *a, **k: wrapped(found(*a, **k))) if callable(found) else wrapped(found)

    def __getitem__(self, where: object) -> "OnDevice":
        return wrapped(self.values[bare(where)])

    def __setitem__(self, where: object, value: object) -> None:
        self.values[bare(where)] = bare(value)

    def __add__(self, other: object) -> "OnDevice":
        return wrapped(self.values + bare(other))

    def __gt__(self, other: object) -> "OnDevice":
        return wrapped(self.values > bare(other))

    def __iand__(self, other: object) -> "OnDevice":
        self.values &= bare(other)
        return self


def wrapped(value: object) -> object:
    return OnDevice(value) if isinstance(value, np.ndarray) else value


def bare(value: object) -> object:
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    return value.values if isinstance(value, OnDevice) else value


class StandIn:
    """An array module with its own arrays, as cupy is, computing with numpy."""

    def __init__(self) -> None:
        self.products = 0

    def asarray(self, values: np.ndarray) -> OnDevice:
        return OnDevice(np.array(values))

    def asnumpy(self, values: OnDevice) -> np.ndarray:
        return values.values

    def matmul(self, one: OnDevice, other: OnDevice, out: OnDevice) -> OnDevice:
        self.products += 1
        np.matmul(bare(one), bare(other), out=bare(out))
        return out

    def __getattr__(self, name: str) -> Callable:
        def call(*positional: object, **named: object) -> object:
            named = {key: bare(value) for key, value in named.items()}
            return wrapped(getattr(np, name)(*map(bare, positional), **named))

        return call


def test_a_device_computes_what_numpy_computes_and_gives_it_back() -> None:
    """With a stand-in for cupy: which arrays go where, not cupy itself, is what this shows."""
    values = blobs((30, 61, 50))
    grid = resampling.isotropic_grid(values.shape, np.array([1.0, 1.2, 2.0]), 1.5)
    device = StandIn()
    for order in resampling.ORDERS:
        result = resampling.resample_image(values, grid, order=order, xp=device)
        np.testing.assert_array_equal(result, resampling.resample_image(values, grid, order=order))
    products = device.products
    assert products > 0
    label = (values > 0).astype(np.uint8) * 7
    result = resampling.resample_label(label, grid, xp=device)
    np.testing.assert_array_equal(result, resampling.resample_label(label, grid))
    assert device.products > products
