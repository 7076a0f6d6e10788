"""Cases without volumes, plans of them and the verdict on a distribution, for the tests of the planner."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from voxtrast.engine.data.planner import Plan, Planner
from voxtrast.engine.data.store import Case
from voxtrast.methods.cover import cover_appearance
from voxtrast.methods.views import AffineRanges, AppearanceRanges, View, ViewSpec

# Every draw is keyed by a fixed seed: a test that passes once passes always. A correct planner had this chance to fail.
LEAST_P_VALUE = 1e-4
COVER = {"moving": View(appearance=cover_appearance()), "fixed": View(affine=AffineRanges(), displacement=True)}


def make_case(name: str, shape: tuple[int, int, int]) -> Case:
    intensity = {"background": -1.0, "low": 2.0, "high": 6.0, "mean": 3.5, "std": 0.9}
    return Case(name, shape, (1.0, 1.0, 1.0), ((0.0,) * 4,) * 4, "mr", "float16", intensity, name, "", "")


CASES = [make_case(f"case{index}", (40, 50, 60)) for index in range(7)]


def plans(
    views: dict[str, View],
    count: int,
    *,
    crop: tuple[int, ...] = (16, 16, 16),
    shape: tuple[int, int, int] = (40, 50, 60),
    seed: int = 0,
) -> list[Plan]:
    """One slot of each of `count` steps, of one volume."""
    planner = Planner([make_case("a", shape)], ViewSpec(crop, views), seed, global_batch=1)
    return [planner.plan(step, 0) for step in range(count)]


def view_with(order: Sequence[str], **ranges: Any) -> View:
    return View(appearance=AppearanceRanges(order=list(order), **ranges))


def assert_uniform(values: ArrayLike, low: float, high: float) -> None:
    drawn = np.asarray(values, np.float64)
    assert low <= drawn.min()
    assert drawn.max() <= high
    assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > LEAST_P_VALUE


def assert_normal(values: ArrayLike, std: float) -> None:
    assert stats.kstest(np.asarray(values, np.float64), stats.norm(scale=std).cdf).pvalue > LEAST_P_VALUE


def assert_equally_probable(values: Sequence[Any], expected: Sequence[Any]) -> None:
    assert_frequencies(values, {value: 1 / len(expected) for value in expected})


def assert_frequencies(values: Sequence[Any], expected: dict[Any, float]) -> None:
    """Chi-square test of the counts; what is not expected must not occur, nor what has probability 0."""
    counts = dict.fromkeys(expected, 0)
    for value in values:
        assert expected.get(value, 0) > 0, value
        counts[value] += 1
    possible = [value for value, probability in expected.items() if probability > 0]
    if len(possible) > 1:
        wanted = [expected[value] * len(values) for value in possible]
        assert min(wanted) >= 5
        assert stats.chisquare([counts[value] for value in possible], wanted).pvalue > LEAST_P_VALUE
