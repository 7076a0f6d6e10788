"""A process of its own for each row: no library meets another's threads, and what each takes can be told.

Between its turns a row stands still: its queues are full, and its process and their children take no time.
"""

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from ..harness import REFUSED
from ..place import Cannot
from .checks import check_views
from .rows import ROWS, Setting

LEAST_BATCHES = 4  # of a turn
STILL_SECONDS = 0.1  # without work, for a row to count as standing still
PATIENCE_SECONDS = 900.0  # with a row that gives no sign
READY, FAILED = "ready", "failed"


@dataclass(frozen=True)
class Turn:
    views: int
    seconds: float
    cpu_seconds: float  # of the process and its children, all threads
    peak_mb: float | None  # beyond what was held before the row was built

    @property
    def views_per_s(self) -> float:
        return self.views / self.seconds


class Host:
    """A row in its process, built, checked and waiting for turns.

    Raises: Cannot with the reason where the row cannot be built or makes no views.
    """

    def __init__(self, row: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(row, setting, theirs), name=row)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def turn(self, seconds: float, *, memory: bool = False) -> Turn:
        self._connection.send((seconds, memory))
        found: Turn = self._receive()
        return found

    def _receive(self) -> Any:
        if not self._connection.poll(PATIENCE_SECONDS):
            raise Cannot(f"gives no sign for {PATIENCE_SECONDS:.0f} s")
        try:
            state, content = self._connection.recv()
        except EOFError:
            self._process.join()
            raise Cannot(f"its process ended with code {self._process.exitcode}") from None
        if state == FAILED:
            raise Cannot(content)
        return content

    def close(self) -> None:
        self._connection.close()  # which ends it
        self._process.join(10)
        if self._process.is_alive():
            for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.join()

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(row: str, setting: Setting, connection: Connection) -> None:
    try:
        worker = _Worker(row, setting)
        connection.send((READY, None))
        while True:
            seconds, memory = connection.recv()
            connection.send((READY, worker.turn(seconds, memory)))
    except (EOFError, BrokenPipeError):  # nobody waits for it any more
        return
    except Cannot as why:
        connection.send((FAILED, str(why)))
    except Exception as error:  # of a peer, of any kind: the others are measured all the same
        first = (str(error).strip().splitlines() or [""])[0]
        connection.send((FAILED, f"fails: {type(error).__name__}: {first}"))


class _Worker:
    """What runs in the process of a row."""

    def __init__(self, name: str, setting: Setting) -> None:
        row = ROWS[name]
        make = row.prepare(setting)  # imports, and the volumes of those that have them in memory
        self._on_gpu = setting.device == "cuda"
        self._children: list[psutil.Process] = []
        self._before_mb = self._held_mb()
        self._stream, self._ahead = make(), row.ahead(setting)
        try:
            self._views = check_views(next(self._stream), setting.size, field=not row.lacks_field)
        except ValueError as error:
            raise Cannot(f"{REFUSED}: {error}") from None
        self._children = psutil.Process().children(recursive=True)
        self._stand_still()

    def turn(self, seconds: float, memory: bool) -> Turn:
        for _ in range(self._ahead + 1):  # those were made before, and one has begun
            next(self._stream)
        with _Sampled(self._held_mb) if memory else contextlib.nullcontext() as sampled:
            batches, started, busy = 0, self._now(), self._cpu_seconds()
            while batches < LEAST_BATCHES or time.perf_counter() - started < seconds:
                next(self._stream)
                batches += 1
            turn = batches * self._views, self._now() - started, self._cpu_seconds() - busy
        self._stand_still()
        held = sampled.highest if sampled is not None else None
        return Turn(*turn, None if held is None or self._before_mb is None else held - self._before_mb)

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _held_mb(self) -> float | None:
        if self._on_gpu:  # by all processes, of which this one alone is at work
            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**20
        return _memory_mb([os.getpid(), *(child.pid for child in self._children)])

    def _cpu_seconds(self) -> float:
        taken = time.process_time()
        for child in self._children:
            times = child.cpu_times()
            taken += times.user + times.system
        return taken

    def _stand_still(self) -> None:
        since = time.perf_counter()
        while time.perf_counter() - since < PATIENCE_SECONDS / 2:
            before = self._cpu_seconds()
            time.sleep(STILL_SECONDS)
            if self._cpu_seconds() - before < 0.05 * STILL_SECONDS:
                return
        raise Cannot("does not come to rest between its turns")


def _memory_mb(processes: list[int]) -> float | None:
    """Of some processes, what they share counted once, without the page cache; None where the kernel does not tell."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return None
        found = [int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        if len(found) != 2:
            return None
        total += sum(found)
    return total / 1024


class _Sampled:
    """The highest of what is read every now and then while a block runs."""

    def __init__(self, read: Callable[[], float | None]) -> None:
        self._read, self.highest = read, read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            found = self._read()
            if found is not None:
                self.highest = max(found, self.highest or 0.0)

    def __enter__(self) -> "_Sampled":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
