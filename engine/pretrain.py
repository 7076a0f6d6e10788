"""The entry point of pretraining, the same for every launcher:

voxtrast pretrain RECIPE data=STORE output=RUN key=value ...
deepspeed --module voxtrast.engine.pretrain RECIPE data=STORE output=RUN key=value ...
srun python -m voxtrast.engine.pretrain RECIPE data=STORE output=RUN key=value ...
torchrun -m voxtrast.engine.pretrain RECIPE data=STORE output=RUN key=value ...
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from ..methods import Method
from .agreement import check_facts, check_output, check_store, facts_of
from .checkpoint import finished_checkpoints
from .checks import check_method
from .combinations import check_combinations
from .config import Config, differences, load_config, read_config, write_config
from .data.store import INDEX, Store, file_sha256
from .deepspeed import deepspeed_json, wrap, wrap_adversary
from .errors import UserError
from .guards import StalledError
from .meeting import decline
from .ranks import Ranks, start_processes, stop_processes
from .runs import build_method, describe, open_cases
from .signals import Clock, Interrupted
from .slurm import from_slurm
from .trainer import Trainer
from .versions import commit
from .watchdog import LOST_RANK, LostRank, Watchdog, at

REPORTED = 20  # volumes that are left out, line by line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs pretraining; returns the exit code.

    0: done; 2: a mistake of the user, or what a guard found; 69: another rank is lost; 75: out of time
    (`train.max_minutes`), to be continued; 128 + signal: stopped.
    """
    parser = argparse.ArgumentParser(prog="voxtrast pretrain", description="Pretrain a network on a store of volumes.")
    parser.add_argument("recipe", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="data=STORE output=RUN train.steps=N ...")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON merged over the generated one")
    # The launchers say the rank in the environment as well, which is where it is read.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parsed = parser.parse_intermixed_args(arguments)
    words = list(parsed.settings)
    if parsed.deepspeed_config:
        words.append(f"deepspeed.config_file={parsed.deepspeed_config}")
    try:
        os.environ.update(from_slurm(os.environ))  # an error before the start is said to the other ranks, too
        pretrain(load_config(parsed.recipe, words))
    except StalledError as error:
        print(f"error{_on_rank()}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # the interpreter would wait for the threads that hang
    except UserError as error:
        # Every rank speaks: a file may be out of reach of one machine alone.
        print(f"error{_on_rank()}: {error}", file=sys.stderr)
        if not dist.is_initialized():
            decline(str(error))
        return 2
    except LostRank as error:
        print(f"error{_on_rank()}: {error}", file=sys.stderr)
        return LOST_RANK
    except Interrupted as error:
        print(f"{error}{_on_rank()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "stopped by SIGINT at once; the same command continues from the last checkpoint, where there is one",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal.SIGINT)  # the interpreter would wait for threads that may hang
    finally:
        stop_processes()
    return 0


def pretrain(config: Config) -> None:
    """Runs or continues one run in this process, which may be one of several ranks."""
    for key in ("data", "output"):
        if not getattr(config, key):
            raise UserError(f"{key}: not given; say {key}={'STORE' if key == 'data' else 'RUN'}")
    clock = Clock(config.train.max_minutes)
    method = build_method(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    minutes = config.train.timeout_minutes
    ranks = start_processes(
        config.device,
        minutes,
        facts=lambda size, device: facts_of(config, size, device),
        check=lambda meeting, rank: check_facts(meeting, config, rank),
    )
    with _watched(ranks, minutes * 60):
        _run(config, method, ranks, clock)


def _watched(ranks: Ranks, timeout_s: float) -> AbstractContextManager[object]:
    if ranks.meeting is None:
        return nullcontext()
    met = ranks.meeting
    return Watchdog(met.second, met.store, ranks.rank, met.hosts, timeout_s, together=(Interrupted,))


def _run(config: Config, method: Method, ranks: Ranks, clock: Clock) -> None:
    check_combinations(config, device=ranks.device.type)
    deepspeed_json(config, ranks.size)
    at("opening the store")
    store, cases, aside, excluded = open_cases(config)
    config.data_sha256 = file_sha256(store.path / INDEX)
    check_store(ranks, config.data_sha256)
    at("verifying the store")
    damaged = ranks.on_first_at_length("verifying the store", lambda: _damaged(config, store))
    if aside and all(case.id in damaged for case in aside):
        if ranks.first:
            print("no volume that is held aside can be read: no validation", file=sys.stderr)
        aside = []
    if ranks.size > 1:
        method.group = dist.group.WORLD
    check_method(method, config, ranks, cases)
    ranks.on_first(lambda: _prepare_output(config))
    check_output(ranks, Path(config.output))
    if ranks.first:
        _report([reason for _, reason in excluded])
        print(
            f"{config.recipe}: {len(cases)} volumes to train on, {len(aside)} held aside, {ranks.size} rank(s) on "
            f"{ranks.device.type}, {sum(p.numel() for p in method.parameters()) / 1e6:.2f} M parameters",
            file=sys.stderr,
        )
        _note_warm_up(config, method)
        if advice := method.advice([case.shape for case in cases]):
            print(f"note: {advice}", file=sys.stderr)
    at("building the engine")
    learner, critic = wrap(method, config, ranks), wrap_adversary(method, config, ranks)
    about = describe(config, cases) | ({"commit": commit()} if ranks.first else {})
    Trainer(learner, critic, method, config, ranks, store, cases, aside, damaged, about, clock).train()


def _note_warm_up(config: Config, method: Method) -> None:
    for moment in method.schedule.moments:
        steps = moment.last - moment.first
        if config.schedule.warmup_steps >= steps:
            which = f" of stage {moment.stage.name!r}" if config.stages else ""
            print(
                f"note: the learning rate is still warming up when the steps{which} end: schedule.warmup_steps="
                f"{config.schedule.warmup_steps}, {steps} steps",
                file=sys.stderr,
            )


def _damaged(config: Config, store: Store) -> dict[str, str]:
    """The volumes to go on without, by case id; all are reported before the first step."""
    contents = config.loader.verify == "contents"
    if config.loader.on_error == "raise":
        store.verify(contents)
        return {}
    damaged = store.damaged(contents)
    _report([f"{case}: {reason}" for case, reason in damaged.items()])
    return damaged


def _report(left_out: list[str]) -> None:
    for line in left_out[:REPORTED]:
        print(f"left out: {line}", file=sys.stderr)
    if len(left_out) > REPORTED:
        print(f"left out: {len(left_out) - REPORTED} more", file=sys.stderr)


def _prepare_output(config: Config) -> None:
    run = Path(config.output)
    try:
        run.mkdir(parents=True, exist_ok=True)
        earlier = run / "config.yaml"
        # A run that was refused or stopped before its first checkpoint may begin again with other settings.
        if earlier.exists() and finished_checkpoints(run / "checkpoints"):
            if config.resume == "never":
                raise UserError(f"output: {run} holds a run already; choose another, or resume=auto to continue it")
            changed = differences(read_config(earlier), config)
            if changed:
                raise UserError(
                    f"output: {run} holds a run with other settings ({'; '.join(changed)}); "
                    f"choose another output, or give the settings that it was started with"
                )
        write_config(config, earlier)
    except OSError as error:
        raise UserError(
            f"output: cannot write to {run} ({error.strerror}); choose a folder that can be written"
        ) from None


def _on_rank() -> str:
    return f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""


if __name__ == "__main__":
    sys.exit(main())
