"""The meeting at the start: who is missing, what differs, whether the output folder is shared; each as one line."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_processes import RankProcesses, free_port
from stand_in import recipe

from voxtrast.engine import agreement, meeting
from voxtrast.engine.config import load_config
from voxtrast.engine.errors import UserError
from voxtrast.engine.meeting import Meeting, decline, meet, place, ranges
from voxtrast.engine.ranks import Ranks

SCRIPT = Path(__file__).with_name("stand_in.py")
WORDS = ("data=store", "output=run", "train.global_batch=6")


def meeting_of(body: Callable[[Meeting, int], None], timeout_s: float = 60) -> Callable[[int], None]:
    """A rank that says its settings, meets the others, and does the body; a mistake of the user ends it with 2."""

    def work(rank: int) -> None:
        try:
            here = place(os.environ)
            config = load_config("cover-tiny", [*WORDS, *os.environ.get(f"WORDS{rank}", "").split()])
            facts = agreement.facts_of(config, here.size, os.environ.get(f"DEVICE{rank}", "cpu"))
            met = meet(here, facts, timeout_s)
            agreement.check_facts(met, config, rank)
            body(met, rank)
            time.sleep(1.0 if rank == 0 else 0.0)  # it holds the store
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            os._exit(2)

    return work


def nothing(met: Meeting, rank: int) -> None:
    assert len(met.hosts) == len(met.facts)


def run(
    folder: Path, work: Callable[[int], None], size: int = 2, **variables: str
) -> tuple[list[int | None], list[str]]:
    ranks = RankProcesses(folder, work, size, **variables)
    ranks.start()
    codes = ranks.ends(60)
    return codes, ["\n".join(ranks.said(rank)) for rank in range(size)]


@pytest.mark.slow
def test_equal_ranks_meet(tmp_path: Path) -> None:
    threads = {f"WORDS{rank}": f"loader.threads={rank + 1} data=store{rank}" for rank in range(3)}
    assert run(tmp_path, meeting_of(nothing), 3, **threads)[0] == [0, 0, 0]


def test_other_settings_are_named_with_their_values_and_ranks(tmp_path: Path) -> None:
    codes, said = run(
        tmp_path, meeting_of(nothing, 60), 3, WORDS2="optimizer.learning_rate=0.5 train.steps=7", WORDS0="train.steps=7"
    )
    assert codes == [2, 2, 2]
    for line in said:
        assert line.count("error") == 1
        assert "train.steps: 7 (rank 0 on " in line
        assert "(rank 1 on " in line
        assert "same recipe and words" in line


def test_other_versions_and_devices_are_named(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        real = agreement._version
        agreement._version = lambda name: "2.11.0" if (name, rank) == ("torch", 1) else real(name)
        meeting_of(nothing)(rank)

    codes, said = run(tmp_path, work, DEVICE1="cuda")
    assert codes == [2, 2]
    for line in said:
        assert "torch: 2.13.0" in line.replace(torch.__version__, "2.13.0")
        assert "2.11.0 (rank 1 on " in line
        assert "install the same torch everywhere" in line
        assert "device: cpu (rank 0 on " in line


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_by_those_that_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FAREWELL_S", 3.0)

    def work(rank: int) -> None:
        if rank != 1:
            meeting_of(nothing, 3)(rank)

    codes, said = run(tmp_path, work, 3)
    assert codes == [2, 0, 2]
    for rank in (0, 2):
        assert "rank 1 of 3 did not come" in said[rank]
        assert "within 3 seconds" in said[rank]
        assert (
            f"rank 0 on {socket.gethostname()}" in said[rank] or f"ranks 0, 2 on {socket.gethostname()}" in said[rank]
        )


@pytest.mark.slow
def test_a_rank_that_cannot_start_says_so_to_those_that_wait(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            decline("recipe x.yaml: no such file")
        else:
            time.sleep(7.0 if rank == 0 else 0.0)  # imports on a cold machine
            meeting_of(nothing, 60)(rank)

    codes, said = run(tmp_path, work, 3)
    assert codes == [2, 0, 2]
    assert all("rank 1 on " in said[rank] and "did not start: recipe x.yaml" in said[rank] for rank in (0, 2))


@pytest.mark.slow
def test_two_ranks_with_one_number_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "LATE_S", 1.0)  # rank 2 never comes

    def work(rank: int) -> None:
        os.environ["RANK"] = str(min(rank, 1))
        meeting_of(nothing, 5)(min(rank, 1))

    codes, said = run(tmp_path, work, 3)
    assert codes == [2, 2, 2]
    assert all("rank 1 came twice" in line and "--node_rank" in line for line in said), said


def test_wrong_addresses_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "UNKNOWN_HOST_S", 0.5)
    port = str(free_port())
    common = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for variables, said in (
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid: no such host"),
        ({}, f"nobody answers at MASTER_ADDR localhost:{port} within 1 seconds"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set, but WORLD_SIZE=2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a port"),
        ({"RANK": "two"}, "RANK='two': expected a whole number"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2: expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            meet(place(common | variables), {}, 1.0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port \d+ is in use on .* choose another"):
            meet(place(common | {"RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}), {}, 2.0)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_the_processes_of_a_bare_mpirun_do_not_each_train_alone(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=2, but WORLD_SIZE is not set"):
        place({name: "2"})
    assert place({name: "1"}).size == 1
    assert place({name: "2", "WORLD_SIZE": "1"}).size == 1


@pytest.mark.slow
def test_work_of_the_first_rank_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    def body(met: Meeting, rank: int) -> None:
        store, timeout = dist.PrefixStore("group", met.store), timedelta(seconds=3)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
        ranks = Ranks(rank, 2, rank, torch.device("cpu"), met)
        assert ranks.on_first_at_length("resting", lambda: time.sleep(4.5) or rank) == 0
        with pytest.raises(UserError, match="volume 17" if rank == 0 else "the first rank could not go on"):
            ranks.on_first_at_length("failing", fail)
        dist.barrier()

    def fail() -> None:
        raise UserError("volume 17 cannot be read")

    codes, said = run(tmp_path, meeting_of(body))
    assert codes == [0, 0], said


def test_numbers_of_ranks_are_written_short() -> None:
    assert ranges([7, 1, 2, 3, 9, 10]) == "1-3, 7, 9-10"


def test_an_output_folder_or_a_store_that_is_not_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "VISIBLE_S", 1.0)
    (tmp_path / "shared").mkdir()
    for rank in range(2):
        (tmp_path / f"own{rank}").mkdir()

    def body(met: Meeting, rank: int) -> None:
        dist.init_process_group("gloo", store=dist.PrefixStore("group", met.store), rank=rank, world_size=2)
        ranks = Ranks(rank, 2, rank, torch.device("cpu"), met)
        agreement.check_output(ranks, tmp_path / "shared")
        agreement.check_store(ranks, "a" * 64)
        for check in (
            lambda: agreement.check_output(ranks, tmp_path / f"own{rank}"),
            lambda: agreement.check_store(ranks, str(rank) * 64),
        ):
            try:
                check()
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
        dist.barrier()

    codes, said = run(tmp_path, meeting_of(body))
    assert codes == [0, 0], said
    for line in said:
        assert "that rank 1 (on " in line
        assert "all of the machines share" in line
        assert "000000000000 (rank 0 on " in line
        assert "111111111111 (rank 1 on " in line
    assert not [path for folder in ("shared", "own0", "own1") for path in (tmp_path / folder).iterdir()]


@pytest.mark.slow
def test_runs_of_two_ranks_that_differ_or_lose_one_end_with_a_line(tiny_store: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path)

    def start(words: tuple[str, str], run: Path) -> list[subprocess.Popen[str]]:
        common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()),
                               "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # fmt: skip
        return [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(path), f"data={tiny_store}", f"output={run}",
                 "train.timeout_minutes=0.5", "checkpoint.every=5", "validation.every=0", *words[rank].split()],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
                encoding="utf-8", errors="replace",
            )
            for rank in range(2)
        ]  # fmt: skip

    def said(process: subprocess.Popen[str]) -> list[str]:
        lines = process.communicate(timeout=90)[1].splitlines()
        assert not [line for line in lines if line.startswith(("Traceback", "terminate called"))], lines
        return [line for line in lines if line.startswith("error")]

    processes = start(("seed=1", "seed=2"), tmp_path / "differ")
    for process in processes:
        [line] = said(process)
        assert "seed: 1 (rank 0 on " in line
        assert process.returncode == 2
    for victim in range(2):
        processes = start(("train.steps=3000",) * 2, tmp_path / "lost")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list((tmp_path / "lost").glob("checkpoints/*.json")):
            time.sleep(0.1)
        processes[victim].kill()
        [line] = said(processes[1 - victim])
        print(line)
        assert f"rank {victim} on " in line
        assert "the same command continues" in line
        assert processes[1 - victim].returncode == 69
        processes[victim].communicate()
        shutil.rmtree(tmp_path / "lost")
