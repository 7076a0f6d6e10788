"""`voxtrast launch`: checks the machines, prints the launcher's command, runs it.

On this machine alone that is DeepSpeed's launcher of one node, without the front end, which leaves the ranks behind
when it is stopped by a signal; on several machines the front end, which starts the same on each through pdsh and ssh.
"""

import argparse
import base64
import errno
import json
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .config import Config, load_config
from .errors import UserError
from .hosts import check_even, check_reachable, chosen_hosts, is_local, read_hostfile
from .signals import run_child

MODULE = "voxtrast.engine.pretrain"
DEFAULT_PORT = 29500
LAST_OF_SIGNALS = 128 + 64
PASSED_UNCHANGED = re.compile(r"[\w@+=:,./\[\] -]*", re.ASCII)  # by pdsh and the shells of the other machines


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches pretraining on one or many machines; returns the exit code of the launcher.

    Raises: UserError before anything is started.
    """
    parsed = _parser().parse_args(arguments)
    config = load_config(parsed.recipe, _settings(parsed.settings))
    for key in ("data", "output"):
        if not getattr(config, key):
            raise UserError(f"{key}: not given; say {key}={'STORE' if key == 'data' else 'RUN'}")
    command = command_for(parsed, config)
    added = _added(config, os.environ)
    print(" ".join([*(f"{name}={value}" for name, value in added.items()), shlex.join(command)]), flush=True)
    return 0 if parsed.dry_run else _run(command, os.environ | added)


def command_for(parsed: argparse.Namespace, config: Config) -> list[str]:
    """The launcher's command, after the checks that its options ask for."""
    words = [MODULE, parsed.recipe, *parsed.settings]
    gpus = torch.cuda.device_count() if config.device != "cpu" else 0
    if parsed.hostfile is None:
        if parsed.include or parsed.exclude:
            raise UserError("--include and --exclude choose from a hostfile: give --hostfile FILE as well")
        slots = {"localhost": list(range(_local_slots(parsed.processes, gpus)))}
        return [*_one_node(parsed, slots, gpus), *words]
    if parsed.processes:
        raise UserError("--processes: with a hostfile the ranks follow from its slots; leave one of the two out")
    chosen = chosen_hosts(read_hostfile(parsed.hostfile), parsed.include, parsed.exclude)
    if not parsed.uneven:
        check_even(parsed.hostfile, chosen)
    if len(chosen) == 1 and is_local(next(iter(chosen))):
        return [*_one_node(parsed, chosen, gpus), *words]
    _check_passed_unchanged(words)
    if not parsed.no_ssh_check:
        check_reachable(list(chosen), parsed.ssh_port)
        if parsed.launcher == "pdsh" and shutil.which("pdsh") is None:
            raise UserError(
                "pdsh is not installed, through which DeepSpeed starts several machines; install it "
                "(apt-get install pdsh), or start the ranks by srun or torchrun"
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
    parser.add_argument("--launcher", default="pdsh", choices=["pdsh"], help="of several machines")
    parser.add_argument("--no-ssh-check", action="store_true", help="do not try the hosts before")
    parser.add_argument("--dry-run", action="store_true", help="print the command, run nothing")
    parser.add_argument("recipe", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="key=value", help="as for `voxtrast pretrain`")
    return parser


def _settings(words: Sequence[str]) -> list[str]:
    """The words of `voxtrast pretrain` as settings alone."""
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            found.append(word)
            continue
        option, equals, value = word.partition("=")
        if option != "--deepspeed_config":
            raise UserError(f"{word}: not an option of pretrain; those of launch stand before the recipe")
        if not equals and not rest:
            raise UserError("--deepspeed_config: give a file behind it")
        found.append(f"deepspeed.config_file={value if equals else rest.pop(0)}")
    return found


def _check_passed_unchanged(words: Sequence[str]) -> None:
    """DeepSpeed and pdsh hand the words to the shells of the other machines as they are."""
    for word in words:
        if not PASSED_UNCHANGED.fullmatch(word):
            raise UserError(
                f"{word!r}: a shell on the other machines would change this word; use letters, digits, spaces and "
                f"@+=:,./_-[] alone, or put the setting into the recipe"
            )
    for name, place in (("folder where you start", os.getcwd()), ("path of python", sys.executable)):
        if " " in place or not PASSED_UNCHANGED.fullmatch(place):
            raise UserError(
                f"{place!r}: a shell on the other machines would change this {name}; use one of letters, digits and "
                f"@+=:,./_- alone"
            )


def _local_slots(processes: int | None, gpus: int) -> int:
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: expected 1 or more")
    if processes and gpus and processes > gpus:
        raise UserError(f"--processes {processes}: this machine has {gpus} GPU(s), one rank for each")
    return processes or gpus or 1


def _one_node(parsed: argparse.Namespace, slots: dict[str, list[int]], gpus: int) -> list[str]:
    address = parsed.master_addr or "127.0.0.1"
    if address == "127.0.0.1" and not parsed.dry_run:
        _check_port_free(parsed.master_port)
    return one_node(slots, address, parsed.master_port, gpus)


def one_node(slots: dict[str, list[int]], address: str, port: int, gpus: int) -> list[str]:
    """The command that starts the ranks of this machine.

    Args:
        slots: of this machine's name alone.
        address, port: where rank 0 listens.
        gpus: that torch sees here; 0 where the ranks compute on the CPU.
    """
    named = {host: _device_names(numbers, gpus, os.environ) for host, numbers in slots.items()}
    world = base64.urlsafe_b64encode(json.dumps(named).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_addr={address}",
            f"--master_port={port}", "--log_level=warning", "--module"]  # fmt: skip


def _device_names(slots: list[int], gpus: int, environment: Mapping[str, str]) -> list[int] | list[str]:
    """What DeepSpeed's launcher writes into CUDA_VISIBLE_DEVICES: what stands there now is what slots count."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if not gpus or listed is None:
        return slots
    visible = [name.strip() for name in listed.split(",")][:gpus]
    beyond = [slot for slot in slots if slot >= len(visible)]
    if beyond:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={listed}: shows {len(visible)} GPU(s), so that there is no slot {beyond[0]}; show "
            f"more, or take fewer slots"
        )
    return [visible[slot] for slot in slots]


def _check_port_free(port: int) -> None:
    try:
        with _probe() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not from 1 to 65535"
        raise UserError(f"--master-port {port}: cannot be used ({reason}); choose another") from None


def _probe() -> socket.socket:
    try:
        return socket.socket(socket.AF_INET6)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return socket.socket(socket.AF_INET)  # a kernel without IPv6


def _added(config: Config, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the launcher is given beside those of this process."""
    added = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch's warnings of a lost connection hide the one line
    if config.device == "cpu" or not torch.cuda.is_available():
        added["DS_ACCELERATOR"] = "cpu"
    return {name: value for name, value in added.items() if name not in environment}


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Its exit code, or 128 + signal where a signal ended it or one of its ranks."""
    code = run_child(command, environment)
    if code > LAST_OF_SIGNALS:
        code -= 256  # DeepSpeed's launcher ends with the negative number that Python has for a rank's signal
    return code if code >= 0 else 128 - code
