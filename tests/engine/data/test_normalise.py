"""Grid and intensity: resampling keeps places and range, normalisation keeps what is comparable."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.affines import apply_affine

from voxtrast.engine.data import normalise
from voxtrast.engine.data.reading import read_volume
from voxtrast.engine.data.rejection import RejectedError


@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (10.0, -20.0, 15.0)])
def test_resampling_reproduces_a_ramp_in_world_millimetres(angles: tuple, tmp_path: Path, ras_affine: Callable) -> None:
    affine = ras_affine("LPS", (0.7, 1.0, 3.1), angles)
    index = np.stack(np.meshgrid(np.arange(60), np.arange(50), np.arange(30), indexing="ij"), axis=-1)
    gradient = np.array([0.31, -0.17, 0.23])
    nibabel.save(
        nibabel.Nifti1Image((apply_affine(affine, index) @ gradient).astype(np.float32), affine), tmp_path / "a.nii"
    )
    volume = read_volume([tmp_path / "a.nii"], dicom=False)
    grid = normalise.isotropic_grid(volume.values.shape, volume.spacing_mm, 1.5)
    result = normalise.resample_image(volume.values, grid)
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
        grid = normalise.isotropic_grid((length, 20, 20), np.array([1.0, 1.0, 1.0]), ratio)
        first = grid.offset[0]
        last = first + (grid.shape[0] - 1) * grid.ratio[0]
        assert first >= -1e-5
        assert last <= length - 1 + 1e-5
        assert first == pytest.approx(length - 1 - last)
        assert first < grid.ratio[0] / 2 + 1e-5, "no whole voxel is given away"


def test_spacing_within_a_thousandth_is_left_alone() -> None:
    values = np.random.default_rng(0).normal(size=(20, 21, 22)).astype(np.float32)
    grid = normalise.isotropic_grid(values.shape, np.array([1.5, 1.5 * 1.0009, 1.5 * 0.9991]), 1.5)
    assert grid.same
    assert normalise.resample_image(values, grid) is values
    assert normalise.resample_label(values, grid) is values
    assert not normalise.isotropic_grid(values.shape, np.array([1.5, 1.5 * 1.002, 1.5]), 1.5).same


def centres(label: np.ndarray, grid: normalise.Grid | None = None) -> dict[int, np.ndarray]:
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
        grid = normalise.isotropic_grid(label.shape, np.ones(3), ratio)
        result = normalise.resample_label(label, grid)
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
        result = normalise.resample_label(label, normalise.isotropic_grid(label.shape, np.ones(3), ratio))
        assert result.dtype == np.uint16
        assert set(np.unique(result)) <= {0, 2, 7, 300, 65535}


def test_a_new_voxel_that_lies_on_an_old_one_has_its_class() -> None:
    label = np.random.default_rng(2).integers(0, 9, (21, 21, 21)).astype(np.uint8)
    finer = normalise.resample_label(label, normalise.isotropic_grid(label.shape, np.ones(3), 0.5))
    np.testing.assert_array_equal(finer[::2, ::2, ::2], label)
    everywhere = np.full((20, 20, 20), 5, np.uint8)
    coarser = normalise.resample_label(everywhere, normalise.isotropic_grid(everywhere.shape, np.ones(3), 1.7))
    assert (coarser == 5).all()


def test_downsampling_does_not_alias() -> None:
    stripes = np.zeros((60, 60, 60), np.float32)
    stripes[::2] = 1.0  # finer than the new voxels can show: must become grey, not a new pattern
    result = normalise.resample_image(stripes, normalise.isotropic_grid(stripes.shape, np.ones(3), 3.3))
    assert np.abs(result[2:-2] - 0.5).max() < 0.02


def test_resampled_values_stay_within_the_input_range() -> None:
    step = np.zeros((20, 20, 20), np.float32)
    step[10:] = 1.0
    result = normalise.resample_image(step, normalise.isotropic_grid(step.shape, np.ones(3), 0.45))
    assert (result.min(), result.max()) == (0.0, 1.0)


def test_ct_is_windowed_and_scaled_and_mr_is_standardised_per_volume(values: Callable) -> None:
    ct = normalise.normalise(np.array([[[-2048, -1000, -500, 0, 40, 1000, 3000]]], np.int16), "ct")
    np.testing.assert_allclose(ct.ravel(), [-1, -1, -0.5, 0, 0.04, 1, 1], atol=1e-7)
    one, same = values(1), values(1) * 1.7e6 / 900
    for result in (normalise.normalise(one, "mr"), normalise.normalise(same, "mr")):
        assert result.mean() == pytest.approx(0, abs=1e-4)
        assert result.std() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(normalise.normalise(one, "mr"), normalise.normalise(same, "mr"), atol=1e-4)


def test_a_flat_background_does_not_count_in_mr_statistics(values: Callable) -> None:
    brain = values(1)
    padded = np.pad(brain, 10)
    result = normalise.normalise(padded, "mr")
    np.testing.assert_allclose(result[10:-10, 10:-10, 10:-10], normalise.normalise(brain, "mr"), atol=1e-5)
    assert result[0, 0, 0] == result.min(), "the background is no darker than the darkest tissue kept"


def test_modality_is_told_from_hounsfield_units() -> None:
    draw = np.random.default_rng(0)
    air, tissue = draw.normal(-990, 10, 4000), draw.normal(40, 60, 6000)
    body = np.concatenate([air, tissue])
    assert normalise.guess_modality(body) == "ct"
    assert normalise.guess_modality(np.concatenate([body, np.full(9000, -3024.0)])) == "ct", (
        "padding outside the circle"
    )
    assert normalise.guess_modality(body + 1024) == "mr", "not in HU: nothing a window could be put on"
    assert normalise.guess_modality(draw.uniform(-4096, 4095, 10000)) == "mr", "a phase map"
    assert normalise.guess_modality(draw.normal(0, 200, 10000)) == "mr", "a difference image"
    assert normalise.guess_modality(draw.rayleigh(200, 10000)) == "mr"


@pytest.mark.parametrize("padding", [-1000.0, -1024.0])
def test_flat_padding_is_not_air(padding: float) -> None:
    draw = np.random.default_rng(0)
    brain = np.clip(draw.normal(100, 60, 6000), 0, None)
    assert normalise.guess_modality(np.concatenate([np.full(4000, padding), brain])) == "mr"
    lungs = draw.normal(-880, 30, 500)
    assert normalise.guess_modality(np.concatenate([np.full(4000, padding), lungs, brain])) == "ct"


def test_few_whole_numbers_are_taken_for_a_label_map(values: Callable) -> None:
    classes = np.arange(16, dtype=np.float32).repeat(1000).reshape(20, 40, 20)
    with pytest.raises(RejectedError, match="looks like a label map: 16 different values"):
        normalise.check_values(classes)
    normalise.check_values(classes - 3)
    normalise.check_values(classes * np.float32(0.5))
    normalise.check_values(np.arange(17).repeat(1000).reshape(20, 17, 50))
    classes[7, 7, 7] = 16
    normalise.check_values(classes)


def test_modality_rule_on_real_volumes(real_volumes: Path) -> None:
    found = {}
    for file in sorted((real_volumes / "misc_pretrain").glob("*.nii.gz")):
        if not file.name.endswith("_label.nii.gz"):
            found[file.name] = normalise.guess_modality(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))
    assert len(found) == 11
    # the head CT has values from 0 to 3926: not Hounsfield units (its SOURCE.txt says so), hence percentiles
    assert {name for name, kind in found.items() if kind == "ct"} == {
        "ct_abdomen_totalseg.nii.gz",
        "ct_thorax_cta_totalseg.nii.gz",
    }
