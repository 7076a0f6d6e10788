"""What must be equal on all ranks, compared at the start: a difference is refused before it costs a run."""

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .config import Config, settings_of
from .deepspeed import deepspeed_json
from .errors import UserError
from .meeting import Meeting, counted
from .ranks import Ranks

# May differ from host to host. The store is compared by the checksum of its index, the output folder by a file in it,
# the device by its kind.
PER_HOST = ("data", "output", "device", "loader.threads", "loader.prefetch", "train.threads", "deepspeed.config_file")
READ_S = 15.0  # for the others to read what differs
VISIBLE_S = 30.0  # a file written on one machine may show up late on another one of a network file system
REMEDY = {
    "settings": "start every rank with the same recipe and words",
    "data": "give every machine the same store: the checksum of its index.jsonl is compared",
    "device": "choose device=cpu, or start on machines that all have GPUs",
    "size": "start every rank with the same WORLD_SIZE",
}


def facts_of(config: Config, size: int, device: str) -> dict[str, str]:
    """What this rank says of itself at the meeting: versions, device kind, and a checksum of its settings."""
    compared = json.dumps([_compared(config), deepspeed_json(config, size)], sort_keys=True)
    return {
        "size": str(size),
        "device": device,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("voxtrast", "torch", "deepspeed")},
        "settings": hashlib.sha256(compared.encode()).hexdigest(),
    }


def check_facts(meeting: Meeting, config: Config, rank: int) -> None:
    """Refuses ranks that differ in their facts.

    Raises: UserError on every rank, with each thing that differs, its values and the hosts, and the remedy.
    """
    store, facts = meeting.store, meeting.facts
    problems, remedies = [], []
    for name in facts[0]:
        values = [each.get(name, "not said") for each in facts]
        if len(set(values)) == 1:
            continue
        remedies.append(REMEDY.get(name, f"install the same {name} everywhere"))
        if name == "settings":
            other = next(index for index, value in enumerate(values) if value != values[0])
            if rank in (0, other):
                store.set(f"settings/{rank}", json.dumps(_compared(config), sort_keys=True))
            try:
                store.wait([f"settings/{each}" for each in (0, other)])
                first, second = (json.loads(store.get(f"settings/{each}")) for each in (0, other))
                problems += _different(first, second, other, meeting.hosts)
            except dist.DistError:
                problems.append(f"settings of rank 0 and rank {other}")
        else:
            problems.append(f"{name}: {_who(values, meeting.hosts)}")
    if problems:
        _let_all_read(store, rank, len(facts))
        raise UserError(f"the ranks differ in {'; '.join(problems)}: {'; '.join(remedies)}")


def _let_all_read(store: dist.Store, rank: int, size: int) -> None:
    """The store is rank 0's: it stays until the others have read what they need, within limits."""
    with suppress(dist.DistError):
        store.set(f"read/{rank}", "")
        deadline = time.monotonic() + READ_S
        while rank == 0 and time.monotonic() < deadline:
            if store.check([f"read/{each}" for each in range(size)]):
                time.sleep(0.5)  # the answers to the last of them
                return
            time.sleep(0.1)


def check_store(ranks: Ranks, sha256: str) -> None:
    """Refuses ranks whose stores have another index."""
    values = ranks.gather(sha256)
    if len(set(values)) > 1:
        raise UserError(
            f"data: the ranks see different stores: {_who([v[:12] for v in values], ranks.hosts)}; {REMEDY['data']}"
        )


def check_output(ranks: Ranks, output: Path) -> None:
    """Refuses an output folder that is not one and the same folder for all ranks: a file of rank 0 is looked for."""
    if ranks.size == 1:
        return
    name: str = ranks.on_first(lambda: _leave_token(output))
    deadline = time.monotonic() + VISIBLE_S
    seen = _sees(output, name)
    while not seen and time.monotonic() < deadline:
        time.sleep(0.5)
        seen = _sees(output, name)
    everywhere = ranks.gather(str(seen))
    if ranks.first:
        (output / name).unlink(missing_ok=True)
    blind = [rank for rank, saw in enumerate(everywhere) if saw != "True"]
    if blind:
        hosts = ", ".join(sorted({ranks.hosts[rank] for rank in blind}))
        raise UserError(
            f"output: {output} of rank 0 is not the folder that {counted(blind)} "
            f"(on {hosts}) find under that name; choose a folder that all of the machines share"
        )


def _leave_token(output: Path) -> str:
    name = f".shared-{uuid.uuid4().hex}"
    try:
        (output / name).write_text("looked for by the other ranks\n")
    except OSError as error:
        raise UserError(
            f"output: cannot write to {output} ({error.strerror}); choose a folder that can be written"
        ) from None
    return name


def _sees(output: Path, name: str) -> bool:
    # A listing is asked for anew where a single name may be answered from a cache of names that did not exist.
    try:
        return name in os.listdir(output)
    except OSError:
        return False


def _compared(config: Config) -> dict[str, Any]:
    return {
        key: value
        for key, value in settings_of(config).items()
        if not any(key == each or key.startswith(each + ".") for each in PER_HOST) and key != "data_sha256"
    }


def _different(first: dict[str, Any], second: dict[str, Any], other: int, hosts: Sequence[str]) -> list[str]:
    keys = [key for key in sorted(set(first) | set(second)) if first.get(key) != second.get(key)]
    if not keys:
        return [f"DeepSpeed's settings file (rank 0 on {hosts[0]}, rank {other} on {hosts[other]})"]
    return [
        f"{key}: {first.get(key)} (rank 0 on {hosts[0]}), {second.get(key)} (rank {other} on {hosts[other]})"
        for key in keys
    ]


def _who(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Each value with the ranks and hosts that have it."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return ", ".join(
        f"{value} ({counted(ranks)} on {', '.join(sorted({hosts[rank] for rank in ranks}))})"
        for value, ranks in groups.items()
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
