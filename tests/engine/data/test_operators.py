"""The operators inside DALI: what they read and make, whatever the threads; files that fail under them."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from view_interface import IDENTITY, ViewCase, encoded, make_view

from voxtrast.engine.data import native

Array = NDArray[Any]
VOLUME = (20, 24, 40)


@pytest.fixture(autouse=True, scope="module")
def plugin() -> None:
    native.load_plugin()


def stored(folder: Path, dtype: str = "float32", seed: int = 0) -> tuple[Path, Array]:
    values = (100 * np.random.default_rng(seed).normal(size=VOLUME)).clip(0, 100).astype(dtype)
    file = folder / f"{dtype}-{seed}.npy"
    np.save(file, values)
    return file, values


@dataclasses.dataclass
class OpenFiles:
    """Descriptions of files as voxtrast_read takes them; the files stay open until the end of the test."""

    descriptors: list[int] = dataclasses.field(default_factory=list)

    def describe(self, file: Path, dtype: str = "float32") -> NDArray[np.int64]:
        with open(file, "rb") as stream:
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)
            offset = stream.tell()
        self.descriptors.append(os.open(file, os.O_RDONLY))
        return np.array([self.descriptors[-1], offset, native.STORED_TYPES.index(dtype)], np.int64)


@pytest.fixture
def files() -> Iterator[OpenFiles]:
    opened = OpenFiles()
    yield opened
    for descriptor in opened.descriptors:
        os.close(descriptor)


def case_of(region: Array, lower: tuple[int, int, int] = (0, 0, 0), **changes: Any) -> ViewCase:
    return ViewCase(region, (12, 14, 18), lower=lower, volume=VOLUME, background=-7.0, **changes)


def read(described: Array, case: ViewCase, **options: Any) -> Array:
    @pipeline(1, 1)
    def graph() -> Any:
        return fn.voxtrast_read(constant([described]), constant([encoded(case)]), **options)

    return np.array(graph.run()[0].at(0))


def pipeline(slots: int, threads: int) -> Any:
    def build(graph: Any) -> Pipeline:
        result = Pipeline(batch_size=slots, num_threads=threads, device_id=None, exec_dynamic=True)
        with result:
            outputs = graph()
            result.set_outputs(*(outputs if isinstance(outputs, list | tuple) else [outputs]))
        result.build()
        return result

    return build


def constant(arrays: list[Array]) -> Any:
    return fn.external_source(source=lambda: arrays, batch=True)


BOXES = {
    "all": ((0, 0, 0), VOLUME),
    "inside": ((3, 5, 7), (10, 12, 20)),
    "full rows": ((3, 5, 0), (10, 12, 40)),
    "beyond every border": ((-2, -3, -4), (25, 30, 50)),
    "outside": ((30, 0, 0), (4, 5, 6)),
    "one voxel": ((19, 23, 39), (1, 1, 1)),
}


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("dtype", native.STORED_TYPES)
def test_a_region_is_read_from_its_file(tmp_path: Path, files: OpenFiles, dtype: str, box: str) -> None:
    file, values = stored(tmp_path, dtype)
    lower, size = BOXES[box]
    padded = np.pad(values.astype(np.float32), 50, constant_values=-7.0)
    expected = padded[tuple(slice(50 + low, 50 + low + side) for low, side in zip(lower, size, strict=True))]
    case = case_of(np.zeros(size, np.float32), lower)
    assert np.array_equal(read(files.describe(file, dtype), case), expected)
    labels = read(files.describe(file, dtype), case, labels=True)
    assert np.array_equal(labels, np.where(expected == -7.0, 0, expected))
    if dtype == "float16":
        half = read(files.describe(file, dtype), case, half=True)
        assert half.dtype == np.float16
        assert np.array_equal(half, expected.astype(np.float16))


def test_rows_far_apart_are_read_one_by_one(tmp_path: Path, files: OpenFiles) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 9000)).astype(np.float32)
    np.save(tmp_path / "wide.npy", values)
    case = dataclasses.replace(case_of(np.zeros((2, 3, 50), np.float32), (1, 1, 4000)), volume=values.shape)
    assert np.array_equal(read(files.describe(tmp_path / "wide.npy"), case), values[1:3, 1:4, 4000:4050])


def test_a_file_that_vanishes_while_it_is_open_is_read_on(tmp_path: Path, files: OpenFiles) -> None:
    file, values = stored(tmp_path)
    described = files.describe(file)
    file.unlink()
    assert np.array_equal(read(described, case_of(np.zeros(VOLUME, np.float32))), values)


def test_a_file_that_is_cut_off_while_it_is_open_is_named(tmp_path: Path, files: OpenFiles) -> None:
    file, _ = stored(tmp_path)
    described = files.describe(file)
    os.truncate(file, 10_000)
    with pytest.raises(RuntimeError, match=r"float32-0\.npy ends at byte 10000.*cut off while in use"):
        read(described, case_of(np.zeros(VOLUME, np.float32)))


def test_a_descriptor_that_was_closed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"descriptor 9999 cannot be read: Bad file descriptor"):
        read(np.array([9999, 128, 1], np.int64), case_of(np.zeros(VOLUME, np.float32)))


def test_a_damaged_plan_is_an_error(tmp_path: Path, files: OpenFiles) -> None:
    file, _ = stored(tmp_path)
    plan = encoded(case_of(np.zeros(VOLUME, np.float32)))
    plan[len(plan) // 2] ^= 1
    described = files.describe(file)
    graph = pipeline(1, 1)(lambda: fn.voxtrast_read(constant([described]), constant([plan])))
    with pytest.raises(ValueError, match="plan: "):
        graph.run()


def full_cases(regions: list[Array]) -> list[ViewCase]:
    """One case a slot, with everything that a view can have."""
    random = np.random.default_rng(5)
    to_volume = np.column_stack([np.diag([1.1, -0.9, 1.05]), [3.0, 18.0, 5.0]])
    steps = [("noise", 1, [3.0], []), ("gamma", 2, [1.2, 0], []), ("blur", 3, [0.7], []), ("contrast", 4, [1.2], [])]
    steps.append(("pixel_shuffle", 5, [], [[1, 1, 1, 8, 9, 10]]))
    shift = random.normal(size=(3, 8, 8, 8)).astype(np.float32)
    return [
        case_of(
            region,
            to_volume=to_volume,
            from_volume=IDENTITY,
            partner=(12, 14, 18),
            steps=steps,
            shift=shift,
            spacing=(5.0, 5.0, 5.0),
            slot=slot,
        )
        for slot, region in enumerate(regions)
    ]


def run_views(cases: list[ViewCase], described: list[Array], threads: int, **options: Any) -> list[list[Array]]:
    plans = [encoded(case) for case in cases]

    def graph() -> Any:
        sent = constant(plans)
        region = fn.voxtrast_read(constant(described), sent, half=bool(options.pop("half", False)))
        return fn.voxtrast_view(region, sent, view=0, **options)

    outputs = pipeline(len(cases), threads)(graph).run()
    return [[np.array(output.at(slot)) for slot in range(len(cases))] for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_views_are_those_of_the_library_whatever_the_threads(tmp_path: Path, files: OpenFiles, dtype: str) -> None:
    pairs = [stored(tmp_path, dtype, seed) for seed in range(5)]
    described = [files.describe(file, dtype) for file, _ in pairs]
    cases = full_cases([values for _, values in pairs])
    wanted = {"clean": True, "displacement": True, "mask": True}
    expected = [make_view(case, *wanted) for case in cases]
    for threads in (1, 4):
        found = run_views(cases, described, threads, half=dtype == "float16", **wanted)
        for name, slots in zip(("view", *wanted), found, strict=True):
            for slot, array in enumerate(slots):
                assert np.array_equal(array, expected[slot][name]), f"{name} of slot {slot}, {threads} threads"


def test_views_of_depth_1_come_in_two_dimensions(tmp_path: Path, files: OpenFiles) -> None:
    file, values = stored(tmp_path)
    to_volume = np.column_stack([np.eye(3), [7.0, 2.5, 3.0]])
    case = dataclasses.replace(case_of(values[7:8], (7, 0, 0)), size=(1, 15, 22), partner=(1, 15, 22))
    case = dataclasses.replace(case, to_volume=to_volume)
    view, psi, mask = run_views([case], [files.describe(file)], 1, dimensions=2, displacement=True, mask=True)
    expected = make_view(case, "displacement", "mask")
    assert view[0].shape == mask[0].shape == (15, 22)
    assert psi[0].shape == (2, 15, 22)
    assert np.array_equal(view[0], expected["view"][0])
    assert np.array_equal(psi[0], expected["displacement"][:, 0])


def test_labels_go_through_the_geometry_alone(tmp_path: Path, files: OpenFiles) -> None:
    labels = np.random.default_rng(3).integers(0, 4, VOLUME).astype(np.uint8)
    np.save(tmp_path / "labels.npy", labels)
    (case,) = full_cases([labels.astype(np.float32)])
    plan, described = encoded(case), files.describe(tmp_path / "labels.npy", "uint8")

    def graph() -> Any:
        sent = constant([plan])
        return fn.voxtrast_view(fn.voxtrast_read(constant([described]), sent, labels=True), sent, view=0, labels=True)

    found = np.array(pipeline(1, 1)(graph).run()[0].at(0))
    nearest = dataclasses.replace(case, steps=[], interpolation="nearest", background=0.0)
    assert np.array_equal(found, make_view(nearest)["view"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"view": 3}, "there is no view 3"), ({"view": 0, "dimensions": 2}, "has depth 12"), ({"view": 0}, "shape")],
)
def test_a_plan_that_does_not_fit_is_an_error(options: dict[str, int], message: str) -> None:
    region = np.zeros((5, 6, 7) if message == "shape" else VOLUME, np.float32)
    plan = encoded(case_of(np.zeros(VOLUME, np.float32)))
    graph = pipeline(1, 1)(lambda: fn.voxtrast_view(constant([region]), constant([plan]), **options))
    with pytest.raises(RuntimeError, match=message):
        graph.run()


def test_a_step_that_cannot_be_carried_out_ends_the_run_with_its_reason() -> None:
    region = np.zeros(VOLUME, np.float32)
    case = case_of(region, steps=[("cut_out", 0, [0.0], [[0, 0, 0, 20, 1, 1]])])
    graph = pipeline(1, 2)(lambda: fn.voxtrast_view(constant([region]), constant([encoded(case)]), view=0))
    with pytest.raises(ValueError, match="step cut_out has a box that is empty or leaves the view"):
        graph.run()
