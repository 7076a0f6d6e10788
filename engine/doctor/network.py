"""Whether the hosts of a hostfile reach each other: ssh, then a sum over their ranks through the launcher."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ..hosts import is_local, read_hostfile, unreachable
from ..launch import one_node
from ..meeting import free_port
from ..signals import run_within
from .finding import BROKEN, GOOD, NOTE, Finding

MODULE = "voxtrast.engine.doctor.sum_over_ranks"
LONGEST_S = 180


def check_hosts(hostfile: Path) -> Iterator[Finding]:
    hosts = read_hostfile(hostfile)
    listed = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
    if len(set(hosts.values())) > 1:
        yield Finding("network", "hostfile", NOTE, f"uneven slots: {listed}", "`voxtrast launch` asks for --uneven")
    else:
        yield Finding("network", "hostfile", GOOD, listed)
    here = len(hosts) == 1 and is_local(next(iter(hosts)))
    if not here:
        problems = unreachable(list(hosts))
        for host in hosts:
            if host in problems:
                yield Finding("network", host, BROKEN, problems[host], f"let `ssh {host} true` work without a password")
            else:
                yield Finding("network", host, GOOD, "ssh without a password")
        if problems:
            return
        if shutil.which("pdsh") is None:
            yield Finding("network", "pdsh", BROKEN, "not installed", "apt-get install pdsh, or use srun or torchrun")
            return
    yield _sum(hosts, hostfile, here)


def _sum(hosts: dict[str, int], hostfile: Path, here: bool) -> Finding:
    if here:
        slots = {host: list(range(count)) for host, count in hosts.items()}
        command = [*one_node(slots, "127.0.0.1", free_port(), torch.cuda.device_count()), MODULE]
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile.resolve()}",
                   "--force_multi", "--module", MODULE]  # fmt: skip
    try:
        done = run_within(LONGEST_S, command)
    except subprocess.TimeoutExpired:
        remedy = "open the ports between the hosts; set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME (docs/cluster.md)"
        return Finding("network", "sum over ranks", BROKEN, f"no end within {LONGEST_S} s", remedy)
    lines = done.stdout.splitlines()
    found = next((line for line in lines if "sum over" in line), "")
    if done.returncode == 0 and found:
        return Finding("network", "sum over ranks", GOOD, found)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [f"exit code {done.returncode}"]
    return Finding("network", "sum over ranks", BROKEN, errors[0], "docs/cluster.md says what to do with each message")
