"""Views as DALI makes them, against float64 evaluations of what the plan says: geometry, form and dealing."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from view_interface import ViewCase, make_view
from view_samples import COVER, EPSILON, WIDE, assert_same, make_store, slots, take, varied_store

from voxtrast.engine.data.pipeline import ViewPipeline, field_affine
from voxtrast.engine.data.planner import Plan
from voxtrast.engine.data.sampling import Sampling
from voxtrast.engine.data.store import Case, Store
from voxtrast.engine.errors import UserError
from voxtrast.kernels import warp
from voxtrast.methods.cover import cover_appearance
from voxtrast.methods.views import AffineRanges, AppearanceRanges, BoxRanges, ElasticRanges, View, ViewSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return varied_store(tmp_path_factory)


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Smaller than the crop of 24 on one axis, on two, on all three."""
    return make_store(tmp_path_factory.mktemp("view") / "small", [(19, 40, 40), (40, 17, 20), (13, 14, 15)])


def crop_of(store: Store, case: Case, plan: Plan, crop: tuple[int, ...]) -> np.ndarray:
    """The crop, float64, out of a volume with plenty of background around it."""
    margin = 30
    volume = np.pad(store.volume(case).astype(np.float64), margin, constant_values=case.intensity["background"])
    sides = (1,) * (3 - len(crop)) + tuple(crop)
    box = tuple(slice(start + margin, start + margin + side) for start, side in zip(plan.origin, sides, strict=True))
    return volume[box].reshape(crop)


def check_warped(store: Store, case: Case, plan: Plan, crop: tuple[int, ...], sample: dict[str, Any]) -> None:
    """Fixed, displacement, mask and affine of one slot against float64."""
    dimensions = len(crop)
    volume = store.volume(case).astype(np.float64)
    if dimensions == 2:
        volume = volume[plan.origin[0]]
    background = case.intensity["background"]
    affine, origin = field_affine(plan, "fixed", dimensions), np.array(plan.origin[-dimensions:], np.float64)
    index = np.stack(np.meshgrid(*map(np.arange, crop), indexing="ij")).reshape(dimensions, -1)
    position = affine[:, :-1] @ index + affine[:, -1:]
    in_volume = position + origin[:, None]
    # Outside the volume all is background, for the smoothing of views that shrink it as well.
    margin = 20
    smoothed = np.pad(volume, margin, constant_values=background)
    for axis, sigma in enumerate(plan.views["fixed"].antialias[-dimensions:]):
        radius = int(np.ceil(np.float32(4) * np.float32(sigma)))
        assert radius <= margin
        if radius > 0:
            smoothed = ndimage.gaussian_filter1d(smoothed, sigma, axis, mode="nearest", radius=radius)
    expected = ndimage.map_coordinates(smoothed, in_volume + margin, order=1, mode="grid-constant", cval=background)
    # Within a vector of 16 voxels float32 counts from where it starts, which is known in float64.
    off_voxels = 16 * EPSILON * 16 * np.abs(affine[:, :-1]).sum(axis=1).max()
    padded = np.pad(volume, 1, constant_values=background)
    steepest = sum(np.abs(np.diff(padded, axis=axis)).max() for axis in range(dimensions))
    tolerance = off_voxels * steepest + 8 * EPSILON * np.abs(volume).max()
    assert tolerance < 0.001  # of a standard deviation of 0.7
    np.testing.assert_allclose(sample["fixed"].ravel(), expected, rtol=0, atol=tolerance)

    np.testing.assert_array_equal(sample["affine"], affine)
    psi = position - index
    rounding = 4 * EPSILON * np.abs(psi).max() + 4 * EPSILON * max(crop)
    np.testing.assert_allclose(sample["displacement"].reshape(dimensions, -1), psi, rtol=0, atol=rounding)

    low = np.maximum(0, -origin)[:, None]
    high = np.minimum(np.array(crop), np.array(volume.shape) - origin)[:, None] - 1
    depth = np.minimum(position - low, high - position).min(axis=0)  # inside where not negative
    clear = np.abs(depth) > 8 * EPSILON * 2 * max(crop)
    assert clear.mean() > 0.99 or (affine == np.eye(*affine.shape)).all()
    np.testing.assert_array_equal(sample["mask"].ravel()[clear], (depth >= 0)[clear])


@pytest.mark.parametrize("crop", [(24, 20, 26), (32, 32, 32), (28, 30), (17, 33)])
@pytest.mark.parametrize("ranges", [AffineRanges(), WIDE], ids=["gentle", "wide"])
def test_fixed_view_displacement_and_mask_match_float64(
    store: Store, crop: tuple[int, ...], ranges: AffineRanges
) -> None:
    spec = ViewSpec(crop, {"fixed": View(affine=ranges, displacement=True)})
    for plan, case, sample in slots(store, spec, 3):
        check_warped(store, case, plan, crop, sample)


