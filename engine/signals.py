"""What ends a run that is not done: SIGINT and SIGTERM as a request to stop after the step under way, and the clock."""

import signal
import time
from typing import Any

TO_BE_CONTINUED = 75  # exit code of a run that is out of time: the same command continues it


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, why: str, step: int, exit_code: int) -> None:
        super().__init__(f"stopped by {why} after step {step}; the same command continues")
        self.exit_code = exit_code

    @classmethod
    def by_signal(cls, number: int, step: int) -> "Interrupted":
        return cls(signal.Signals(number).name, step, 128 + number)


class Clock:
    """Whether a run is out of time.

    Args:
        minutes: from now on; 0 for no limit.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() >= self.end


class StopSignal:
    """Remembers the first SIGINT or SIGTERM while it is entered; a second one acts as it would have before."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._before[number])
