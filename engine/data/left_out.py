"""The volumes that a run goes on without, because they cannot be read."""

import sys
import threading
from collections.abc import Collection, Mapping, Sequence

from ..errors import UserError
from .store import Case


class LeftOut:
    """Says once of each case that it is left out and why; any thread may add one.

    Args:
        cases: as the planner numbers them.
        on_error: "substitute" lets the slots of a case that cannot be read take another case, "raise" ends the run.
        reasons: case id -> why, of those that were found and reported before.
    """

    def __init__(self, cases: Sequence[Case], on_error: str = "substitute", reasons: Mapping[str, str] = {}) -> None:
        if on_error not in ("substitute", "raise"):
            raise UserError(f"on_error {on_error!r}: expected 'substitute' or 'raise'")
        self._cases, self._on_error = cases, on_error
        self._lock = threading.Lock()
        self._reasons = {i: reasons[case.id] for i, case in enumerate(cases) if case.id in reasons}

    @property
    def indices(self) -> Collection[int]:
        return self._reasons.keys()

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by case id."""
        return {self._cases[index].id: reason for index, reason in list(self._reasons.items())}

    def add(self, index: int, error: UserError) -> None:
        """Raises: the error itself with on_error="raise"."""
        if self._on_error == "raise":
            raise error
        with self._lock:
            is_new = index not in self._reasons
            self._reasons.setdefault(index, str(error))
        if is_new:
            print(f"left out from here on: {self._cases[index].id}: {error}", file=sys.stderr)
