"""Dice against the number of labels: every method, a masked autoencoder and training from scratch, on real volumes.

voxtrast bench label-efficiency --data FOLDER --into FOLDER [--output FILE] [--hours H] [--workers N] [--tasks A,B]
                                [--transductive] [--plan FILE] [--device auto]
voxtrast bench label-efficiency --table FILE... [--plot PICTURE]

FOLDER of --data holds the data sets that the plan (`label_efficiency.yaml`) names, each with images/ and labels/.
Stores, pretrained weights and models go to --into. One line a finished run is appended to --output, and what has its
line there is not run again: the command may be stopped at any moment, and goes on where it was. Runs are in an order
that keeps arms, tasks and seeds in balance. The test cases of a task are held aside from pretraining as well;
--transductive lets pretraining see their images, and the lines say so.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from voxtrast.engine.config import load_config
from voxtrast.engine.data.prepare import prepare
from voxtrast.engine.data.splits import fraction_for, held_aside
from voxtrast.engine.data.store import Case, Store
from voxtrast.engine.errors import UserError
from voxtrast.engine.weights import RUN_WEIGHTS, load_weights

from .harness import append
from .label_plan import Job, Plan, Task, pretraining, read_plan, setting
from .label_results import KEY, of_plan, plot, read, tables
from .machine import machine, results_file
from .place import Place

Line = dict[str, Any]
POLL_S = 0.5


@dataclass
class Bench:
    """Where everything of one benchmark is."""

    plan: Plan
    plan_file: Path | None
    into: Path
    file: Path  # of the lines
    transductive: bool
    device: str
    workers: int
    stores: dict[str, Store] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.workers)

    def run_folder(self, job: Job) -> Path:
        """Of a pretraining. Another setting is another run."""
        return self.into / "pretrain" / f"{job.task}-{job.arm}-{pretraining(self.plan, job, self.transductive)}"

    def weights(self, job: Job) -> Path:
        return self.run_folder(job.needs or job) / RUN_WEIGHTS

    def is_done(self, job: Job, lines: set[tuple[Any, ...]]) -> bool:
        return self.is_pretrained(job) if job.kind == "pretrain" else self.key(job) in lines

    def is_pretrained(self, job: Job) -> bool:
        """Whether it took all of its steps: a run that was cut off has weights as well."""
        if not self.weights(job).is_file():
            return False
        steps = load_config(f"{job.arm}-tiny", self.plan.words(self.plan.tasks[job.task], job.arm)).train.steps
        return bool(load_weights(self.weights(job))[1]["step"] == steps)

    def key(self, job: Job) -> tuple[Any, ...]:
        return (job.kind, job.task, job.arm, job.labels, job.seed, setting(self.plan, job, self.transductive))

    def done(self) -> set[tuple[Any, ...]]:
        lines = read([self.file]) if self.file.is_file() else []
        return {tuple(line[name] for name in KEY) for line in lines}

    def command(self, job: Job, result: Path) -> list[str]:
        if job.kind != "pretrain":
            about: dict[str, Any] = {
                "job": vars(job),
                "plan": self.plan_file and str(self.plan_file),
                "result": str(result),
            }
            about |= {"store": str(self.stores[job.task].path), "device": self.device, "threads": self.threads}
            about |= {"pretrained": str(self.run_folder(job.needs)) if job.needs else None}
            return [sys.executable, "-m", "voxtrast.benchmarks.label_job", json.dumps(about)]
        task = self.plan.tasks[job.task]
        store = self.stores[job.task]
        fraction = 0.0 if self.transductive else fraction_for(store.cases, task.test_cases)
        words = [f"data={store.path}", f"output={self.run_folder(job)}", f"validation.fraction={fraction}"]
        words += [f"device={self.device}", *self.plan.words(task, job.arm)]
        return [sys.executable, "-m", "voxtrast.engine.pretrain", f"{job.arm}-tiny", *words]


def prepare_stores(bench: Bench, data: Path, tasks: Sequence[str]) -> None:
    """A store for each task, made anew or found complete, whose test cases no other case repeats."""
    for name in tasks:
        task = bench.plan.tasks[name]
        raw, folder = data / task.data, bench.into / "stores" / name
        if not raw.is_dir():
            raise UserError(f"{raw}: no such folder; --data FOLDER holds the data sets that the plan names")
        summary = prepare(raw, folder, spacing_mm=task.spacing_mm, progress=False)
        if summary.exit_code:
            raise UserError(f"{folder}: some of {raw} could not be prepared; see {folder / 'rejected.jsonl'}")
        bench.stores[name] = Store(folder)
        check_task(task, bench.stores[name])


def check_task(task: Task, store: Store) -> None:
    """Raises: UserError where a test case is among the others as well, by its content, or the classes are others."""
    kept, aside = held_aside(store.cases, count=task.test_cases)
    contents: dict[str, Case] = {case.sha256: case for case in kept}
    for case in aside:
        if case.sha256 in contents:
            raise UserError(
                f"{task.name}: the test case {case.id} holds the same image as {contents[case.sha256].id}, which is "
                f"trained on; remove one of the two from {task.data}"
            )
    found = sorted({value for case in store.cases for value in case.label_classes})
    if found != sorted(task.classes):
        raise UserError(f"{task.name}: the plan names the classes {sorted(task.classes)}, the labels hold {found}")


def run(bench: Bench, jobs: Sequence[Job], hours: float) -> list[Job]:
    """Runs what has no line yet, `workers` at a time, until all is done or the time is up; gives those that failed.

    Raises: UserError where another process does the same in the same folder.
    """
    deadline = time.monotonic() + 3600 * hours
    done = bench.done()
    waiting = [job for job in jobs if not bench.is_done(job, done)]
    pretrained = {job for job in jobs if job.kind == "pretrain"} - set(waiting)
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", file=sys.stderr)
    failed: list[Job] = []
    with _alone(bench.into) as lock, tempfile.TemporaryDirectory() as folder, _processes() as running:
        while waiting or running:
            for job in list(running):
                if running[job].poll() is not None:
                    process = running.pop(job)
                    _finish(bench, job, process.returncode, _result(folder, job), failed)
                    pretrained |= {job} - set(failed)
            waiting = [job for job in waiting if job not in failed and job.needs not in failed]
            ready = [job for job in waiting if job.needs is None or job.needs in pretrained]
            late = time.monotonic() > deadline
            if late and not running:
                break
            if ready and not late and len(running) < bench.workers:
                job = ready[0]
                waiting.remove(job)
                running[job] = _start(bench, job, Path(folder), lock)
                continue
            time.sleep(POLL_S)
    return failed


def _result(folder: str | Path, job: Job) -> Path:
    return Path(folder) / f"{job.kind}-{job.task}-{job.arm}-{job.labels}-{job.seed}.json"


def _start(bench: Bench, job: Job, folder: Path, lock: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads), "OMP_WAIT_POLICY": "passive"}
    log = bench.into / "logs"
    log.mkdir(parents=True, exist_ok=True)
    with (log / f"{_result('', job).stem}.txt").open("ab") as said:
        # It holds the lock as well: should this process be killed, nobody else begins until it has ended.
        return subprocess.Popen(
            bench.command(job, _result(folder, job)),
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
            pass_fds=(lock,),
        )


def _finish(bench: Bench, job: Job, code: int, result: Path, failed: list[Job]) -> None:
    if code or not (bench.is_pretrained(job) if job.kind == "pretrain" else result.is_file()):
        log = bench.into / "logs" / f"{_result('', job).stem}.txt"
        last = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()][-1:]
        print(f"{job}: failed with exit code {code}: {' '.join(last)} ({log})", file=sys.stderr)
        failed.append(job)
        return
    said = ""
    if job.kind != "pretrain":
        line = json.loads(result.read_text(encoding="utf-8"))
        line |= {"setting": setting(bench.plan, job, bench.transductive), "transductive": bench.transductive}
        append([line], bench.file)
        said = f": Dice {line['dice']['mean']:.3f}" if "dice" in line else ""
    print(f"{job}{said}", file=sys.stderr)


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """The descriptor of the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: in use by another run of this benchmark; wait for it or stop it") from None
        yield lock.fileno()


