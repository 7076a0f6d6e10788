"""A rank that dies, hangs or fails: what the others say, and how soon they end."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_processes import RankProcesses

from voxtrast.engine import watchdog
from voxtrast.engine.errors import UserError
from voxtrast.engine.meeting import meet, place
from voxtrast.engine.watchdog import LOST_RANK, LostRank, Watchdog, at

PERIOD_S, GRACE_S = 0.2, 0.5
LIMIT_S = 60.0  # no rank reaches it, on however busy a machine
STILL_S = 3.0  # where one is to

Body = Callable[[int, Watchdog], None]


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_S", GRACE_S)
    monkeypatch.setattr(watchdog, "PERIOD_S", PERIOD_S)


def watched(body: Body, together: tuple[type[Exception], ...] = (), limit_s: float = LIMIT_S) -> Callable[[int], None]:
    """A rank that meets the others, does the body under the watchdog, and ends as `pretrain` does."""

    def work(rank: int) -> None:
        met = meet(place(os.environ), {}, 60)
        try:
            with Watchdog(met.second, met.store, rank, met.hosts, limit_s, together) as dog:
                body(rank, dog)
        except LostRank as error:
            print(f"error (rank {rank}): {error}", file=sys.stderr)
            os._exit(LOST_RANK)
        except (UserError, InterruptedError) as error:
            print(f"error (rank {rank}): {error}", file=sys.stderr)
            os._exit(2)

    return work


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def posted(dog: Watchdog, step: int) -> None:
    """Waits until every rank has said that it is at the step."""
    until(lambda: all(said["step"] == step for said in dog._all()))


def test_ranks_that_end_well_one_after_the_other_say_nothing(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        time.sleep(0.2 + (2 - rank) * 0.3)

    ranks = RankProcesses(tmp_path, watched(body), size=3)
    ranks.start()
    assert ranks.ends(30) == [0, 0, 0]
    assert [ranks.said(rank) for rank in range(3)] == [[], [], []]


@pytest.mark.slow
def test_a_rank_that_is_longer_busy_than_the_limit_is_not_lost(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("saving a checkpoint", 3)
        time.sleep(2 * STILL_S if rank == 1 else 0.1)

    ranks = RankProcesses(tmp_path, watched(body, limit_s=STILL_S))
    ranks.start()
    assert ranks.ends(30) == [0, 0]


@pytest.mark.slow
def test_ranks_that_are_all_paused_for_longer_than_the_limit_go_on(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("training", 7)
        posted(dog, 7)
        (tmp_path / f"up{rank}").touch()
        until((tmp_path / "resumed").exists)
        heard = dog.peers[1 - rank].said["beat"]
        until(lambda: bool(dog.peers[1 - rank].said["beat"] > heard + 3))

    ranks = RankProcesses(tmp_path, watched(body, limit_s=STILL_S))
    ranks.start()
    until(lambda: all((tmp_path / f"up{rank}").exists() for rank in range(2)))
    for number, seconds in ((signal.SIGSTOP, STILL_S + 1.5), (signal.SIGCONT, 0.0)):
        for process in ranks.processes:
            assert process.pid is not None
            os.kill(process.pid, number)
        time.sleep(seconds)
    (tmp_path / "resumed").touch()
    assert ranks.ends(30) == [0, 0], ranks.said(0) + ranks.said(1)


def test_a_rank_that_takes_longer_to_end_than_rank_0_waits_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "PATIENCE_S", 1.5)

    def body(rank: int, dog: Watchdog) -> None:
        if rank == 1:
            until(lambda: not dog.threads[0].is_alive())  # the store is gone
            time.sleep(GRACE_S)

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(30) == [0, 0]
    assert [ranks.said(rank) for rank in range(2)] == [[], []]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stands_still_ends_the_others_within_the_limit(victim: int, tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("saving a checkpoint", 7)
        posted(dog, 7)
        (tmp_path / f"up{rank}").touch()
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body, limit_s=STILL_S), size=3)
    ranks.start()
    until(lambda: all((tmp_path / f"up{rank}").exists() for rank in range(3)))
    time.sleep(3 * PERIOD_S)  # for each to have heard it
    began = time.monotonic()
    process = ranks.processes[victim].pid
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    for rank in others:
        ranks.processes[rank].join(40)
    seconds = time.monotonic() - began
    os.kill(process, signal.SIGKILL)
    codes = ranks.ends(30)
    assert [codes[rank] for rank in others] == [LOST_RANK, LOST_RANK]
    assert seconds < STILL_S + GRACE_S + 20  # the limit, the grace, and what a busy machine takes
    for rank in others:
        [line] = ranks.said(rank)
        assert f"rank {victim} on " in line
        assert "the same command continues" in line
        if victim == 1:
            assert "step 7, saving a checkpoint" in line


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others(victim: int, tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("training", 4)
        posted(dog, 4)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body, limit_s=STILL_S))
    ranks.start()
    codes = ranks.ends(30)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == LOST_RANK
    [line] = ranks.said(1 - victim)
    assert f"rank {victim} on " in line


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_rank_is_what_the_others_say(victim: int, tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("waiting for views", 5)
        posted(dog, 5)
        if rank == victim:
            raise UserError("volume 17 cannot be read")
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body), size=3)
    ranks.start()
    codes = ranks.ends(30)
    assert codes == [2 if rank == victim else LOST_RANK for rank in range(3)]
    for rank in range(3):
        [line] = ranks.said(rank)
        assert "volume 17 cannot be read" in line
        assert (f"rank {victim} on " in line and "step 5, waiting for views" in line) == (rank != victim)


@pytest.mark.slow
def test_an_error_that_all_ranks_raise_together_is_each_ones_own(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        time.sleep(0.3)
        raise InterruptedError("stopped by SIGTERM") if rank < 2 else UserError("stopped by SIGTERM")

    ranks = RankProcesses(tmp_path, watched(body, (InterruptedError,)), size=3)
    ranks.start()
    assert ranks.ends(30) == [2, 2, 2]


def test_a_rank_whose_own_error_is_on_its_way_up_is_waited_for(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        try:
            raise UserError(
                "volume 17 cannot be read" if rank == 0 else "stopped, because the first rank could not go on"
            )
        finally:
            if rank == 0:  # as a save that is under way
                until(lambda: bool(dog.peers[1].said["end"]))
                time.sleep(4 * GRACE_S)
                (tmp_path / "saved").touch()

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(30) == [2, 2]
    assert ranks.said(0) == ["error (rank 0): volume 17 cannot be read"]
    assert ranks.said(1) == ["error (rank 1): stopped, because the first rank could not go on"]
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_an_error_that_never_reaches_the_top_is_waited_for_within_a_limit(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        watchdog.LEAVING_S = 1.0  # in this rank's process
        at("training", 2)  # where it stands may be inherited from the process that forked it
        posted(dog, 2)
        try:
            raise UserError("volume 17 cannot be read")
        finally:
            if rank == 0:
                time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(30) == [LOST_RANK, 2]
    [line] = ranks.said(0)
    assert "rank 1 on " in line


def test_an_error_of_the_collectives_names_the_rank_behind_it(tmp_path: Path) -> None:
    def body(rank: int, dog: Watchdog) -> None:
        at("training", 9)
        posted(dog, 9)
        if rank == 1:
            (tmp_path / "number.part").write_text(str(os.getpid()))
            (tmp_path / "number.part").rename(tmp_path / "number")
            time.sleep(60)
        until((tmp_path / "number").exists)
        os.kill(int((tmp_path / "number").read_text(encoding="utf-8")), signal.SIGKILL)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(30) == [LOST_RANK, -signal.SIGKILL]
    [line] = ranks.said(0)
    assert "rank 1 on " in line
    assert "is gone (last seen at step 9, training)" in line
