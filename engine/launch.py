"""`voxtrast launch`: checks the machines, prints the launcher's command, runs it.

On this machine alone that is DeepSpeed's launcher of one node, without the front end, which leaves the ranks behind
when it is stopped by a signal; on several machines the front end, which starts the same on each through pdsh and ssh.
"""

import argparse
import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Config, load_config
from .errors import UserError
from .hosts import check_reachable, chosen_hosts, is_local, read_hostfile

MODULE = "voxtrast.engine.pretrain"
DEFAULT_PORT = 29500


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches pretraining on one or many machines; returns the exit code of the launcher.

    Raises: UserError before anything is started.
    """
    parsed = _parser().parse_args(arguments)
    config = load_config(parsed.recipe, [word for word in parsed.settings if not word.startswith("--")])
    for key in ("data", "output"):
        if not getattr(config, key):
            raise UserError(f"{key}: not given; say {key}={'STORE' if key == 'data' else 'RUN'}")
    command = command_for(parsed, config)
    print(shlex.join(command), flush=True)
    if parsed.dry_run:
        return 0
    return _run(command, _environment(config))


def command_for(parsed: argparse.Namespace, config: Config) -> list[str]:
    """The launcher's command, after the checks that its options ask for."""
    words = [MODULE, parsed.recipe, *parsed.settings]
    if parsed.hostfile is None:
        if parsed.include or parsed.exclude:
            raise UserError("--include and --exclude choose from a hostfile: give --hostfile FILE as well")
        slots = {"localhost": list(range(_local_slots(parsed.processes, config)))}
        return [*one_node(slots, parsed.master_addr or "127.0.0.1", parsed.master_port), *words]
    if parsed.processes:
        raise UserError("--processes: with a hostfile the ranks follow from its slots; leave one of the two out")
    hosts = read_hostfile(parsed.hostfile, uneven=parsed.uneven)
    chosen = chosen_hosts(hosts, parsed.include, parsed.exclude)
    if len(chosen) == 1 and is_local(next(iter(chosen))):
        return [*one_node(chosen, parsed.master_addr or "127.0.0.1", parsed.master_port), *words]
    if not parsed.no_ssh_check:
        check_reachable(list(chosen), parsed.ssh_port)
        if parsed.launcher == "pdsh" and shutil.which("pdsh") is None:
            raise UserError(
                "pdsh is not installed, through which DeepSpeed starts several machines; install it "
                "(apt-get install pdsh), choose --launcher openmpi or slurm, or start each machine by torchrun"
            )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={parsed.hostfile.resolve()}"]
    for name in ("include", "exclude", "master_addr", "ssh_port"):
        if getattr(parsed, name):
            command.append(f"--{name}={getattr(parsed, name)}")
    # Without --force_multi DeepSpeed starts a hostfile's only host here, whatever its name.
    command += [f"--master_port={parsed.master_port}", f"--launcher={parsed.launcher}", "--force_multi", "--module"]
    return [*command, *words]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="voxtrast launch", description="Pretrain on one or many machines. Options stand before RECIPE."
    )
    parser.add_argument("--hostfile", type=Path, help="lines NAME slots=N; without it all GPUs of this machine")
    parser.add_argument("--include", default="", metavar="NAME:SLOT,...@NAME", help="only these of the hostfile")
    parser.add_argument("--exclude", default="", metavar="NAME:SLOT,...@NAME", help="all but these of the hostfile")
    parser.add_argument("--processes", type=int, help="ranks on this machine; default one for each GPU, or one")
    parser.add_argument("--uneven", action="store_true", help="hosts may have different numbers of slots")
    parser.add_argument("--master-addr", default="", help="address of the first host, as the others see it")
    parser.add_argument("--master-port", type=int, default=DEFAULT_PORT, help="a free port there; default 29500")
    parser.add_argument("--ssh-port", type=int, help="of all hosts")
    parser.add_argument("--launcher", default="pdsh", help="DeepSpeed's: pdsh, openmpi, mpich, slurm, ...")
    parser.add_argument("--no-ssh-check", action="store_true", help="do not try the hosts before")
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    parser.add_argument("recipe", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="key=value", help="as for `voxtrast pretrain`")
    return parser


def _local_slots(processes: int | None, config: Config) -> int:
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: expected 1 or more")
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if processes and gpus and processes > gpus:
        raise UserError(f"--processes {processes}: this machine has {gpus} GPU(s), one rank for each")
    return processes or gpus or 1


def one_node(slots: dict[str, list[int]], address: str, port: int) -> list[str]:
    if address == "127.0.0.1":
        _check_port_free(port)
    world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_addr={address}",
            f"--master_port={port}", "--log_level=warning", "--module"]  # fmt: skip


def _check_port_free(port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise UserError(f"--master-port {port}: cannot be used ({error.strerror}); choose another") from None


def _environment(config: Config) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's warnings of a lost connection hide the one line
    if config.device == "cpu" or not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs it in a process group of its own: the launcher, not the terminal, passes signals on, each of them once."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
