"""Which cases are held aside: the same for pretraining's validation and for fine-tuning's test."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from .store import Case

Item = TypeVar("Item", bound=Case)


def held_aside(
    cases: Sequence[Item], fraction: float = 0.0, *, count: int | None = None
) -> tuple[list[Item], list[Item]]:
    """Splits cases into (kept, held aside), by a hash of their ids, which is a number from 0 to 1.

    A case is held aside where its hash is below `fraction`. That is decided for each case alone: cases that join the
    store, or leave it, do not move the others; a smaller fraction holds aside a part of what a larger one does; and
    the share of cases held aside is near the fraction, not equal to it. Of two or more cases at least one is held
    aside (the smallest hash) and at least one is kept (the largest), unless the fraction is 0.

    With `count` in place of the fraction exactly that many are held aside, those with the smallest hashes (at most all
    but one). Then a case that joins may take the place of another.
    """
    ordered = sorted(cases, key=lambda case: _hash(case.id))
    if count is None:
        count = sum(_hash(case.id) < fraction for case in cases)
        count = max(1, count) if fraction > 0 else 0
    chosen = {case.id for case in ordered[: max(0, min(count, len(cases) - 1))]}
    return [c for c in cases if c.id not in chosen], [c for c in cases if c.id in chosen]


def fraction_for(cases: Sequence[Case], count: int) -> float:
    """A fraction by which `held_aside` takes exactly `count` of these cases (at least one, at most all but one)."""
    ordered = sorted(_hash(case.id) for case in cases)
    if not 1 <= count < len(ordered):
        raise ValueError(f"count {count} of {len(ordered)} cases, expected at least 1 and at most all but one")
    return (ordered[count - 1] + ordered[count]) / 2


def _hash(id: str) -> float:
    return int.from_bytes(hashlib.sha256(id.encode()).digest(), "big") / 2**256
