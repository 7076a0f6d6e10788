"""DALI's operator of views on a GPU beside the one on the CPU, and the view pipeline on both."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_operators import full_cases
from view_interface import ViewCase, encoded
from view_samples import COVER, WIDE, make_store

from voxtrast.engine.data import native
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.methods.views import (
    AppearanceRanges,
    Blur,
    ElasticRanges,
    PatchSwap,
    PixelShuffle,
    View,
    ViewSpec,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

OUTPUTS = ("view", "clean", "displacement", "mask")


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    assert native.load_plugin() is None


def run_views(cases: list[ViewCase], device: str, runs: int = 1, **options: Any) -> list[list[torch.Tensor]]:
    """Each run's outputs, slots along the first axis."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=len(cases), num_threads=2, device_id=0, exec_dynamic=True, prefetch_queue_depth=3)
    plans = [encoded(case) for case in cases]
    with pipeline:
        regions = fn.external_source(source=lambda: [case.region for case in cases], batch=True)
        sent = fn.external_source(source=lambda: plans, batch=True)
        region = regions.gpu() if device == "gpu" else regions
        pipeline.set_outputs(*fn.voxtrast_view(region, sent, device=device, view=0, **options))
    pipeline.build()
    return [[torch.from_dlpack(output.as_tensor()).clone() for output in pipeline.run()] for _ in range(runs)]


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """As test_view_kernels.py has it: both are within 1e-5 of float64; a few steps in a row add up."""
    if name == "mask":
        assert (found.cpu() != expected.cpu()).double().mean() < 2e-3
    else:
        extent = max(1.0, float(expected.abs().max()))
        assert float((found.cpu() - expected.cpu()).abs().max()) < 2e-5 * extent, name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_operator_gives_on_a_gpu_what_it_gives_on_a_cpu(dtype: str) -> None:
    regions = [np.random.default_rng(seed).normal(size=(20, 24, 40)).astype(dtype) for seed in range(5)]
    cases = full_cases(regions)
    wanted = {"clean": True, "displacement": True, "mask": True}
    runs = run_views(cases, "gpu", 4, **wanted)
    (expected,) = run_views(cases, "cpu", **wanted)
    for name, ours, theirs in zip(OUTPUTS, runs[0], expected, strict=True):
        assert ours.is_cuda
        assert_close(ours, theirs, name)
    for later in runs[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(later, runs[0], strict=True))


MOVES = AppearanceRanges(order=["pixel_shuffle", "patch_swap"], pixel_shuffle=PixelShuffle(), patch_swap=PatchSwap())
SPECS = {
    # Voxels are only copied: one in the wrong place does not go unnoticed.
    "moved": ViewSpec((24, 24, 24), {"input": View(appearance=MOVES, clean=True)}),
    "cover": ViewSpec((24, 24, 24), COVER),
    "deformed and smoothed": ViewSpec(
        (24, 24, 24),
        {
            "a": View(affine=WIDE, elastic=ElasticRanges(), appearance=AppearanceRanges(order=["blur"], blur=Blur())),
            "b": View(affine=WIDE),
        },
    ),
    "slices": ViewSpec((24, 24), COVER),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SPECS)
def test_the_view_pipeline_makes_the_same_batches_on_both(tmp_path: Path, name: str, dtype: str) -> None:
    store = make_store(tmp_path / "store", [(40, 36, 44), (30, 50, 34), (33, 34, 35)], dtype)
    spec = SPECS[name]
    batches = []
    for device_id in (0, 0, None):
        with ViewPipeline(store, store.cases, spec, seed=7, global_batch=4, device_id=device_id) as pipeline:
            batches.append([batch for (batch,) in itertools.islice(pipeline, 6)])
    for first, again, on_cpu in zip(*batches, strict=True):
        assert first["case"] == again["case"] == on_cpu["case"]
        for key, tensor in first.items():
            if key == "case":
                continue
            assert tensor.is_cuda
            assert torch.equal(tensor, again[key]), key
            if name == "moved":
                assert torch.equal(tensor.cpu(), on_cpu[key]), key
            else:
                assert_close(tensor, on_cpu[key], key)


def test_a_step_that_cannot_be_carried_out_ends_the_run_with_its_reason() -> None:
    (case,) = full_cases([np.zeros((20, 24, 40), np.float32)])
    case.steps = [("cut_out", 0, [0.0], [[0, 0, 0, 20, 1, 1]])]
    with pytest.raises((RuntimeError, ValueError), match="step cut_out has a box that is empty or leaves the view"):
        run_views([case], "gpu", mask=True)
