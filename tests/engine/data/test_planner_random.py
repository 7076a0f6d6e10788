"""The numbers below everything that is drawn: known answers of Philox, and the laws of what is made of it."""

import math
from typing import Any

import numpy as np
import pytest
from plan_samples import LEAST_P_VALUE, assert_equally_probable, assert_normal, assert_uniform
from scipy import stats

from voxtrast.engine.data.planner import native


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    assert native().philox(key[0] | key[1] << 32, *counter) == answer


def test_names_are_hashed_by_fnv_1a() -> None:
    assert [native().name_hash(name) for name in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]


def draws(stream: int = 0) -> Any:
    return native().Draws(11, stream, 0, 0)


def test_uniform_numbers_have_53_bits() -> None:
    numbers = draws().uniform(100_000)
    assert_uniform(numbers, 0, 1)
    scaled = numbers * 2**53
    assert (scaled == np.floor(scaled)).all()
    assert (scaled % 2).mean() == pytest.approx(0.5, abs=4 / math.sqrt(4 * numbers.size))


def test_normal_numbers_are_normal_and_independent() -> None:
    numbers = draws().normal(100_000)
    assert_normal(numbers, 1.0)
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 4 / math.sqrt(numbers.size)


@pytest.mark.parametrize(("low", "high"), [(-3, 3), (0, 0), (5, 104)])
def test_integers_are_equally_probable(low: int, high: int) -> None:
    assert_equally_probable(draws().integer(low, high, 20_000).tolist(), range(low, high + 1))


def test_integers_of_a_wide_range_are_not_biased() -> None:
    """Of 3 * 2^61 numbers, 2^64 words without rejection give every third one twice and the others three times."""
    numbers = draws().integer(0, 3 * 2**61 - 1, 30_000)
    assert_equally_probable((numbers % 3).tolist(), range(3))


def test_streams_are_independent() -> None:
    numbers = np.stack([draws(stream).uniform(20_000) for stream in range(6)])
    assert len(np.unique(numbers)) == numbers.size
    correlation = np.corrcoef(numbers)[np.triu_indices(6, 1)]
    assert stats.kstest(correlation * math.sqrt(20_000), stats.norm.cdf).pvalue > LEAST_P_VALUE
