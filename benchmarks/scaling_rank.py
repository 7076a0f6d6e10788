"""One rank of `voxtrast bench scaling`; a launcher starts it. The first rank writes what was measured as JSON."""

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from voxtrast.engine.checks import check_method
from voxtrast.engine.config import Config, load_config
from voxtrast.engine.deepspeed import wrap, wrap_adversary
from voxtrast.engine.monitor import Monitor
from voxtrast.engine.ranks import start_processes, stop_processes
from voxtrast.engine.runs import build_method, open_cases
from voxtrast.engine.trainer import Trainer
from voxtrast.methods import Batch, Method

from .place import Place
from .train import Clock, Form

PARTS = ("data", "forward", "backward", "optimizer", "communication", "rest")
WARM_UP = 3  # steps that are not counted: first allocations, and what is compiled at first use
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce_scatter", "broadcast",
    "all_gather_object", "broadcast_object_list", "reduce", "barrier",
)  # fmt: skip


class Parts(Clock):
    """Seconds in each part of a step of the engine."""

    parts = PARTS

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            before = self.enter(part)
            try:
                found = work(*arguments, **options)
                if part == "communication" and isinstance(found, dist.Work):
                    found.wait()  # overlap with computing is not counted in its favour
                return found
            finally:
                self.enter(before)

        return run


@contextlib.contextmanager
def communication_timed(clock: Parts) -> Iterator[None]:
    """While this lasts, collectives count as communication, wherever they are called; one inside another once."""
    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, clock.timed("communication", getattr(dist, name))))
        yield


def engine_of(config: Config, method: Method, place: Place) -> tuple[Trainer, Parts]:
    """The trainer that `voxtrast pretrain` would have, its parts timed."""
    ranks = start_processes(config.device)
    store, cases, aside, _ = open_cases(config)
    if ranks.size > 1:
        method.group = dist.group.WORLD
    check_method(method, config, ranks, cases)
    learner, critic = wrap(method, config, ranks), wrap_adversary(method, config, ranks)
    clock = Parts(place)
    for each in (learner, critic):
        if each is not None:
            each.engine.forward = clock.timed("forward", each.engine.forward)
            each.engine.backward = clock.timed("backward", each.engine.backward)
            each.engine.step = clock.timed("optimizer", each.engine.step)
    return Trainer(learner, critic, method, config, ranks, store, cases, aside, {}, {}), clock


def measure(config: Config, steps: int, synthetic: bool, bare: bool) -> dict[str, Any]:
    """Medians over the steps, and memory; of a bare loop of torch in turns with the engine, too, where asked for."""
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    place = Place(torch.device("cuda" if on_gpu else "cpu"), torch.float32)
    method = build_method(config)
    form = Form("ours", copy.deepcopy(method), config, place) if bare else None
    trainer, clock = engine_of(config, method, place)
    moment = method.schedule.moments[-1]
    batch_size = method.schedule.batch(moment.first, config.train.global_batch)
    for each in trainer.learners:
        each.set_micro_batch(batch_size // (trainer.ranks.size * config.train.accumulation))
    taken: list[dict[str, float]] = []
    with (
        trainer.pipeline(trainer.cases, moment.first, "train", config.train.accumulation, batch_size) as views,
        Monitor(trainer.run, trainer.ranks, 0, steps) as monitor,
        communication_timed(clock),
    ):
        source: Iterator[list[Batch]] = itertools.repeat(next(iter(views))) if synthetic else iter(views)
        for step in range(moment.first, moment.first + steps + WARM_UP):
            clock.start("data")
            batches = [dict(batch) for batch in next(source)]
            clock.enter("rest")
            for_bare = [dict(batch) for batch in batches]
            numbers, _ = trainer.step(batches, step, moment)
            monitor.step(step + 1, numbers | {"samples_per_second": 0.0, "data_wait": 0.0, "memory_mb": 0.0}, {})
            clock.enter(None)
            taken.append(dict(clock.seconds))
            if form is not None:
                form.step(for_bare[0], step, 0.0)
    counted = taken[WARM_UP:]
    memory = torch.tensor(psutil.Process().memory_info().rss / 1e6, dtype=torch.float64)
    found: dict[str, Any] = {
        "batch": batch_size,
        "crop": list(config.views.crop),
        "median_s": statistics.median(sum(each.values()) for each in counted),
        "parts_s": {part: statistics.median(each[part] for each in counted) for part in PARTS},
        "memory_mb": trainer.ranks.mean(memory).item(),
    }
    found["samples_a_second"] = batch_size / found["median_s"]
    if form is not None:
        found["bare_s"] = statistics.median(sum(each.values()) - each["data"] for each in form.taken[WARM_UP:])
        found["engine_s"] = statistics.median(sum(each.values()) - each["data"] for each in counted)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--local_rank", "--local-rank")
    chosen = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as run:
        try:
            config = load_config(chosen.recipe, [*chosen.settings, f"output={run}"])
            if config.train.threads:
                torch.set_num_threads(config.train.threads)
            found = measure(config, chosen.steps, chosen.synthetic, chosen.bare)
            if not dist.is_initialized() or dist.get_rank() == 0:
                chosen.result.write_text(json.dumps(found))
        finally:
            stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
