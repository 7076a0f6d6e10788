"""A user's own functions inside the pipeline: what they get, and what they leave."""

import functools
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from plan_samples import assert_uniform
from view_samples import COVER, assert_same, take, varied_store

from voxtrast.engine.data.planner import Planner
from voxtrast.engine.data.store import Store
from voxtrast.engine.data.user_functions import draw_numbers, load_function
from voxtrast.engine.errors import UserError
from voxtrast.methods.views import AppearanceRanges, View, ViewSpec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return varied_store(tmp_path_factory)


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of docs/views.md, as a user would write it into a file."""
    page = Path(__file__).parents[3] / "docs" / "views.md"
    (script,) = [
        each
        for each in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        if "def stripes" in each
    ]
    module = types.ModuleType("documented_changes")
    exec(compile(script, "views.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:stripes"


def is_nothing_or_a_stripe(difference: NDArray[np.float32]) -> bool:
    return bool((np.minimum(np.abs(difference), np.abs(difference - 0.1)) < 1e-6).all() and difference.any())


def test_the_example_of_the_documentation(store: Store, documented: str) -> None:
    appearance = AppearanceRanges(functions=[documented])
    spec = ViewSpec((16, 16, 16), {**COVER, "x": View(appearance=appearance, clean=True)})
    batch = take(store, spec, 1)[0][0]
    difference = (batch["x"] - batch["x_clean"])[:, 0].numpy()
    assert is_nothing_or_a_stripe(difference)
    striped = (difference > 0.05).all(axis=(2, 3))
    assert (striped == (difference > 0.05).any(axis=(2, 3))).all()
    assert striped[:, 0].all()
    periods = [np.diff(np.flatnonzero(np.append(rows, True)))[0] for rows in striped]
    assert all(4 <= period <= 16 for period in periods)
    assert len(set(periods)) > 1, "every slot draws its own"


@pytest.mark.slow
def test_what_functions_draw_is_the_same_however_the_batch_is_dealt(store: Store, documented: str) -> None:
    spec = ViewSpec((16, 16, 16), {"x": View(appearance=AppearanceRanges(functions=[documented]))})
    parts = take(store, spec, 2, rank=1, world_size=2, threads=3)
    for whole, part in zip(take(store, spec, 2), parts, strict=True):
        assert_same({key: item[2:] for key, item in whole[0].items()}, part[0])


def test_functions_follow_the_steps_one_after_another_in_slices_too(store: Store) -> None:
    both = ["my_changes:halved", "my_changes:stripes"]
    plain = ViewSpec((20, 20), {"x": View(appearance=AppearanceRanges(order=["brightness"]))})
    changed = ViewSpec((20, 20), {"x": View(appearance=AppearanceRanges(order=["brightness"], functions=both))})
    before, after = (take(store, spec, 1)[0][0]["x"] for spec in (plain, changed))
    assert after.shape == (4, 1, 20, 20)
    assert is_nothing_or_a_stripe((after - before / 2).numpy())


def test_the_numbers_are_uniform_and_each_functions_own(store: Store) -> None:
    views = {name: View(appearance=AppearanceRanges(functions=["a:b", "c:d"])) for name in ("x", "y")}
    spec = ViewSpec((16, 16, 16), views)
    planner = Planner(store.cases, spec, 1, global_batch=2)
    found = np.stack([draw_numbers(functools.partial(planner.generator, "train", step, 0), spec) for step in range(99)])
    assert found.shape == (99, 4, 16)
    assert found.dtype == np.float32
    assert_uniform(found.ravel(), 0, 1)
    assert np.abs(np.corrcoef(found.transpose(1, 0, 2).reshape(4, -1)) - np.eye(4)).max() < 5 / (99 * 16) ** 0.5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stripes", "expected MODULE:NAME"),
        ("no_such_module_of_ours:stripes", "cannot be imported.*PYTHONPATH"),
        ("my_changes:spots", "my_changes has no spots"),
        ("my_changes:not_a_function", "numba cannot compile it"),
        ("my_changes:not_for_numba", "numba cannot compile it for"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_first_step(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_function(name, 3)


def test_without_numba_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(UserError, match=r"needs numba: not installed; pip install 'voxtrast\[numba\]'"):
        load_function("my_changes:not_asked_for_before", 3)
