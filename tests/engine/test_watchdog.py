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

LIMIT_S, GRACE_S = 1.6, 0.5


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_S", GRACE_S)


def watched(body: Callable[[int], None], together: tuple[type[Exception], ...] = ()) -> Callable[[int], None]:
    """A rank that meets the others, does the body under the watchdog, and ends as `pretrain` does."""

    def work(rank: int) -> None:
        met = meet(place(os.environ), {}, 10)
        try:
            with Watchdog(met.second, met.store, rank, met.hosts, LIMIT_S, together):
                body(rank)
        except LostRank as error:
            print(f"error (rank {rank}): {error}", file=sys.stderr)
            os._exit(LOST_RANK)
        except (UserError, InterruptedError) as error:
            print(f"error (rank {rank}): {error}", file=sys.stderr)
            os._exit(2)

    return work


def test_ranks_that_end_well_one_after_the_other_say_nothing(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        time.sleep(0.2 + (2 - rank) * 0.3)

    ranks = RankProcesses(tmp_path, watched(body), size=3)
    ranks.start()
    assert ranks.ends(15) == [0, 0, 0]
    assert [ranks.said(rank) for rank in range(3)] == [[], [], []]


@pytest.mark.slow
def test_a_rank_that_is_longer_busy_than_the_limit_is_not_lost(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        at("saving a checkpoint", 3)
        time.sleep(3 * LIMIT_S if rank == 1 else 0.1)

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(15) == [0, 0]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_stands_still_ends_the_others_within_the_limit(victim: int, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        at("saving a checkpoint", 7)
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body), size=3)
    ranks.start()
    time.sleep(1.2)
    began = time.monotonic()
    process = ranks.processes[victim].pid
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    for rank in others:
        ranks.processes[rank].join(15)
    seconds = time.monotonic() - began
    os.kill(process, signal.SIGKILL)
    codes = ranks.ends(15)
    assert [codes[rank] for rank in others] == [LOST_RANK, LOST_RANK]
    assert seconds < LIMIT_S + GRACE_S + 3  # the limit, the grace, and what a busy machine takes
    for rank in others:
        [line] = ranks.said(rank)
        assert f"rank {victim} on " in line
        assert "the same command continues" in line
        if victim == 1:
            assert "step 7, saving a checkpoint" in line


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others(victim: int, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        at("training", 4)
        time.sleep(0.8)
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    codes = ranks.ends(15)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == LOST_RANK
    [line] = ranks.said(1 - victim)
    assert f"rank {victim} on " in line


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_rank_is_what_the_others_say(victim: int, tmp_path: Path) -> None:
    def body(rank: int) -> None:
        at("waiting for views", 5)
        time.sleep(0.3)
        if rank == victim:
            raise UserError("volume 17 cannot be read")
        time.sleep(60)

    ranks = RankProcesses(tmp_path, watched(body), size=3)
    ranks.start()
    began = time.monotonic()
    codes = ranks.ends(20)
    assert time.monotonic() - began < 12
    assert codes == [2 if rank == victim else LOST_RANK for rank in range(3)]
    for rank in range(3):
        [line] = ranks.said(rank)
        assert "volume 17 cannot be read" in line
        assert (f"rank {victim} on " in line and "step 5, waiting for views" in line) == (rank != victim)


@pytest.mark.slow
def test_an_error_that_all_ranks_raise_together_is_each_ones_own(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        time.sleep(0.3)
        raise InterruptedError("stopped by SIGTERM") if rank < 2 else UserError("stopped by SIGTERM")

    ranks = RankProcesses(tmp_path, watched(body, (InterruptedError,)), size=3)
    ranks.start()
    assert ranks.ends(15) == [2, 2, 2]


def test_an_error_of_the_collectives_names_the_rank_behind_it(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        at("training", 9)
        time.sleep(0.5)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")

    ranks = RankProcesses(tmp_path, watched(body))
    ranks.start()
    assert ranks.ends(15) == [LOST_RANK, -signal.SIGKILL]
    [line] = ranks.said(0)
    assert "rank 1 on " in line
    assert "is gone (last seen at step 9, training)" in line
