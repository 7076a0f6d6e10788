"""How work is cut into programs: so that those which run side by side end at nearly the same time.

A device holds `places` programs at once. What is cut finer fills the last round better, and costs partial sums.
"""

from functools import lru_cache

MOST_PARTIAL = 2**24  # numbers of partial sums of one side
MOST_GRADIENTS = 2**26  # numbers of partial gradients of one side
MOST = 64
OVERHEAD = 4  # what begins and ends a program costs as much as this many blocks that pass by


def rounded_up(count: int, unit: int) -> int:
    return -(-count // unit)


@lru_cache(maxsize=1024)
def groups(fixed: int, passing: int, batch: int, places: int, most: int, both: bool) -> tuple[int, int]:
    """Into how many groups the blocks of the fixed and of the passing side go. Unless `both` are summed, a block of the
    fixed side costs nothing to stand alone."""

    def rounds(chosen: tuple[int, int]) -> tuple[int, int]:
        of_fixed, of_passing = chosen
        work = rounded_up(fixed, of_fixed) * (rounded_up(passing, of_passing) + OVERHEAD)
        return rounded_up(batch * of_fixed * of_passing, places) * work, of_fixed + of_passing

    of_fixed = range(1, min(fixed, most) + 1) if both else [fixed]
    return min(((f, p) for f in of_fixed for p in range(1, min(passing, most) + 1)), key=rounds)


@lru_cache(maxsize=1024)
def triangle_groups(blocks: int, batch: int, places: int) -> int:
    """The same for a set with itself, whose groups meet each other once."""

    def rounds(count: int) -> tuple[int, int]:
        own = rounded_up(blocks, count)
        return rounded_up(batch * count * (count + 1) // 2, places) * own * (own + OVERHEAD), count

    return min(range(1, min(blocks, MOST) + 1), key=rounds)


@lru_cache(maxsize=1024)
def even_splits(programs: int, blocks: int, places: int, most: int) -> int:
    """Into how many parts each of the programs is cut, which passes `blocks` by."""

    def rounds(splits: int) -> tuple[int, int]:
        return rounded_up(programs * splits, places) * (rounded_up(blocks, splits) + OVERHEAD), splits

    return min(range(1, min(blocks, most) + 1), key=rounds)
