"""Ranks that watch each other: one that dies, hangs or ends with an error ends the others soon, with one line.

Every rank posts where it is (step, phase, a counter) to the store of the run every few seconds, from a thread of its
own, so that a long save or compilation is no silence. Rank 0 reads all of the counters and says who is lost; the
others read that, and rank 0's own. A second thread judges by this machine's clock alone: a call to a store on a
machine that is cut off never comes back, whatever its timeout.

What hangs while its thread goes on is found by the timeout of the collectives; this module then says who is where.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .meeting import minutes

LOST_RANK = 69  # exit code: another rank is gone (EX_UNAVAILABLE); the same command continues the run
SILENCE_S = 300.0  # of a thread that does nothing else; or train.timeout_minutes, where that is less
PERIOD_S = 2.0
GRACE_S = 3.0  # for this rank to end by itself, with an error of its own
LEAVING_S = 300.0  # and where that is on its way up already: a save that is under way is waited for
PATIENCE_S = 30.0  # of rank 0, which holds the store, for the others to end well
REMEDY = "see what it said on its machine; the same command continues from the last checkpoint"


class LostRank(Exception):
    """Another rank is gone, hangs, or ended with an error: one line."""


@dataclass
class _Whereabouts:
    step: int = 0
    phase: str = "starting"


_here = _Whereabouts()


def at(phase: str, step: int | None = None) -> None:
    """Says where this rank is, for the message of the others should it be lost.

    Args:
        phase: what it does, as in "saving a checkpoint".
        step: that it works on, from 1; as before where left out.
    """
    _here.phase = phase
    if step is not None:
        _here.step = step


@dataclass
class _Peer:
    """What was last heard of a rank, and when, by the clock of its watchdog."""

    said: dict[str, Any] = field(default_factory=lambda: {"beat": -1, "step": 0, "phase": "starting", "end": None})
    heard: float = 0.0

    def hear(self, said: dict[str, Any], now: float) -> None:
        if said["beat"] != self.said["beat"]:
            self.heard = now
        self.said = said


class Watchdog:
    """Watches the other ranks while it is entered; leaving it says to them how this rank ended.

    Args:
        store, second: two connections to one store, the first for the watching thread alone.
        rank: of this process.
        hosts: of every rank; more than one.
        timeout_s: after so long a silence a rank is lost.
        together: errors that every rank raises at the same step: no rank is lost by them.

    Raises: LostRank on leaving, in place of an error of torch's collectives.
    """

    def __init__(
        self,
        store: dist.Store,
        second: dist.Store,
        rank: int,
        hosts: tuple[str, ...],
        timeout_s: float,
        together: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.store, self.second = (dist.PrefixStore("watch", each) for each in (store, second))
        self.rank, self.hosts, self.together = rank, hosts, together
        self.limit = min(timeout_s, SILENCE_S)
        self.period = min(PERIOD_S, self.limit / 8)
        self.keys = [f"beat/{each}" for each in range(len(hosts))]
        self.peers = {each: _Peer() for each in range(len(hosts)) if each != rank}
        self.awake = 0.0  # seconds that this process ran: a clock that stands while it is paused, as others may be
        self.answered = 0.0  # when the store last did
        self.gone: list[int] = []  # found by `explain`; they will not say any more how they ended
        self.explaining, self.watched = False, threading.get_ident()
        self.stopped, self.finding = threading.Event(), threading.Lock()
        self.end: str | None = None  # None while it runs, "" after a good end, else what it ended of
        self.beat = 0
        if rank == 0:
            self.store.set("verdict", "")
        self._post()
        self.threads = [
            threading.Thread(target=work, name=f"watchdog-{name}", daemon=True)
            for name, work in (("hears", self._hear_all), ("judges", self._judge_silence))
        ]

    def __enter__(self) -> "Watchdog":
        self.watched = threading.get_ident()
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = None
        self.explaining = True
        if error is not None and _of_collectives(error):
            lost = LostRank(self.explain(error))
        with self.finding:  # a thread that has found a lost rank speaks for this process, and ends it
            self.stopped.set()
        failed = lost or (error if error is not None and not isinstance(error, self.together) else None)
        self.end = "" if failed is None else _one_line(failed)
        self._leave()
        if lost is not None:
            raise lost from error

    def explain(self, error: BaseException) -> str:
        """Who is behind an error of the collectives: the rank that does not post any more, or the one that lags."""
        with suppress(dist.DistError, TimeoutError):
            before = self._all()
            time.sleep(3 * self.period)
            after = self._all()
            for rank, said in enumerate(after):
                if said["end"]:
                    return self._lost(rank, said, f"ended: {said['end']}")
            pairs = enumerate(zip(before, after, strict=True))
            self.gone = [rank for rank, (old, new) in pairs if rank != self.rank and old["beat"] == new["beat"]]
            if self.gone:
                return self._lost(self.gone[0], after[self.gone[0]], "is gone")
            slowest = min(range(len(after)), key=lambda rank: (after[rank]["step"], rank == self.rank))
            return (
                f"the ranks stopped answering each other ({_one_line(error)}); furthest behind is "
                f"{self._name(slowest)} at {_where(after[slowest])}; {REMEDY}"
            )
        return f"{self._name(0)} is gone, and the store of the run with it ({_one_line(error)}); {REMEDY}"

    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(content) for content in self.second.multi_get(self.keys)]

    def _post(self) -> None:
        self.beat += 1
        said = {"beat": self.beat, "step": _here.step, "phase": _here.phase, "end": self.end}
        self.store.set(self.keys[self.rank], json.dumps(said))

    def _hear_all(self) -> None:
        while True:
            try:
                self._post()
                self._look()
            except dist.DistError as error:
                if self._first_ended_well():
                    return
                self._finish(f"{self._name(0)} is gone: its store does not answer ({_one_line(error)}); {REMEDY}")
                return
            self.answered = self.awake
            if self.stopped.wait(self.period):
                return

    def _look(self) -> None:
        """Raises nothing of its own: what it finds ends the process."""
        if self.rank != 0:
            verdict, first = self.store.multi_get(["verdict", self.keys[0]])
            self.peers[0].hear(json.loads(first), self.awake)
            if verdict:
                self._finish(verdict.decode())
            elif self.peers[0].said["end"]:
                self._finish(self._lost(0, self.peers[0].said, f"ended: {self.peers[0].said['end']}"))
            return
        for rank, content in zip(
            self.peers, self.store.multi_get([self.keys[rank] for rank in self.peers]), strict=True
        ):
            peer = self.peers[rank]
            peer.hear(json.loads(content), self.awake)
            if peer.said["end"]:
                self._pronounce(self._lost(rank, peer.said, f"ended: {peer.said['end']}"))
                return
            silent = self.awake - peer.heard
            if peer.said["end"] is None and silent > self.limit:
                self._pronounce(self._lost(rank, peer.said, f"has been silent for {minutes(silent)}"))
                return

    def _pronounce(self, line: str) -> None:
        self.store.set("verdict", line)
        self._finish(line)

    def _judge_silence(self) -> None:
        interval = min(0.5, self.period)
        while True:
            began = time.monotonic()
            if self.stopped.wait(interval):
                return
            self.awake += min(time.monotonic() - began, 2 * interval)
            if self._first_ended_well():
                return  # its store goes with it
            silent = self.awake - self.answered
            if silent > self.limit:
                self._finish(
                    f"no word from {self._name(0)} for {minutes(silent)}: its machine or the network is gone; {REMEDY}"
                )
                return
            first = self.peers.get(0)
            if first and first.said["end"] is None and self.awake - first.heard > self.limit:
                self._finish(self._lost(0, first.said, f"has been silent for {minutes(self.awake - first.heard)}"))
                return

    def _first_ended_well(self) -> bool:
        return self.rank != 0 and self.peers[0].said["end"] == ""

    def _finish(self, line: str) -> None:
        """Ends this process with the line, unless it ends by itself meanwhile: what blocks it cannot be interrupted."""
        if self.stopped.wait(GRACE_S):
            return
        deadline = time.monotonic() + LEAVING_S
        while self._unwinds() and time.monotonic() < deadline:
            if self.stopped.wait(min(0.2, self.period)):
                return
        with self.finding:
            if self.stopped.is_set():
                return
            print(f"error (rank {self.rank}): {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            if self.rank == 0:  # it holds the store, from which the others read the same
                time.sleep(2 * self.period)
            os._exit(LOST_RANK)

    def _unwinds(self) -> bool:
        """Whether an exception is on its way up to the watchdog, through the ends of `with` and `finally`.

        What explains an error of the collectives asks the store, and may never come back: that does not count.
        """
        found: Any = sys._current_exceptions().get(self.watched)
        error = found[1] if isinstance(found, tuple) else found  # a triple up to Python 3.11
        return error is not None and not self.explaining

    def _leave(self) -> None:
        """Says how this rank ended. Rank 0 stays until the others have, too: the store goes with it."""
        hearing, judging = self.threads
        hearing.join(2 * self.period)
        judging.join(2 * self.period)
        if hearing.is_alive():
            return  # in a call to a store that is cut off
        with suppress(dist.DistError):
            self._post()
            patience = PATIENCE_S if not self.end else GRACE_S + 2 * self.period
            deadline = time.monotonic() + patience
            while self.rank == 0 and time.monotonic() < deadline:
                if all(said["end"] is not None or rank in self.gone for rank, said in enumerate(self._all())):
                    break
                time.sleep(min(0.2, self.period))

    def _lost(self, rank: int, said: dict[str, Any], what: str) -> str:
        return f"{self._name(rank)} {what} (last seen at {_where(said)}); {REMEDY}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"


def _where(said: dict[str, Any]) -> str:
    return f"step {said['step']}, {said['phase']}"


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return first.split(". This is typically")[0]  # gloo's advice; ours follows


def _of_collectives(error: BaseException) -> bool:
    """Errors of torch's process groups have no class of their own everywhere: gloo raises a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    words = (
        "gloo",
        "NCCL",
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "ProcessGroup",
    )
    return type(error) is RuntimeError and any(word in str(error) for word in words)
