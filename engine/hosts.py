"""Hostfiles: one line `NAME slots=N` for each machine, as DeepSpeed reads them, and whether ssh reaches them."""

import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from .errors import UserError

REACH_S = 10
LINE = re.compile(r"^(?P<host>[\w.:-]+)\s+slots=(?P<slots>\d+)$")


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots (ranks) of every host, in the file's order; rank 0 runs on the first.

    Args:
        path: lines `NAME slots=N`; empty lines and what follows # do not count.

    Raises: UserError naming the line: not of that form, no slots, a host twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--hostfile {path}: cannot be read ({reason}); give a file of lines NAME slots=N") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        match = LINE.match(words)
        if match is None:
            raise UserError(f"{path}, line {number}: {words!r} is not of the form NAME slots=N, as in node1 slots=8")
        host, slots = match["host"], int(match["slots"])
        if host in hosts:
            raise UserError(f"{path}, line {number}: {host} stands there twice; one line with all of its slots")
        if slots == 0:
            raise UserError(f"{path}, line {number}: {host} has no slots; give at least 1, or leave the host out")
        hosts[host] = slots
    if not hosts:
        raise UserError(f"{path}: names no host; give lines NAME slots=N")
    return hosts


def check_even(path: Path, chosen: Mapping[str, Sequence[int]]) -> None:
    """Raises: UserError where the chosen hosts of a hostfile have different numbers of slots."""
    if len({len(slots) for slots in chosen.values()}) > 1:
        listed = ", ".join(f"{host} {len(slots)}" for host, slots in chosen.items())
        raise UserError(
            f"{path}: the chosen hosts have uneven slots ({listed}), so that some GPUs idle or some machines wait; "
            f"make them equal, or say --uneven if that is meant"
        )


def chosen_hosts(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """The slots of every host that are left by --include or --exclude (`NAME:SLOT,SLOT@NAME`).

    Raises: UserError for both at once, for a host or slot that the hostfile lacks, and where nothing is left.
    """
    if include and exclude:
        raise UserError("--include and --exclude: give one of them")
    slots = {host: list(range(count)) for host, count in hosts.items()}
    option = "--include" if include else "--exclude"
    named: dict[str, list[int]] = {}
    for part in filter(None, (include or exclude).split("@")):
        host, _, listed = part.partition(":")
        if host not in hosts:
            raise UserError(f"{option} {part}: {host!r} is not in the hostfile, which has {', '.join(hosts)}")
        try:
            numbers = [int(text) for text in listed.split(",")] if listed else slots[host]
        except ValueError:
            raise UserError(f"{option} {part}: expected NAME or NAME:SLOT,SLOT, as in node1:0,1") from None
        missing = [number for number in numbers if number not in slots[host]]
        if missing:
            raise UserError(f"{option} {part}: {host} has slots 0 to {hosts[host] - 1}, not {missing[0]}")
        named.setdefault(host, []).extend(numbers)
    if include:
        left = {host: sorted(set(named[host])) for host in hosts if host in named}
    else:
        left = {host: [n for n in slots[host] if n not in named.get(host, [])] for host in hosts}
    left = {host: numbers for host, numbers in left.items() if numbers}
    if not left:
        raise UserError(f"{option} {include or exclude}: leaves no slot to run on")
    return left


def unreachable(hosts: Sequence[str], port: int | None = None) -> dict[str, str]:
    """The hosts that ssh does not reach without a password within 10 s, with what it said."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={REACH_S}", *(["-p", str(port)] if port else [])]

    def reach(host: str) -> str:
        try:
            done = subprocess.run(
                ["ssh", *options, host, "true"], capture_output=True, encoding="utf-8", errors="replace",
                timeout=2 * REACH_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            return "ssh is not installed here"
        except subprocess.TimeoutExpired:
            return f"no answer within {2 * REACH_S} s"
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return "" if done.returncode == 0 else said[-1].strip()

    with ThreadPoolExecutor(32) as pool:
        return {host: problem for host, problem in zip(hosts, pool.map(reach, hosts), strict=True) if problem}


def check_reachable(hosts: Sequence[str], port: int | None = None) -> None:
    """Raises: UserError naming each host that ssh does not reach, and why."""
    problems = unreachable(hosts, port)
    if problems:
        said = "; ".join(f"{host}: {problem}" for host, problem in problems.items())
        raise UserError(
            f"{len(problems)} of {len(hosts)} hosts cannot be reached ({said}); correct the hostfile, or let "
            f"`ssh HOST true` work without a password"
        )


def is_local(host: str) -> bool:
    """Whether a name or address is one of this machine's."""
    if host in ("localhost", socket.gethostname()):
        return True
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except socket.gaierror:
        return False
    own = {address.address for each in psutil.net_if_addrs().values() for address in each}
    return bool(found & own)
