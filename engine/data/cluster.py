"""The pool on a Dask cluster. Each Dask worker runs jobs in a process of its own, the one that the local pool has:
time-outs, deaths and warnings of readers are the same there, and the Dask worker survives them."""

import asyncio
import contextlib
import importlib
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UserError
from .devices import array_module
from .store import StoreWriteError
from .workers import Job, Pool, Worker

CONNECT_S = 20.0
REMEDY = "give the address that dask-scheduler printed, for example tcp://host:8786"
ALONE_S = 300.0  # without any worker, before the run is given up
# In a Dask worker: the process of each of its threads, by the token of the run that it works for.
_workers: dict[str, dict[int, Worker]] = {}
_ended: set[str] = set()
_lock = threading.Lock()


class ClusterPool(Pool):
    """Workers of the cluster behind `address`. Raises UserError where it cannot be reached, or its workers lack the
    package, the store, the raw files or the device."""

    def __init__(self, address: str, raw: Path, store: Path, device: str, timeout_s: float | None) -> None:
        try:
            self._dask = importlib.import_module("distributed")
        except ImportError:
            raise UserError("scheduler is given, and distributed is not installed: install voxtrast[dask]") from None
        self._address, self._raw, self._store, self._device = address, raw.resolve(), store.resolve(), device
        self._timeout_s = timeout_s
        self._token = self._store / f".token-{secrets.token_hex(8)}.tmp"

    def __enter__(self) -> "ClusterPool":
        self._check_scheduler()
        try:
            self._client = self._dask.Client(self._address, timeout=CONNECT_S, set_as_default=False)
        except OSError as error:
            raise self._unanswered(error) from None
        try:
            self._check_workers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._token.unlink(missing_ok=True)
        # Jobs in the middle would write to a store that is no longer locked. A Dask worker that cannot be reached ends
        # with the loss of its scheduler, and its processes with it.
        with contextlib.suppress(Exception):
            run = str(self._store), str(self._token)
            self._client.run(end_there, *run, on_error="ignore", callback_timeout=CONNECT_S)
        self._client.close()  # and with it goes whatever is still to be done

    def _check_scheduler(self) -> None:
        """Ask before there is a client: its own time-out does not bound the wait for what is no scheduler to speak."""
        with ThreadPoolExecutor(1) as thread:  # as the caller may be in an event loop of its own
            answer = thread.submit(asyncio.run, self._listener())
        try:
            kind = answer.result()
        except (TimeoutError, asyncio.TimeoutError, MemoryError, struct.error):  # silence, or another protocol
            found = f"something listens at {self._address}, and it is no Dask scheduler (the dashboard?)"
            raise UserError(f"{found}: {REMEDY}") from None
        except Exception as error:  # of any kind: nobody there, no such address, TLS without certificates
            raise self._unanswered(error) from None
        if kind != "Scheduler":
            raise UserError(f"a Dask {kind.lower()} listens at {self._address}, not a scheduler: {REMEDY}")

    def _unanswered(self, error: Exception) -> UserError:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"no Dask scheduler answers at {self._address} ({first}): {REMEDY}")

    async def _listener(self) -> str:
        secured = self._dask.Security().get_connection_args("client")

        async def ask() -> str:
            # What nobody listens at is an OSError, in half of the time.
            async with self._dask.rpc(self._address, timeout=CONNECT_S / 2, connection_args=secured) as there:
                return str((await there.identity())["type"])

        return await asyncio.wait_for(ask(), CONNECT_S)

    def _check_workers(self) -> None:
        try:
            self._token.write_text(self._token.name)
        except OSError as error:
            raise StoreWriteError.of(error, self._token) from error
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_S)
        except TimeoutError:
            message = f"the Dask scheduler at {self._address} has no workers"
            raise UserError(f"{message}: start some with `dask worker {self._address}`") from None
        try:
            answers = self._client.run(missing_here, *self._needs())
        except Exception as error:  # of any kind, from there: most often that there is no such module
            kind = f"{type(error).__name__}: {error}"
            message = f"the workers at {self._address} cannot run voxtrast ({kind})"
            raise UserError(f"{message}: install voxtrast[engine] {version('voxtrast')} there") from None
        for worker, missing in sorted(answers.items()):
            if missing:
                raise UserError(f"Dask worker {worker}: {missing}")
        self._client.run(end_there, str(self._store))  # what a run that was killed has left at work

    def _needs(self) -> tuple[str, str, str, str]:
        return version("voxtrast"), str(self._token), str(self._raw), self._device

    def batch(self, jobs: list[tuple[int, Job]]) -> Iterator[tuple[int, Job]]:
        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        pending: dict[int, Any] = {}

        def watch(position: int) -> None:
            pending[position].add_done_callback(lambda task: ended.put((position, task)))

        for position, job in jobs:
            job = {**job, "store": str(self._store)} if "store" in job else job
            key = f"voxtrast-{job['task']}-{secrets.token_hex(8)}"
            call = perform_there, job, self._timeout_s, self._needs()
            pending[position] = self._client.submit(*call, key=key, pure=False)
            watch(position)
        alone_s = 0.0
        while pending:
            try:
                position, task = ended.get(timeout=10)
            except queue.Empty:
                alone_s = 0.0 if self._client.nthreads() else alone_s + 10
                if alone_s >= ALONE_S:
                    message = f"the Dask cluster at {self._address} has lost all its workers"
                    raise UserError(f"{message}: start some, then run the same command again, it goes on") from None
                continue
            if task.status in ("lost", "pending"):  # with its worker and the reply: it will be done again
                watch(position)
                continue
            reply = self._reply(task)
            del pending[position]
            yield position, reply

    def _reply(self, task: Any) -> Job:
        if task.status == "finished":
            reply: Job = task.result()
            if "missing" in reply:
                raise UserError(f"Dask worker on {reply['host']}: {reply['missing']}")
            return reply
        error = task.exception() if task.status == "error" else None
        if isinstance(error, self._dask.KilledWorker):
            return {"died": "the loss of its Dask worker, several times over"}
        problem = f"{type(error).__name__}: {error}" if error else f"the task is {task.status}"
        message = f"the Dask cluster at {self._address} gave a job up ({problem})"
        raise UserError(f"{message}: see that it runs, then run the same command again, it goes on")