@contextmanager
def _processes() -> Iterator[dict[Job, subprocess.Popen[bytes]]]:
    """The runs under way; none outlives this one, however it ends. A pretraining saves, and goes on the next time."""
    running: dict[Job, subprocess.Popen[bytes]] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running.values():
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="voxtrast bench label-efficiency", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the data sets; default: $VOXTRAST_DATA")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="of stores, weights and logs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="of the lines (default: INTO/results.jsonl)")
    parser.add_argument("--hours", type=float, default=24.0, help="after which no further run begins (default: 24)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--tasks", metavar="A,B", help="some of the plan's")
    parser.add_argument("--transductive", action="store_true", help="pretraining sees the test images as well")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="in place of the one that comes with the package")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print the tables of these lines")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw Dice against labels")
    chosen = parser.parse_args(arguments)
    try:
        plan = read_plan(chosen.plan)
        if chosen.table:
            lines, failed = read(chosen.table), []
        else:
            bench, jobs = _set_up(chosen, plan)
            failed = run(bench, jobs, chosen.hours)
            lines = read([bench.file]) if bench.file.is_file() else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = of_plan(lines, plan)
    print(tables(lines))
    if chosen.plot:
        plot(lines, chosen.plot)
    return 1 if failed else 0


def _set_up(chosen: argparse.Namespace, plan: Plan) -> tuple[Bench, list[Job]]:
    data = chosen.data or (Path(os.environ["VOXTRAST_DATA"]) if "VOXTRAST_DATA" in os.environ else None)
    if data is None or chosen.into is None:
        raise UserError("--data and --into: expected the folder of the data sets, and one for stores and weights")
    if chosen.workers < 1 or chosen.hours <= 0:
        raise UserError(f"--workers {chosen.workers}, --hours {chosen.hours}: expected positive numbers")
    tasks = chosen.tasks.split(",") if chosen.tasks else list(plan.tasks)
    for name in tasks:
        if name not in plan.tasks:
            raise UserError(f"--tasks: {name} is not in the plan, which has {', '.join(plan.tasks)}")
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    file = (
        results_file(chosen.output, machine(Place(torch.device(device), torch.float32))["device"])
        if chosen.output
        else chosen.into / "results.jsonl"
    )
    bench = Bench(plan, chosen.plan, chosen.into.resolve(), file, chosen.transductive, device, chosen.workers)
    prepare_stores(bench, data, tasks)
    return bench, [job for job in plan.jobs() if job.task in tasks]


if __name__ == "__main__":
    sys.exit(main())
