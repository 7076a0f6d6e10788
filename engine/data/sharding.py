"""Slices of a job array: each prepares a part of RAW into a store of its own below STORE, and one merge at the end.

    STORE/shards/2-of-8/    a whole store: index.jsonl, volumes/, its own journal and lock, and part.jsonl at the end
    STORE/shards/2-of-8/part.jsonl   what the shard found and what became of it, a source a line

Shards share no file that two of them write, so nothing depends on locks or on fresh listings of a network disk. The
merge is its own step, given by the user once the array has ended: a shard cannot tell that it is the last, as listings
lag behind on network disks, while the queue of a cluster knows. It is the ordinary run once more over a pool that has
all the answers: it renames the volumes, so that ids, duplicates, refusals and resuming are decided by the same lines.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import store as layout
from .discovery import Source
from .inventory import Found, Perform
from .preparation import Preparation, known_cases
from .rejection import Rejection
from .store import Case, StoreWriteError
from .workers import Job, Pool

SHARDS, PART = "shards", "part.jsonl"


@dataclass(frozen=True)
class Shard:
    """Number `number` of `count`, from 1. The hash of a source's name says where it belongs, whatever else there is."""

    number: int
    count: int

    @staticmethod
    def parse(text: str) -> "Shard":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"shard is {text!r}, expected i/n with i from 1 to n: for example 1/8")
        return Shard(int(match[1]), int(match[2]))

    @property
    def folder(self) -> str:
        return f"{self.number}-of-{self.count}"

    def has(self, name: str) -> bool:
        return int(hashlib.sha256(os.fsencode(name)).hexdigest(), 16) % self.count == self.number - 1


def shard_folders(store: Path) -> list[Path]:
    return sorted(each for each in (store / SHARDS).glob("*-of-*") if each.is_dir())


def shard_store(store: Path, shard: Shard) -> Path:
    """The shard's own store; refuses where shards of another number are not merged yet."""
    if strange := [each.name for each in shard_folders(store) if not each.name.endswith(f"-of-{shard.count}")]:
        remedy = f"merge them first (prepare --merge {store}), or delete {store / SHARDS}"
        raise UserError(f"{store / SHARDS} holds {strange[0]}, not a shard of {shard.count}: {remedy}")
    return store / SHARDS / shard.folder


def refuse_parts(store: Path) -> None:
    if (store / SHARDS).exists():
        remedy = f"merge them (prepare --merge {store}), or delete {store / SHARDS}"
        raise UserError(f"{store / SHARDS} holds shards that are not merged: {remedy}")


def write_part(done: Preparation, shard: Shard) -> None:
    """What the merge needs of a shard that has ended."""
    everything = done.everything  # all shards find the same, before each takes its slice
    listing = [[source.name, source.id, source.label_name] for source in everything.sources]
    header = {
        **asdict(shard),
        "found": len(listing),
        "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        "other_files": everything.other,
        "rejected": [each.as_dict() for each in sorted(set(everything.rejected))],
    }
    lines = [header]
    for source in done.found:
        about = {"name": source.name, "id": source.id, "label_name": source.label_name, "modality": source.modality}
        lines.append({**about, "digest": done.digests.get(source), "refused": done.refused.get(source.name)})
    layout.write_lines(done.target / PART, [json.dumps(line) for line in lines])


@dataclass
class Parts:
    """All shards of a store, ended and of one mind about what there is."""

    settings: dict[str, Any]
    sources: dict[str, Source] = field(default_factory=dict)
    digests: dict[str, list[str | None]] = field(default_factory=dict)  # by source
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: dict[str, tuple[Case, Path]] = field(default_factory=dict)  # with the shard's store
    equal: dict[str, Case] = field(default_factory=dict)  # became the same volume as an earlier case of their shard
    rejected: list[Rejection] = field(default_factory=list)
    other: int = 0

    def find(self, _: Perform) -> Found:
        return Found([self.sources[name] for name in sorted(self.sources)], self.rejected, self.other)