def missing_here(expected: str, token: str, raw: str, device: str) -> str:
    """On a worker: what it lacks, and the remedy; nothing where it has all."""
    if (own := version("voxtrast")) != expected:
        return f"it has voxtrast {own}, this is {expected}: install the same version there"
    try:
        same = Path(token).read_text(encoding="utf-8") == Path(token).name
    except OSError:
        same = False
    if not same:
        folder = Path(token).parent
        return f"it does not see the store {folder}: put the store on a disk that all workers mount at the same path"
    if not Path(raw).exists():
        return f"it does not see {raw}: put the raw files on a disk that all workers mount at the same path"
    try:
        array_module(device)
    except UserError as error:
        return str(error)
    return ""


def perform_there(job: Job, timeout_s: float | None, needs: tuple[str, str, str, str]) -> Job:
    """On a worker: one job, in the process of this thread. A worker that joined late is checked like the others."""
    token, thread = needs[1], threading.get_ident()
    if thread not in _workers.get(token, {}) and (missing := missing_here(*needs)):
        return {"missing": missing, "host": socket.gethostname()}
    with _lock:
        if token in _ended:
            return {"died": "the end of its run"}
        worker = _workers.setdefault(token, {}).setdefault(thread, Worker())
    return worker.perform(job, timeout_s)


def end_there(store: str, token: str = "") -> None:
    """On a worker: end the processes of every run on a store, and start none for the run of this token any more."""
    with _lock:
        tokens = {each for each in _workers if Path(each).parent == Path(store)}
        _ended.update(tokens | {token})
        workers = [worker for each in tokens for worker in _workers.pop(each).values()]
    for worker in workers:
        worker.close()
