"""Functions as a user would write them, for the tests of `functions` in a recipe."""

from typing import Any

import numba


def stripes(out: Any, image: Any, numbers: Any) -> None:
    period = 4 + int(12 * numbers[0])
    for d in range(image.shape[0]):
        out[d] = image[d] + 0.1 * (d % period == 0)


@numba.njit
def halved(out: Any, image: Any, numbers: Any) -> None:
    out[:] = image * 0.5


def not_for_numba(out: Any, image: Any, numbers: Any) -> None:
    out[:] = image.histogram()


not_a_function = 3