@pytest.mark.parametrize("crop", [(24, 24, 24), (24, 24)])
def test_volumes_smaller_than_the_crop_are_padded_with_background(small_store: Store, crop: tuple[int, ...]) -> None:
    spec = ViewSpec(crop, {"plain": View(), "fixed": View(affine=WIDE, displacement=True)})
    for plan, case, sample in slots(small_store, spec, 3):
        check_warped(small_store, case, plan, crop, sample)
        np.testing.assert_array_equal(sample["plain"][0], crop_of(small_store, case, plan, crop))
    assert {case.id for _, case, _ in slots(small_store, spec, 3)} == {"case0", "case1", "case2"}


@pytest.mark.parametrize("crop", [(16, 16, 16), (16, 16)])
def test_a_view_that_looks_past_the_volume_sees_background(store: Store, crop: tuple[int, ...]) -> None:
    far = AffineRanges(translation_voxels=300)
    outside = 0
    for plan, case, sample in slots(store, ViewSpec(crop, {"fixed": View(affine=far, displacement=True)}), 4):
        check_warped(store, case, plan, crop, sample)
        if not sample["mask"].any() and np.ptp(sample["fixed"]) == 0:
            assert (sample["fixed"] == case.intensity["background"]).all()
            outside += 1
    assert outside > 8


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_identity_gives_the_crop_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "store", [(30, 31, 32), (20, 40, 26)], dtype)
    still = AffineRanges(rotation_degrees=0, scale=[1, 1], translation_voxels=0)
    views = {"plain": View(), "fixed": View(affine=still, displacement=True)}
    for plan, case, sample in slots(store, ViewSpec((24, 26, 28), views), 2):
        expected = crop_of(store, case, plan, (24, 26, 28))
        np.testing.assert_array_equal(sample["plain"][0], expected)
        np.testing.assert_array_equal(sample["fixed"][0], expected)
        assert not sample["displacement"].any()
        check_warped(store, case, plan, (24, 26, 28), sample)
        inside = crop_of_ones(case, plan, (24, 26, 28))
        np.testing.assert_array_equal(sample["mask"][0], inside)  # ties included


def crop_of_ones(case: Case, plan: Plan, crop: tuple[int, int, int]) -> np.ndarray:
    volume = np.pad(np.ones(case.shape), 30)
    return volume[tuple(slice(start + 30, start + 30 + side) for start, side in zip(plan.origin, crop, strict=True))]


def test_a_displacement_without_an_affine_is_zero(store: Store) -> None:
    views = {"plain": View(displacement=True)}
    ((batch,),) = take(store, ViewSpec((16, 16, 16), views), 1)
    assert not batch["displacement"].any()
    assert batch["mask"].all()
    assert torch.equal(batch["affine"][0], torch.eye(3, 4, dtype=torch.float64))


def test_fixed_is_the_warped_crop_as_the_kernels_understand_it(store: Store) -> None:
    views = {"plain": View(), "fixed": View(affine=AffineRanges(), displacement=True)}
    ((batch,),) = take(store, ViewSpec((24, 24, 24), views), 1)
    warped = warp(batch["plain"], batch["displacement"])
    assert batch["mask"].mean() > 0.3
    # Two float32 coordinates of about 24 voxels, one of them added up over 24 steps, on noise of steps up to 6.
    difference = ((warped - batch["fixed"]) * batch["mask"]).abs().max()
    assert difference < (24 + 16) * EPSILON * 48 * 3 * 6


def test_batches_have_the_promised_form(store: Store) -> None:
    for crop in ((16, 18, 20), (16, 18)):
        (micro_batches,) = take(store, ViewSpec(crop, COVER), 1, global_batch=6, accumulation=2)
        assert len(micro_batches) == 2
        for batch in micro_batches:
            dimensions = len(crop)
            shapes = {key: tuple(item.shape) for key, item in batch.items() if key != "case"}
            assert shapes == {
                "moving": (3, 1, *crop),
                "fixed": (3, 1, *crop),
                "displacement": (3, dimensions, *crop),
                "mask": (3, 1, *crop),
                "affine": (3, dimensions, dimensions + 1),
                "origin": (3, 3),
                "position": (3,),
            }
            assert all(batch[key].dtype == torch.float32 for key in ("moving", "fixed", "displacement", "mask"))
            assert batch["affine"].dtype == torch.float64
            assert batch["origin"].dtype == torch.int64
            assert len(batch["case"]) == 3
            assert all(batch[key].is_contiguous() for key in shapes)


