"""The volumes that a run goes on without, because they cannot be read."""

import sys
import threading
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .store import Case


class LeftOut:
    """Says once of each case that it is left out and why; any thread may add one.

    A volume that cannot be opened is missing in every slot. One that is bad in places is missing in those slots alone
    that look there, so that every slot's substitute is the same whatever was met before.

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
        self._everywhere = {i: reasons[case.id] for i, case in enumerate(cases) if case.id in reasons}
        self._in_slots: dict[tuple[int, int], set[int]] = {}  # (step, slot): cases
        self._reasons = dict(self._everywhere)

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by case id."""
        with self._lock:
            return {self._cases[index].id: reason for index, reason in self._reasons.items()}

    def of_slot(self, step: int, slot: int) -> set[int]:
        """The cases that this slot has to do without."""
        with self._lock:
            return {*self._everywhere, *self._in_slots.get((step, slot), ())}

    def add(self, index: int, error: UserError, slot: tuple[int, int] | None = None) -> None:
        """Leaves a case out, everywhere or in one (step, slot). Raises: the error itself with on_error="raise"."""
        if self._on_error == "raise":
            raise error
        with self._lock:
            is_new = index not in self._reasons
            self._reasons.setdefault(index, str(error))
            if slot is None:
                self._everywhere.setdefault(index, str(error))
            else:
                self._in_slots.setdefault(slot, set()).add(index)
        if is_new:
            where = "" if slot is None else " where it is damaged"
            print(f"left out{where}: {self._cases[index].id}: {error}", file=sys.stderr)
