"""Cases held aside: each by its own id, so that a store that grows moves none of them."""

from itertools import pairwise

import pytest

from voxtrast.engine.data.splits import fraction_for, held_aside
from voxtrast.engine.data.store import Case


def make_cases(count: int, first: int = 0) -> list[Case]:
    affine = ((0.0,) * 4,) * 4
    return [
        Case(f"case{number}", (8, 8, 8), (1.0, 1.0, 1.0), affine, "mr", "float16", {}, f"{number}", "", "")
        for number in range(first, first + count)
    ]


def aside(cases: list[Case], fraction: float = 0.0, **settings: int) -> set[str]:
    kept, chosen = held_aside(cases, fraction, **settings)
    assert sorted([*kept, *chosen], key=cases.index) == cases
    assert kept == [case for case in cases if case in kept], "in the order in which they came"
    return {case.id for case in chosen}


def test_cases_that_join_move_no_other() -> None:
    cases = make_cases(300)
    whole = aside(cases, 0.2)
    for count in range(20, 300, 20):
        present = {case.id for case in cases[:count]}
        assert aside(cases[:count], 0.2) == whole & present
    assert 0.1 < len(whole) / 300 < 0.3


def test_a_smaller_fraction_or_count_is_a_part_of_a_larger_one() -> None:
    cases = make_cases(60)
    for settings in (
        [{"fraction": number / 20} for number in range(20)],
        [{"fraction": 0.0, "count": number} for number in range(60)],
    ):
        chosen = [aside(cases, **each) for each in settings]  # type: ignore[arg-type]
        assert all(small <= large for small, large in pairwise(chosen))


def test_at_least_one_is_held_aside_and_one_is_kept() -> None:
    for count in range(2, 12):
        cases = make_cases(count)
        assert aside(cases, 0.0) == set()
        assert len(aside(cases, 1e-9)) == 1
        assert len(aside(cases, 1.0)) == count - 1
        assert aside(cases, 1e-9) == aside(cases, count=1)
    for few in (make_cases(1), []):
        assert aside(few, 0.5) == aside(few, count=1) == set()


def test_a_count_is_met_exactly_and_has_a_fraction() -> None:
    cases = make_cases(24)
    for count in range(1, 24):
        chosen = aside(cases, count=count)
        assert len(chosen) == count
        assert aside(cases, fraction_for(cases, count)) == chosen
    assert len(aside(cases, count=99)) == 23
    with pytest.raises(ValueError, match="count 24 of 24 cases"):
        fraction_for(cases, 24)