def read_parts(store: Path) -> Parts:
    """Raises UserError where a shard is missing, has not ended, or saw other files or settings than the others."""
    folders = shard_folders(store)
    if not folders:
        remedy = "run `voxtrast prepare RAW STORE --shard i/n` for every i first"
        raise UserError(f"{store} holds no shards (no folder {SHARDS} in it): {remedy}")
    count = int(folders[0].name.rpartition("-")[2])
    wanted = [Shard(number, count) for number in range(1, count + 1)]
    if missing := [shard for shard in wanted if not (store / SHARDS / shard.folder / PART).is_file()]:
        names = ", ".join(f"{shard.number}/{count}" for shard in missing[:20])
        raise UserError(f"{len(missing)} of {count} shards have not ended ({names}): run them (again), then merge")
    parts: Parts | None = None
    first: dict[str, Any] = {}
    for shard in wanted:
        folder = store / SHARDS / shard.folder
        settings = layout.read_settings(folder)
        if settings is None:
            raise UserError(f"{folder} has lost its settings: run shard {shard.number}/{count} again, then merge")
        header, lines = _read_part(folder / PART)
        if parts is None:
            parts, first = Parts(settings, other=header["other_files"]), header
        if settings != parts.settings:
            keys = [key for key in sorted({*settings, *parts.settings}) if settings.get(key) != parts.settings.get(key)]
            raise UserError(f"shards 1 and {shard.number} differ in {', '.join(keys)}: run one of them again")
        if header["listing_sha256"] != first["listing_sha256"]:
            saw = f"shard 1 saw {first['found']} volumes, shard {shard.number} saw {header['found']}"
            raise UserError(f"{saw}, or others: RAW changed meanwhile; run all shards again (what is done stays done)")
        _take_in(parts, folder, header, lines)
    assert parts is not None
    return parts


def _read_part(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return lines[0], lines[1:]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{file} cannot be read ({error}): run that shard again") from None


def _take_in(parts: Parts, folder: Path, header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    parts.rejected += [Rejection(**each) for each in header["rejected"]]
    for line in lines:
        name = line["name"]
        parts.sources[name] = Source(line["id"], name, (), False, line["label_name"], None, line["modality"])
        if line["digest"] is not None:
            parts.digests[name] = line["digest"]
        if line["refused"] is not None:
            parts.refused[name] = line["refused"]
    for name, case in known_cases(folder, layout.INDEX).items():
        parts.cases[name] = case, folder
    parts.equal |= known_cases(folder, layout.DUPLICATES)


class RecordedPool(Pool):
    """Answers from the shards. A volume that is asked for is moved into the store."""

    def __init__(self, parts: Parts, store: Path) -> None:
        self.parts, self.store = parts, store

    def batch(self, jobs: list[tuple[int, Job]]) -> Iterator[tuple[int, Job]]:
        answer: dict[str, Callable[[str], Job]] = {"digest": self._digest, "convert": self._convert}
        for position, job in jobs:
            yield position, answer[job["task"]](job["source"])

    def _digest(self, name: str) -> Job:
        if name in self.parts.digests:
            source, label = self.parts.digests[name]
            return {"done": {"source": source, "label": label}}
        return {"rejected": self.parts.refused[name]}

    def _convert(self, name: str) -> Job:
        if name in self.parts.refused:
            return {"rejected": self.parts.refused[name]}
        if name in self.parts.cases:
            case, folder = self.parts.cases[name]
            try:
                self._move(case, folder)
            except OSError as error:
                failed = StoreWriteError.of(error, self.store)
                return {"store_error": failed.detail, "number": failed.number}
            layout.check_case_files(self.store, case)
        elif name in self.parts.equal:  # the earlier one is kept, or one that is earlier still
            case = self.parts.equal[name]
        else:
            raise UserError(f"no shard holds {name} any more: run all shards again (what is done stays done)")
        fields = case.as_dict()
        for key in ("id", "source", "source_sha256", "label_source", "label_source_sha256"):
            del fields[key]
        return {"done": fields}

    def _move(self, case: Case, folder: Path) -> None:
        """Renamed, not copied. What is gone already was moved by a merge that was ended half-way."""
        kinds = (layout.VOLUMES, layout.LABELS) if case.label_sha256 is not None else (layout.VOLUMES,)
        for kind in kinds:
            file = folder / kind / f"{case.id}.npy"
            if file.exists():
                os.replace(file, self.store / kind / file.name)
                layout.flush_folder(self.store / kind)


def retire_parts(store: Path) -> None:
    """After the merge. Shards half removed would look like shards half done: with this name they are leftovers."""
    try:
        os.replace(store / SHARDS, store / f".{SHARDS}.tmp")
    except OSError as error:
        raise StoreWriteError.of(error, store / SHARDS) from error