def test_any_views_under_any_names(store: Store) -> None:
    both = View(affine=AffineRanges(), appearance=cover_appearance())
    spec = ViewSpec((16, 16, 16), {"global/1": both, "global/2": both, "clean": View()})
    ((batch,),) = take(store, spec, 1)
    assert set(batch) == {"global/1", "global/2", "clean", "case", "origin", "position"}
    assert not torch.equal(batch["global/1"], batch["global/2"])


def joined(runs: list[list[list[dict[str, Any]]]], step: int) -> dict[str, Any]:
    """The global batch of a step, from what each rank saw: micro batch by micro batch, rank by rank."""
    parts = [rank[step][k] for k in range(len(runs[0][step])) for rank in runs]
    return {
        key: [name for part in parts for name in part[key]] if key == "case" else torch.cat([p[key] for p in parts])
        for key in parts[0]
    }


def test_the_global_batch_is_the_same_however_it_is_dealt(store: Store) -> None:
    spec = ViewSpec((20, 18, 22), COVER)
    whole = take(store, spec, 3)
    for world_size, accumulation, threads, prefetch in ((2, 1, 1, 0), (1, 2, 2, 1), (2, 2, 1, 3), (4, 1, 2, 2)):
        settings = {"world_size": world_size, "accumulation": accumulation, "threads": threads, "prefetch": prefetch}
        runs = [take(store, spec, 3, rank=rank, **settings) for rank in range(world_size)]
        for step in range(3):
            assert_same(joined(runs, step), whole[step][0])


def test_a_later_start_continues_bit_for_bit(store: Store) -> None:
    spec = ViewSpec((20, 18, 22), COVER)
    whole = take(store, spec, 6)
    for step, (batch,) in enumerate(take(store, spec, 3, start_step=3), 3):
        assert_same(batch, whole[step][0])


def test_seeds_splits_and_steps_differ(store: Store) -> None:
    spec = ViewSpec((16, 16, 16), COVER)
    (first,), (second,) = take(store, spec, 2)
    ((other_seed,),) = take(store, spec, 1, seed=8)
    ((validation,),) = take(store, spec, 1, split="validation")
    for other in (second, other_seed, validation):
        for key in ("moving", "fixed", "displacement"):
            assert not torch.equal(first[key], other[key])


def test_an_epoch_visits_every_case_once(store: Store) -> None:
    steps = take(store, ViewSpec((16, 16, 16), {"x": View()}), 6, global_batch=2)
    names = [name for (batch,) in steps for name in batch["case"]]
    for epoch in range(4):
        assert sorted(names[3 * epoch : 3 * epoch + 3]) == ["case0", "case1", "case2"]


