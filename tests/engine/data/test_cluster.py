"""On a Dask cluster: the same store, whatever happens to its workers; and what is missing there is said at once."""

import asyncio
import gc
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from voxtrast.engine.data import cluster, workers
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError

distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers, all in this process; the jobs run in processes of their own."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options, host="127.0.0.1", protocol="tcp") as running:
        yield running.scheduler_address


def test_a_cluster_makes_the_store_of_the_local_pool(
    address: str, tmp_path: Path, write: Callable, run: Callable, contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write(tmp_path / f"raw/images/{number}.nii.gz", number)
    write(tmp_path / "raw/labels/1.nii.gz", np.ones((20, 22, 24), np.uint8))
    (tmp_path / "raw/images/bad.nii.gz").touch()
    run(tmp_path / "raw", tmp_path / "local")
    monkeypatch.chdir(tmp_path)  # relative paths are those of this process
    summary = run("raw", "store", scheduler=address)
    assert (summary.prepared, summary.rejected) == (4, 1)
    assert contents(tmp_path / "store") == contents(tmp_path / "local")
    assert run("raw", "store", scheduler=address).unchanged == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_a_worker_lacks_is_said_before_anything_is_done(
    address: str, tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    monkeypatch.setattr(Path, "write_text", lambda self, text: None)  # the token does not reach the workers
    with pytest.raises(UserError, match=r"Dask worker tcp://\S+: it does not see the store .*/store: put the store on"):
        run(tmp_path / "raw", tmp_path / "store", scheduler=address)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"Dask worker tcp://\S+: device is 'cuda', and cupy cannot be imported"):
        run(tmp_path / "raw", tmp_path / "store", scheduler=address, device="cuda")


def test_a_worker_names_what_it_lacks(tmp_path: Path) -> None:
    token = tmp_path / "store/.token-1.tmp"
    token.parent.mkdir()
    assert "it has voxtrast" in cluster.missing_here("0.0.7", str(token), str(tmp_path), "cpu")
    own = cluster.version("voxtrast")
    assert "does not see the store" in cluster.missing_here(own, str(token), str(tmp_path), "cpu")
    token.write_text("of another store")
    assert "does not see the store" in cluster.missing_here(own, str(token), str(tmp_path), "cpu")
    token.write_text(token.name)
    assert "does not see" in cluster.missing_here(own, str(token), str(tmp_path / "raw"), "cpu")
    assert cluster.missing_here(own, str(token), str(tmp_path), "cpu") == ""
    job = {"task": "digest", "source": "a", "files": [str(tmp_path / "a.nii")], "label": None}
    reply = cluster.perform_there(job, None, (own, str(tmp_path / "gone/.token.tmp"), str(tmp_path), "cpu"))
    assert "does not see the store" in reply["missing"]


def test_no_scheduler_and_no_worker_are_errors(
    tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    with pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9 .*: give the address"):
        run(tmp_path / "raw", tmp_path / "store", scheduler="tcp://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no Dask scheduler answers at nonsense://x"):
        run(tmp_path / "raw", tmp_path / "store", scheduler="nonsense://x")
    options = {"n_workers": 0, "processes": False, "dashboard_address": ":0", "host": "127.0.0.1", "protocol": "tcp"}
    with (
        distributed.LocalCluster(**options) as empty,
        pytest.raises(UserError, match="has no workers: start some with `dask worker tcp"),
    ):
        run(tmp_path / "raw", tmp_path / "store", scheduler=empty.scheduler_address)


@pytest.fixture
def ignored(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Errors of finalizers, which Python prints and passes over."""
    found: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: found.append(about.exc_value))
    return found


@pytest.fixture
def silent_port() -> Iterator[int]:
    """As the dashboard's: it takes the connection, and waits for words of its own language."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_what_is_no_scheduler_is_named_in_time_and_leaves_no_traces(
    address: str, tmp_path: Path, write: Callable, run: Callable, silent_port: int, ignored: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(tmp_path / "raw/a.nii.gz", 1)
    monkeypatch.setattr(cluster, "CONNECT_S", 1.0)
    with distributed.Client(address, set_as_default=False) as client:
        worker = next(iter(client.scheduler_info()["workers"]))
    for place, words in (
        (
            f"tcp://127.0.0.1:{silent_port}",
            r"something listens at \S+, and it is no Dask scheduler \(the dashboard\?\)",
        ),
        (worker, "a Dask worker listens at .*, not a scheduler: give the address"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers"),
        ("nonsense://x", "no Dask scheduler answers"),
        ("tls://127.0.0.1:9", "no Dask scheduler answers .*TLS"),
    ):
        began = time.monotonic()
        with pytest.raises(UserError, match=words):
            run(tmp_path / "raw", tmp_path / "store", scheduler=place)
        assert time.monotonic() - began < 3
    gc.collect()
    assert not ignored


def test_a_client_is_made_within_an_event_loop_too(
    address: str, tmp_path: Path, write: Callable, run: Callable
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)

    async def notebook() -> int:
        return run(tmp_path / "raw", tmp_path / "store", scheduler=address).prepared

    assert asyncio.run(notebook()) == 1


def test_without_distributed_the_extra_is_named(
    tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"distributed is not installed: install voxtrast\[dask\]"):
        run(tmp_path / "raw", tmp_path / "store", scheduler="tcp://127.0.0.1:9")


def test_no_job_outlives_its_run(
    address: str, tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One job ends the run, by saying that the disk is full, while another is in the middle of its work."""
    for number, name in enumerate(("full", "slow", "slower")):
        write(tmp_path / f"raw/{name}.nii.gz", number)
    mark = tmp_path / "mark"
    program = (
        "import os, time; from voxtrast.engine.data import conversion, workers\n"
        f"mark = {str(mark)!r}\n"
        "def perform(job):\n"
        "    if job['task'] != 'convert': return conversion.perform(job)\n"
        "    if job['id'].startswith('slow'):\n"
        "        with open(mark, 'a') as stream: stream.write(f'{os.getpid()}\\n')\n"
        "        time.sleep(600)\n"
        "    while not os.path.exists(mark): time.sleep(0.01)\n"
        "    return {'store_error': 'no space', 'number': 28}\n"
        "workers.serve(perform)\n"
    )
    monkeypatch.setattr(workers, "PROGRAM", program)
    with pytest.raises(UserError, match="cannot write to the store: no space"):
        run(tmp_path / "raw", tmp_path / "store", scheduler=address)
    assert not [number for number in mark.read_text(encoding="utf-8").split() if Path(f"/proc/{number}").exists()]
    time.sleep(0.5)  # for the other job, had it been started in place of the one that was ended
    assert len(mark.read_text(encoding="utf-8").split()) == 1
    monkeypatch.undo()
    assert run(tmp_path / "raw", tmp_path / "store", scheduler=address).prepared == 3, "the Dask workers are free"


def test_the_processes_of_a_run_that_was_killed_end_before_the_next_begins(
    address: str, tmp_path: Path, write: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw/a.nii.gz", 1)
    left = {name: workers.Worker() for name in ("store", "other")}
    for name, worker in left.items():
        worker.perform({"task": "digest", "source": "a", "files": [str(tmp_path / "raw/a.nii.gz")], "label": None})
        monkeypatch.setitem(cluster._workers, str(tmp_path / name / ".token-1.tmp"), {1: worker})
    processes = {name: worker.process for name, worker in left.items()}
    batch, at_work = cluster.ClusterPool.batch, []

    def look(self: object, jobs: list) -> Iterator:
        at_work.append({name for name, process in processes.items() if process.poll() is None})
        return batch(self, jobs)

    monkeypatch.setattr(cluster.ClusterPool, "batch", look)
    assert run(tmp_path / "raw", tmp_path / "store", scheduler=address).prepared == 1
    assert at_work[0] == {"other"}
    left["other"].end()


def test_a_process_that_is_closed_while_it_starts_performs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    program = (
        "import sys, time\n"
        f"open({str(mark)!r}, 'w').close(); time.sleep(0.2); print('ready', flush=True)\n"
        f"for line in sys.stdin: open({str(mark)!r}, 'w').write('performed'); print('{{}}', flush=True)\n"
    )
    monkeypatch.setattr(workers, "PROGRAM", program)
    worker, replies = workers.Worker(), []
    thread = threading.Thread(target=lambda: replies.append(worker.perform({"task": "convert"})))
    thread.start()
    while not mark.exists():
        time.sleep(0.01)
    worker.close()
    thread.join()
    assert replies == [{"died": "the end of its run"}]
    assert (worker.process, mark.read_text(encoding="utf-8")) == (None, "")
    assert worker.perform({"task": "convert"}) == replies[0]


class Task:
    """As Dask's future of a job whose worker is lost with the reply: it was done, is lost, and is done again."""

    def __init__(self) -> None:
        self.states = iter(("lost", "finished"))

    def add_done_callback(self, call: Callable) -> None:
        self.status = next(self.states)
        call(self)

    def result(self) -> dict:
        assert self.status == "finished"
        return {"done": 1}


def test_a_reply_lost_with_its_worker_is_waited_for_again(tmp_path: Path) -> None:
    pool = cluster.ClusterPool("tcp://nowhere:1", tmp_path, tmp_path, "cpu", None)
    pool._client = SimpleNamespace(submit=lambda *call, **options: Task())
    assert list(pool.map([{"task": "digest"}, {"task": "digest"}])) == [(0, {"done": 1}), (1, {"done": 1})]


class Killer(threading.Thread):
    """Kills a process once a run has noted so many volumes, and looks whether the run was in the middle then."""

    def __init__(self, victim: int, store: Path, after: int) -> None:
        super().__init__(daemon=True)
        self.victim, self.store, self.after = victim, store, after
        self.start()

    def run(self) -> None:
        journal = self.store / "journal.jsonl"
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= self.after):
            time.sleep(0.01)
        os.kill(self.victim, signal.SIGKILL)
        self.at_work = {"journal": journal.exists(), "index": (self.store / "index.jsonl").exists()}


@pytest.mark.slow
def test_a_dask_worker_killed_in_the_middle_costs_nothing(
    tmp_path: Path,
    write: Callable,
    run: Callable,
    contents: Callable,
    values: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(12):
        write(tmp_path / f"raw/{number:02d}.nii.gz", values(number, (90, 90, 90)), (0.9, 0.9, 0.9))
    run(tmp_path / "raw", tmp_path / "local", workers=2)
    store = tmp_path / "store"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as running:
        killer = Killer(running.workers[0].pid, store, after=2)
        monkeypatch.chdir(tmp_path)  # the workers stay where they are
        summary = run("raw", "store", scheduler=running.scheduler_address)
        killer.join()
    assert killer.at_work == {"journal": True, "index": False}
    assert (summary.prepared, summary.exit_code) == (12, 0)
    assert contents(store) == contents(tmp_path / "local")


@pytest.mark.slow
def test_real_volumes_are_the_same_by_pool_by_cluster_and_by_shards(
    real_volumes: Path, tmp_path: Path, run: Callable, contents: Callable
) -> None:
    """All folders; a worker of the cluster is killed when a third of the volumes is done."""
    from voxtrast.engine.data.prepare import merge

    raw, settings = tmp_path / "raw", {"minimum_size_voxels": 8, "workers": 2}
    raw.mkdir()
    folders = [folder for folder in real_volumes.iterdir() if folder.is_dir()]
    for folder in folders:
        (raw / folder.name).symlink_to(folder.resolve())
    whole = run(raw, tmp_path / "pool", **settings)
    assert whole.prepared > 200
    assert {case.source.split("/")[0] for case in Store(tmp_path / "pool").cases} == {each.name for each in folders}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as running:
        killer = Killer(running.workers[1].pid, tmp_path / "cluster", after=whole.prepared // 3)
        run(raw, tmp_path / "cluster", **settings, scheduler=running.scheduler_address)
        killer.join()
    assert killer.at_work == {"journal": True, "index": False}
    for number in (1, 2):
        run(raw, tmp_path / "shards", **settings, shard=f"{number}/2")
    merge(tmp_path / "shards", progress=False)
    assert contents(tmp_path / "cluster") == contents(tmp_path / "pool")
    assert contents(tmp_path / "shards") == contents(tmp_path / "pool")
    Store(tmp_path / "shards").verify(contents=True)
    shutil.rmtree(tmp_path)
