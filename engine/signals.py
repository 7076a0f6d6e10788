"""SIGINT and SIGTERM as a request to stop after the step under way."""

import signal
from typing import Any


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