def bytes_read() -> int:
    """By this process, from whatever cache or disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines())
    return int(fields["rchar"])


def test_only_the_region_that_is_looked_at_is_read(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [(90, 90, 90)])
    size = (store.path / "volumes" / "case0.npy").stat().st_size
    spec = ViewSpec((16, 16, 16), COVER)
    with ViewPipeline(store, store.cases, spec, seed=7, global_batch=4, prefetch=0) as pipeline:
        before = bytes_read()
        list(itertools.islice(pipeline, 4))
        read = bytes_read() - before
    # 16 voxels a side, turned by 20 degrees about three axes, scaled by 1.25, shifted by 4; whole rows of their planes.
    assert read < 20 * size * (16 * 1.25 * 1.8 + 4 + 3) ** 2 / 90**2
    assert read > 16 * 2 * 16**3


def test_cases_that_are_too_small_are_reported(store: Store) -> None:
    spec = ViewSpec((70, 20, 20), {"x": View()})
    with ViewPipeline(store, store.cases, spec, seed=1, global_batch=1) as pipeline:
        assert [case.id for case, _ in pipeline.excluded] == ["case1", "case2"]
        assert next(pipeline)[0]["case"] == ["case0"]
    with pytest.raises(UserError, match=r"crop 200x20x20.*smaller crop"):
        ViewPipeline(store, store.cases, ViewSpec((200, 20, 20), {"x": View()}), seed=1, global_batch=1)


EVERYTHING = {
    "large": View(affine=WIDE, elastic=ElasticRanges(), flips=[0.5, 0.5, 0.5], quarter_turns=True, clean=True,
                  appearance=AppearanceRanges(order=["gamma", "noise", "low_resolution", "pixel_shuffle", "cut_out"]),
                  displacement=True, displacement_to="small"),
    "small": View(size=[12, 14, 10], box=BoxRanges(sides=[[20, 18, 22]]), flips=[0.5, 0.5, 0.5]),
}  # fmt: skip


def test_every_kind_of_view_and_sampling_is_the_same_however_it_is_dealt_and_continued(store: Store) -> None:
    spec = ViewSpec((24, 24, 24), EVERYTHING)
    sampling = Sampling(crops_per_visit=3, weights={"a": 2.0, "b": 1.0}, foreground=0.5)
    whole = take(store, spec, 5, sampling=sampling)
    assert len({name for (batch,) in whole for name in batch["case"]}) == 3
    for start, world_size, threads in ((0, 1, 4), (2, 2, 3), (3, 4, 1)):  # in the middle of an epoch and of a visit
        settings = {"sampling": sampling, "start_step": start, "world_size": world_size, "threads": threads}
        runs = [take(store, spec, 5 - start, rank=rank, **settings) for rank in range(world_size)]
        for step in range(start, 5):
            assert_same(joined(runs, step - start), whole[step][0])


def test_flips_and_turns_come_with_the_views_that_have_them(store: Store) -> None:
    views = {
        "turned": View(flips=[0.5, 0.0, 0.5], quarter_turns=True),
        "as_it_is": View(),
    }
    for plan, case, sample in slots(store, ViewSpec((12, 14, 14), views), 4):
        assert sample["turned_flips"].tolist() == list(plan.views["turned"].flips)
        undone = np.rot90(sample["turned"][0], -int(sample["turned_quarter_turns"]), axes=(1, 2))
        axes = [axis for axis, flipped in enumerate(sample["turned_flips"]) if flipped]
        np.testing.assert_array_equal(np.flip(undone, axes), sample["as_it_is"][0])
        assert "as_it_is_flips" not in sample, case.id


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_whatever_a_view_declares_is_what_the_library_makes_of_its_plan(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "store", [(40, 36, 44), (30, 50, 34)], dtype)
    spec = ViewSpec((24, 24, 24), EVERYTHING)
    for plan, case, sample in slots(store, spec, 2):
        for name in spec.views:
            wanted = ("clean", "displacement", "mask") if name == "large" else ()
            made = make_view(as_case(store, case, plan, name), *wanted)
            np.testing.assert_array_equal(sample[name][0], made["view"])
            if name == "large":
                np.testing.assert_array_equal(sample["large_clean"][0], made["clean"])
                np.testing.assert_array_equal(sample["displacement"], made["displacement"])
                np.testing.assert_array_equal(sample["mask"][0], made["mask"])
                assert not np.array_equal(made["view"], made["clean"])


def as_case(store: Store, case: Case, plan: Plan, name: str) -> ViewCase:
    view, margin, background = plan.views[name], 60, case.intensity["background"]
    padded = np.pad(store.volume(case), margin, constant_values=background)
    limits = zip(plan.region.lower, plan.region.upper, strict=True)
    region = padded[tuple(slice(low + margin, high + margin) for low, high in limits)]
    return ViewCase(
        region,
        view.size,
        view.to_volume,
        lower=plan.region.lower,
        volume=case.shape,
        background=background,
        seed=7,
        slot=plan.slot,
        step=plan.step,
        shift=view.control_points,
        spacing=view.spacing,
        antialias=view.antialias,
        from_volume=view.from_volume,
        partner=view.partner_size,
        steps=[(step.kind, step.stream, step.numbers, step.boxes) for step in view.steps],
    )


def test_a_slice_comes_with_its_position(store: Store) -> None:
    for plan, case, sample in slots(store, ViewSpec((20, 24), {"x": View()}), 2):
        assert sample["position"] == pytest.approx(plan.origin[0] / (case.shape[0] - 1), abs=1e-6)
        np.testing.assert_array_equal(sample["x"][0], crop_of(store, case, plan, (20, 24)))


def test_a_crop_comes_with_the_place_of_its_centre_along_the_first_axis(store: Store) -> None:
    found = set()
    for plan, case, sample in slots(store, ViewSpec((12, 16, 16), {"x": View()}), 2):
        assert sample["position"] == pytest.approx((plan.origin[0] + 6) / case.shape[0], abs=1e-6)
        found.add(float(sample["position"]))
    assert len(found) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch": 3, "world_size": 2}, "global batch 3.*multiple of 2"),
        ({"global_batch": 4, "accumulation": 3}, "global batch 4.*multiple of 3"),
        ({"world_size": 2, "rank": 2}, "rank 2 of 2"),
        ({"start_step": -1}, "start_step -1"),
        ({"prefetch": -1}, "prefetch -1"),
        ({"threads": 0}, "threads 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(store: Store, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ViewPipeline(store, store.cases, ViewSpec((16, 16, 16), COVER), **{"seed": 0, "global_batch": 4, **settings})
