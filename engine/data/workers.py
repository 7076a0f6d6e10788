"""A pool of worker processes that survives the death of any of them, and dies with its parent.

Python's own pools declare themselves broken when a worker is killed (for memory, say) and do not tell over which job;
forked workers also inherit the parent's threads and locks, and outlive it after kill -9. Here each thread of the parent
owns one fresh process and talks to it in JSON lines, so that a death names its job and every other worker goes on.
"""

import contextlib
import ctypes
import json
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import UserError

Job = dict[str, Any]
PROGRAM = f"from {__package__}.workers import serve; from {__package__}.conversion import perform; serve(perform)"
# Workers are as many as there are cores: a second thread in any of them only takes time from another.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1"
)
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
LONGEST_POLL_S = 1e6  # poll(2) counts milliseconds in 32 bits


class WorkerStartError(UserError):
    """A worker process could not even start: an installation that does not work, not a matter of any file."""


class Worker:
    """One process; started at the first job, started again after a death."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def perform(self, job: Job, timeout_s: float | None = None) -> Job:
        """The reply; {"died": how} where the process ended before it replied, {"late": seconds} where it took longer
        and was ended."""
        if self.process is None and not self._closed:
            self.process = self._start()
        if self._closed:  # perhaps while it started
            self.end()
            return {"died": "the end of its run"}
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then it is dead, and the empty line below says so
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        replies = self.process.stdout
        if not _readable(replies.fileno(), timeout_s):
            self.end()
            return {"late": timeout_s}
        line = replies.readline()
        if line.endswith(b"\n"):
            reply: Job = json.loads(line)
            return reply
        code = self.process.wait()
        self.process = None
        return {"died": signal.Signals(-code).name if code < 0 else f"exit code {code}"}

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"ready\n":
            _, complaint = process.communicate()
            last = complaint.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise WorkerStartError(
                f"a worker process did not start: {last[0]}: repair the installation (install voxtrast again)"
            )
        process.stderr.close()
        return process

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.communicate()
            self.process = None

    def close(self) -> None:
        """From any thread: end the process, whatever it is doing, and start no other."""
        self._closed = True
        if (process := self.process) is not None:
            process.kill()
            process.wait()


def _readable(descriptor: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while not poll.poll(min(max(0.0, until - time.monotonic()), LONGEST_POLL_S) * 1000):
        if time.monotonic() >= until:
            return False
    return True


class Pool:
    """What performs jobs, wherever: `batch` is the place's own. Use as a context."""

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batch(self, jobs: list[tuple[int, Job]]) -> Iterator[tuple[int, Job]]:
        """Perform jobs, each with its position; yields (position, reply) as they come."""
        raise NotImplementedError

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Job]]:
        """Perform jobs; yields (position of the job, reply) as they come, in no particular order.

        A job whose worker died is tried once more, alone, after all others: two large volumes at a time may be too
        much for the memory where one is not. So is one whose reply is `transient`: a network disk may be back by then.
        If its worker dies again the reply is {"died": how}.
        """
        waiting = list(jobs)
        again = []
        for position, reply in self.batch(list(enumerate(waiting))):
            if "died" in reply or reply.get("transient"):
                again.append(position)
            else:
                yield position, reply
        for position in sorted(again):
            yield from self.batch([(position, waiting[position])])


class WorkerPool(Pool):
    """`count` workers. Leaving the context ends them at once, whatever they are doing."""

    def __init__(self, count: int, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[int, Job] | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[tuple[int, Job | BaseException]] = queue.SimpleQueue()
        self._workers = [Worker() for _ in range(count)]
        self._closing = False
        self._threads = [threading.Thread(target=self._run, args=(worker,), daemon=True) for worker in self._workers]

    def __enter__(self) -> "WorkerPool":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        for worker in self._workers:
            worker.close()
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def batch(self, jobs: list[tuple[int, Job]]) -> Iterator[tuple[int, Job]]:
        for job in jobs:
            self._jobs.put(job)
        for _ in jobs:
            position, reply = self._replies.get()
            if isinstance(reply, BaseException):
                raise reply
            yield position, reply

    def _run(self, worker: Worker) -> None:
        try:
            while not self._closing and (item := self._jobs.get()) is not None:
                position, job = item
                try:
                    self._replies.put((position, worker.perform(job, self._timeout_s)))
                except Exception as error:  # handed to the thread that waits for the reply
                    self._replies.put((position, error))
        finally:
            worker.end()


def serve(perform: Callable[[Job], Job]) -> None:
    """The life of a worker process: a line "ready", then for each line with a job a line with the reply.

    Readers beneath us print to both standard streams, so the replies keep a private copy of one and the rest of the
    process is given the null device.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    replies = os.fdopen(os.dup(1), "wb")
    replies.write(b"ready\n")
    replies.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin.buffer:
        reply = perform(json.loads(line))
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
