"""Which cases are held aside: the same for pretraining's validation and for fine-tuning's test."""

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

from .store import Case

Item = TypeVar("Item", bound=Case)


def held_aside(cases: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Splits cases into (kept, held aside), by a hash of their ids.

    The order of the hashes is fixed, so a smaller fraction holds aside a subset of a larger one, whatever the seed,
    and cases that join the store leave the others where they were. At least one case is held aside where the
    fraction is not 0, and at least one is kept.
    """
    if fraction <= 0 or len(cases) < 2:
        return list(cases), []
    count = min(len(cases) - 1, max(1, math.floor(fraction * len(cases) + 0.5)))
    ordered = sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest())
    chosen = {case.id for case in ordered[:count]}
    return [c for c in cases if c.id not in chosen], [c for c in cases if c.id in chosen]
