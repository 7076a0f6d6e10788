"""How the ranks of a run find each other: a store at MASTER_ADDR:MASTER_PORT, a roll call, one timeout."""

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .errors import UserError

UNKNOWN_HOST_S = 60.0  # a name that no server knows for so long is wrong, not late
LOOKS_S = 0.2  # between two looks at who has come
FAREWELL_S = 1.0  # the store stays for so long after a failure, for the others to read it
LATE_S = 60.0  # and so long for those that start late: the first import of a cold machine takes a while
DECLINE_S = 60.0  # to reach the others, for the same reason


@dataclass(frozen=True)
class Place:
    """What a launcher says of this process; `served` where the launcher itself holds the store, as torchrun does."""

    rank: int
    size: int
    address: str
    port: int
    served: bool
    attempt: str = "0"

    @property
    def where(self) -> str:
        return f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Meeting:
    """Who has come, and two connections to the store of the run: a call may block one for long."""

    store: dist.Store
    second: dist.Store
    hosts: tuple[str, ...]  # of every rank
    facts: tuple[dict[str, str], ...]  # what every rank said of itself


def place(environment: Mapping[str, str]) -> Place:
    """Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises: UserError naming the variable that is missing or wrong, and for the processes of a bare mpirun.
    """
    size = _number(environment, "WORLD_SIZE", "1")
    rank = _number(environment, "RANK", "0")
    if not 0 <= rank < max(size, 1):
        raise UserError(f"RANK={rank} of WORLD_SIZE={size}: expected 0 to {size - 1}; start through one launcher")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "WORLD_SIZE" not in environment and _number(environment, name, "1") > 1:
            raise UserError(
                f"{name}={environment[name]}, but WORLD_SIZE is not set: mpirun alone does not say to torch who a "
                f"process is; start through voxtrast launch, torchrun or srun"
            )
    if size <= 1:
        return Place(0, 1, "", 0, False)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(
                f"{name}: not set, but WORLD_SIZE={size}; start through deepspeed, torchrun or srun, or set it to "
                f"{'the address of the machine of rank 0' if name == 'MASTER_ADDR' else 'a free port there'}"
            )
    port = _number(environment, "MASTER_PORT", "")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535")
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(rank, size, environment["MASTER_ADDR"], port, served, attempt)


def meet(place: Place, facts: dict[str, str], timeout_s: float) -> Meeting:
    """Waits until all ranks have come.

    Args:
        place: of this process; more than one rank.
        facts: what this rank says of itself to the others.
        timeout_s: how long to wait for the last of them.

    Raises: UserError within the timeout where the address is wrong, the port is in use, a rank comes twice, or ranks
        are missing: their numbers, and the hosts of those that came.
    """
    deadline = time.monotonic() + timeout_s
    store, second = (
        dist.PrefixStore(f"attempt {place.attempt}", each) for each in _connect(place, deadline, timeout_s)
    )
    came = store.add(f"count/{place.rank}", 1)
    host = socket.gethostname()
    if came > 1:
        _fail(place, store, f"rank {place.rank} came twice to {place.where}, once more from {host}: two machines have "
              f"the same --node_rank, or two runs the same MASTER_PORT; give each its own")  # fmt: skip
    store.set(f"came/{place.rank}", json.dumps({"host": host, "facts": facts}))
    keys = [f"came/{rank}" for rank in range(place.size)]
    try:
        while True:
            everyone = store.check(keys)
            if store.check(["failed"]):  # said before that rank's own key: who sees all keys sees this
                line = store.get("failed").decode()
                _stay(place, store, keys)
                raise UserError(line)
            if everyone:
                break
            if time.monotonic() > deadline:
                _fail(place, store, _missing(place, store, keys, timeout_s))
            time.sleep(LOOKS_S)
        said = [json.loads(content) for content in store.multi_get(keys)]
    except dist.DistError:
        raise UserError(
            f"the store at {place.where} went away before all ranks had come: rank 0 has ended; see what it said"
        ) from None
    return Meeting(store, second, tuple(each["host"] for each in said), tuple(each["facts"] for each in said))


