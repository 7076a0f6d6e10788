"""What ends a run that is not done: SIGINT and SIGTERM as a request to stop after the step under way, and the clock."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

TIME_TO_END_S = 10.0  # between SIGTERM and SIGKILL
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


def run_child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Runs a program in a session of its own and passes signals on to it, each of them once: the terminal does not.

    Returns: its exit code; negative for the signal that ended it.
    """
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)  # runs and DeepSpeed know no SIGHUP

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_within(
    seconds: float, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program that may hang, with all that it starts, and keeps what it says.

    Raises: subprocess.TimeoutExpired after `seconds`; nothing of it is left then.
    """
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    try:
        said, errors = process.communicate(timeout=seconds)
    except BaseException:
        # A launcher ends its ranks on SIGTERM; what does not end is killed.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.communicate(timeout=TIME_TO_END_S)
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, errors)
