"""Reading: every axis convention ends up as superior, anterior, right, with the affine that says so."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from voxtrast.engine.data.reading import read_label, read_volume


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL", "IRP"])
@pytest.mark.parametrize("angles", [(0.0, 0.0, 0.0), (10.0, -20.0, 15.0)])
def test_axes_and_affine_match_nibabels_closest_canonical(
    codes: str, angles: tuple, tmp_path: Path, ras_affine: Callable
) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    image = nibabel.Nifti1Image(values, ras_affine(codes, (1.0, 2.0, 3.0), angles))
    nibabel.save(image, tmp_path / "a.nii.gz")
    canonical = nibabel.as_closest_canonical(image)
    volume = read_volume([tmp_path / "a.nii.gz"], dicom=False)
    np.testing.assert_array_equal(volume.values, canonical.get_fdata(dtype=np.float32).transpose(2, 1, 0))
    expected = canonical.affine[:, [2, 1, 0, 3]]  # the same map, fed (d, h, w) and not (i, j, k)
    np.testing.assert_allclose(volume.affine, expected, atol=1e-5)


def test_label_in_another_orientation_of_the_same_grid_is_taken(
    tmp_path: Path, write: Callable, values: Callable
) -> None:
    image = sitk.ReadImage(str(write(tmp_path / "a.nii.gz", 1)))
    label = sitk.Cast(image > 500, sitk.sitkUInt8)
    sitk.WriteImage(sitk.DICOMOrient(label, "PIR"), str(tmp_path / "b.nii.gz"))
    volume = read_volume([tmp_path / "a.nii.gz"], dicom=False)
    np.testing.assert_array_equal(read_label(tmp_path / "b.nii.gz", volume), volume.values > 500)