def decline(line: str, environment: Mapping[str, str] = os.environ) -> None:
    """Says to the others, who may be waiting, that this rank will not come, and why. Silent where that fails."""
    with suppress(UserError, dist.DistError, RuntimeError):
        here = place(environment)
        if here.size > 1:
            first, _ = _connect(here, time.monotonic() + DECLINE_S, DECLINE_S)
            store = dist.PrefixStore(f"attempt {here.attempt}", first)
            store.set("failed", f"rank {here.rank} on {socket.gethostname()} did not start: {line}")
            store.set(f"came/{here.rank}", "declined")
            _stay(here, store, [f"came/{rank}" for rank in range(here.size)])


def _connect(place: Place, deadline: float, timeout_s: float) -> tuple[dist.Store, dist.Store]:
    timeout = timedelta(seconds=timeout_s)
    address, hosting = place.address, place.rank == 0 and not place.served
    try:
        if hosting:
            # Its own store it reaches without the address, which may be one that the network translates.
            address = "localhost"
            first = dist.TCPStore(address, place.port, None, True, timeout, wait_for_workers=False)
        else:
            _wait_for_port(place, deadline, timeout_s)
            first = dist.TCPStore(address, place.port, None, False, timeout, wait_for_workers=False)
        return first, dist.TCPStore(address, place.port, None, False, timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:  # torch has raised different ones over time
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if hosting and ("EADDRINUSE" in str(error) or "in use" in str(error)):
            raise UserError(
                f"port {place.port} is in use on {socket.gethostname()}, where rank 0 runs; choose another "
                f"(--master_port of the launcher, or MASTER_PORT)"
            ) from None
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT {place.where}: what answers there is no store of a run ({first_line}); "
            f"choose another port"
        ) from None


def _wait_for_port(place: Place, deadline: float, timeout_s: float) -> None:
    """Returns once somebody listens there; a plain socket tells an unknown name from a closed port."""
    unknown_until = min(deadline, time.monotonic() + UNKNOWN_HOST_S)
    while True:
        try:
            left = max(0.5, min(10.0, deadline - time.monotonic()))
            socket.create_connection((place.address, place.port), timeout=left).close()
            return
        except socket.gaierror:
            if time.monotonic() > unknown_until:
                raise UserError(
                    f"MASTER_ADDR={place.address}: no such host, asked from {socket.gethostname()}; give the name or "
                    f"address of the machine of rank 0 (--master_addr of the launcher)"
                ) from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"nobody answers at MASTER_ADDR {place.where} within {minutes(timeout_s)} ({error}), asked by rank "
                    f"{place.rank} on {socket.gethostname()}: rank 0 has not started or ended, the address is not its "
                    f"own, or a firewall closes the port"
                ) from None
        time.sleep(LOOKS_S)


def _missing(place: Place, store: dist.Store, keys: list[str], timeout_s: float) -> str:
    here: dict[str, list[int]] = {}
    missing = []
    for rank, key in enumerate(keys):
        if store.check([key]):
            here.setdefault(json.loads(store.get(key))["host"], []).append(rank)
        else:
            missing.append(rank)
    came = ", ".join(f"{counted(numbers)} on {host}" for host, numbers in here.items())
    return (
        f"{counted(missing)} of {place.size} did not come to {place.where} within {minutes(timeout_s)} (came: {came}); "
        f"see what they said on their machines, or raise train.timeout_minutes"
    )


def _fail(place: Place, store: dist.Store, line: str) -> None:
    with suppress(dist.DistError):
        store.set("failed", line)
        if place.rank == 0:
            time.sleep(FAREWELL_S)
    raise UserError(line)


def _stay(place: Place, store: dist.Store, keys: list[str]) -> None:
    """Rank 0 holds the store until the others have come and read in it, within limits."""
    if place.rank == 0 and not place.served:
        deadline = time.monotonic() + LATE_S
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(LOOKS_S)
        time.sleep(FAREWELL_S)


def free_port() -> int:
    """A port that nobody uses now, on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def ranges(numbers: list[int]) -> str:
    """1, 2, 3 and 7 as `1-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def counted(numbers: list[int]) -> str:
    """Numbers of ranks as `rank 1` or `ranks 1-3`."""
    return f"rank{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:g} minutes"


def _number(environment: Mapping[str, str], name: str, otherwise: str) -> int:
    text: Any = environment.get(name, otherwise)
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name}={text!r}: expected a whole number; start through deepspeed, torchrun or srun"
        ) from None
