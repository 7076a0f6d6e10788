"""Intensity: normalisation keeps what is comparable."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from voxtrast.engine.data import normalise
from voxtrast.engine.data.rejection import RejectedError


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


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float16", "float32", "float64", "uint8"])
def test_statistics_are_those_of_numpy(dtype: str) -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 999, 300_000):
        values = (draw.normal(size=size) * 30 + (200 if dtype.startswith("u") else 0)).astype(dtype)
        exact = values.astype(np.float64)
        found = normalise.Distribution.of(values)
        np.testing.assert_allclose(found.percentiles((0.5, 99.5)), np.percentile(exact, (0.5, 99.5)), 1e-6, 1e-6)
        clipped = np.clip(exact, -20, 210)
        np.testing.assert_allclose(found.moments(-20.0, 210.0), (clipped.mean(), clipped.std()), 1e-6, 1e-6)
