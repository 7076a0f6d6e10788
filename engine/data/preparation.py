"""One run of prepare over a store that is locked: find, digest, convert what is new, write the index.

The store is a function of RAW and the settings. Whatever happens on the way (a kill, a full disk, another number of
workers), the run that finishes leaves the same bytes: what each source becomes depends on that source alone, and all
that depends on several (ids, which of two equal files stays) is decided here, in the order of their names.
What was converted is noted in a journal as it happens, so that the next run goes on from there.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import store as layout
from .discovery import Source
from .inventory import Found, Inventory
from .progress import Progress
from .rejection import Rejection
from .store import Case, StoreWriteError
from .workers import Job, Pool

Digests = dict[Source, tuple[str, str | None]]  # sha256 of the volume's files, of the label's


@dataclass(frozen=True)
class Work:
    """Where volumes come from and what converts them. `slice` chooses sources by name, for a shard."""

    origin: str  # RAW, for messages
    inventory: Inventory
    pool: Callable[[], Pool]
    device: str = "cpu"
    memory_limit_gb: float | None = None
    slice: Callable[[str], bool] | None = None


class Preparation:
    """The state of one run; `run()` does it. Files that are rejected collect in `rejected`, results in `cases`.

    Of a shard, `target` is the shard's own store and `main` the one that it will be merged into: what is there and
    still valid is not converted again.
    """

    def __init__(
        self, work: Work, target: Path, settings: dict[str, Any], progress: bool, main: Path | None = None
    ) -> None:
        self.work, self.target, self.settings, self.main = work, target, settings, main
        self.known: dict[str, Case] = {}  # by source: what the index and the journal say is in the store
        self.equal: dict[str, Case] = {}  # by source: what became the same volume as another source, and is not kept
        self.cases: list[Case] = []
        self.rejected: list[Rejection] = []
        self.refused: dict[str, dict[str, Any]] = {}  # by source: why, as its worker said it
        self.everything = Found([], [])  # and of it, what this run is to do:
        self.found: list[Source] = []
        self.digests: Digests = {}
        self.prepared = self.duplicates = self.dropped = self.other_files = self.bytes = 0
        self._progress = Progress(progress)
        self._new: set[str] = set()  # sources converted in this run

    def run(self) -> None:
        """Raises UserError where there is nothing to prepare, StoreWriteError where the store's disk refuses."""
        self.known = known_cases(self.target, layout.INDEX, layout.JOURNAL)
        self.equal = known_cases(self.target, layout.DUPLICATES)
        with self.work.pool() as pool, self._progress:
            found = self.work.inventory(lambda title, jobs: self._perform(pool, title, jobs))
            self.everything, self.found, self.other_files = found, found.sources, found.other
            self.rejected += found.rejected
            self._check_found()
            if self.work.slice is not None:
                self.found = [source for source in self.found if self.work.slice(source.name)]
            self.dropped = len(set(self.known) - {source.name for source in self.found})
            self.digests = self._digests(pool)
            self._convert(pool, self._not_in_main())
        self._leave_out_equal_results()
        self.prepared = sum(case.source in self._new for case in self.cases)
        layout.write_index(self.target, self.cases)
        layout.write_rejected(self.target, self.rejected)
        layout.write_duplicates(self.target, self.equal.values())
        self._clean()

    def _check_found(self) -> None:
        where = self.main or self.target
        known = self.known if self.main is None else known_cases(self.main, layout.INDEX)
        if known and not set(known) & {source.name for source in self.found}:
            message = f"none of the {len(known)} volumes in {where} comes from {self.work.origin}"
            raise UserError(f"{message}: give the folder that it was prepared from, or another store")

    def _not_in_main(self) -> Digests:
        """What a shard has to look at: sources that the store it will be merged into does not have as they are now."""
        if self.main is None:
            return self.digests
        stored = known_cases(self.main, layout.INDEX)
        return {
            source: digest
            for source, digest in self.digests.items()
            if not (source.name in stored and _is_whole(stored[source.name], source, digest, self.main))
        }

    def _perform(self, pool: Pool, title: str, jobs: list[Job]) -> Iterator[tuple[int, Job]]:
        """Replies as they come, with a bar. Raises StoreWriteError at the first reply that says so."""
        for position, reply in self._progress.follow(title, len(jobs), pool.map(jobs)):
            if "store_error" in reply:
                raise StoreWriteError(reply["store_error"], reply["number"])
            if "died" in reply:
                reason = f"the process that read it was ended by {reply['died']}, twice"
                remedy = "most often memory ran out: use fewer workers or a machine with more memory, else remove it"
                reply = {"rejected": {"reason": reason, "remedy": remedy, "label": False}}
            if "late" in reply:
                reason = f"took longer than {reply['late']:g} s and was given up"
                remedy = "run again with a larger timeout_s where it is only large or its disk slow, else remove it"
                reply = {"rejected": {"reason": reason, "remedy": remedy, "label": False}}
            yield position, reply

    def _reject(self, source: Source, reply: Job) -> None:
        self.refused[source.name] = reply["rejected"]
        reason, remedy = reply["rejected"]["reason"], reply["rejected"]["remedy"]
        if reply["rejected"]["label"] and source.label_name:
            reason = f"{reason} (a label; its image {source.name} is left out too)"
            self.rejected.append(Rejection(source.label_name, reason, remedy))
        else:
            self.rejected.append(Rejection(source.name, reason, remedy))

    def _digests(self, pool: Pool) -> Digests:
        found = self.found
        jobs: list[Job] = [
            {"task": "digest", "source": source.name, "files": source.files, "label": source.label_file}
            for source in found
        ]
        result: Digests = {}
        for position, reply in self._perform(pool, "checksums", jobs):
            if "rejected" in reply:
                self._reject(found[position], reply)
            else:
                result[found[position]] = reply["done"]["source"], reply["done"]["label"]
        return {source: result[source] for source in found if source in result}

    def _convert(self, pool: Pool, digests: Digests) -> None:
        """Convert the first of each group of equal files; where it is rejected, the next one takes its place."""
        groups: dict[str, list[Source]] = {}
        for source, (digest, _) in digests.items():
            groups.setdefault(digest, []).append(source)
        waiting = list(groups.values())
        stored = [self.known[source.name] for source in digests if self._is_stored(source, digests[source])]
        kept = {case.sha256: case.source for case in reversed(stored)}  # the first by name counts
        while waiting:
            heads = [group[0] for group in waiting]
            new = [source for source in heads if not self._is_done(source, digests[source], kept)]
            self._withdraw(new)
            failed: set[Source] = set()
            with _Journal(self.target / layout.JOURNAL) as journal:
                for position, reply in self._perform(pool, "preparing", [self._job(source) for source in new]):
                    source = new[position]
                    if "rejected" in reply:
                        self._reject(source, reply)
                        failed.add(source)
                        continue
                    self.known[source.name] = case = _case(source, digests[source], reply["done"])
                    self._new.add(source.name)
                    journal.append(case.as_line())
            for group in waiting:
                if group[0] not in failed:
                    self._keep(group)
            waiting = [group[1:] for group in waiting if group[0] in failed and len(group) > 1]

    def _withdraw(self, new: list[Source]) -> None:
        """Take back what the store says of sources that are redone, before the first of their files is replaced.

        Until the new index is written there is none, so that nobody reads new volumes by old lines; what stays valid
        goes into the journal, where the next run finds it if this one is killed.
        """
        sources, ids = {source.name for source in new}, {source.id for source in new}
        old = {name: case for name, case in self.known.items() if name in sources or case.id in ids}
        if not old:
            return
        self.known = {name: case for name, case in self.known.items() if name not in old}
        layout.write_cases(self.target / layout.JOURNAL, self.known.values())
        layout.remove(self.target / layout.INDEX)
        for case in old.values():
            for folder in (layout.VOLUMES, layout.LABELS):
                layout.remove(self.target / folder / f"{case.id}.npy")

    def _job(self, source: Source) -> Job:
        return {
            "task": "convert",
            "source": source.name,
            "id": source.id,
            "files": source.files,
            "dicom": source.dicom,
            "label": source.label_file,
            "store": str(self.target),
            "settings": self.settings,
            "modality": source.modality,
            "device": self.work.device,
            "memory_limit_gb": self.work.memory_limit_gb,
        }

    def _is_stored(self, source: Source, digest: tuple[str, str | None]) -> bool:
        case = self.known.get(source.name)
        return case is not None and _is_whole(case, source, digest, self.target)

    def _is_done(self, source: Source, digest: tuple[str, str | None], kept: dict[str, str]) -> bool:
        """Whether it is in the store, or known to become the same volume as an earlier one that is."""
        if self._is_stored(source, digest):
            return True
        case = self.equal.get(source.name)
        return case is not None and _same_source(case, source, digest) and kept.get(case.sha256, "\uffff") < source.name

    def _keep(self, group: list[Source]) -> None:
        """The first of a group of equal files is in the store; report the others."""
        first = group[0]
        self.cases.append(self.known.get(first.name) or self.equal[first.name])
        for other in group[1:]:
            self._report_duplicate(other.name, other.label_name, first.name, "the same bytes as")

    def _report_duplicate(self, name: str, label: str | None, first: str, how: str) -> None:
        remedy = "nothing is lost; remove one of the two to be rid of this line"
        if label is not None:
            remedy = f"its label {label} is not used: check which one is right, then remove one of the two pairs"
        self.rejected.append(Rejection(name, f"duplicate: {how} {first}, which is in the store", remedy))
        self.duplicates += 1

    def _leave_out_equal_results(self) -> None:
        """Different files may hold the same volume (.nii and .nii.gz): the first by name stays."""
        stays: dict[str, Case] = {}
        self.equal = {}
        for case in sorted(self.cases, key=lambda case: case.source):
            first = stays.setdefault(case.sha256, case)
            if first is not case:
                self.equal[case.source] = case
                how = "once prepared, the same volume as"
                self._report_duplicate(case.source, case.label_source, first.source, how)
        self.cases = sorted(stays.values(), key=lambda case: case.id)

    def _clean(self) -> None:
        """Remove what no case of the index needs: volumes of sources that are gone, duplicates, the journal."""
        wanted = {layout.VOLUMES: {f"{case.id}.npy" for case in self.cases}}
        wanted[layout.LABELS] = {f"{case.id}.npy" for case in self.cases if case.label_sha256 is not None}
        for folder, names in wanted.items():
            for file in (self.target / folder).glob("*.npy"):
                if file.name in names:
                    self.bytes += file.stat().st_size
                else:
                    layout.remove(file)
        layout.remove(self.target / layout.JOURNAL)


def _case(source: Source, digest: tuple[str, str | None], fields: dict[str, Any]) -> Case:
    fields = {**fields, "shape": tuple(fields["shape"]), "spacing_mm": tuple(fields["spacing_mm"])}
    fields["affine"] = tuple(tuple(row) for row in fields["affine"])
    fields["foreground"] = layout.flat_places(fields["foreground"])
    fields["label_classes"] = tuple(fields.get("label_classes", ()))
    return Case(
        id=source.id,
        source=source.name,
        source_sha256=digest[0],
        label_source=source.label_name,
        label_source_sha256=digest[1],
        **fields,
    )


def _is_whole(case: Case, source: Source, digest: tuple[str, str | None], store: Path) -> bool:
    """Whether a case is that of a source as it is now, with files that are all there."""
    if not _same_source(case, source, digest):
        return False
    try:
        layout.check_case_files(store, case)
    except UserError:  # gone or cut short since: convert it again
        return False
    return True


def _same_source(case: Case, source: Source, digest: tuple[str, str | None]) -> bool:
    """Whether a case was made of this very volume and label, under the id that they have now."""
    names = (case.id, case.label_source) == (source.id, source.label_name)
    names = names and source.modality in ("", case.modality)
    return names and (case.source_sha256, case.label_source_sha256) == digest


def known_cases(target: Path, *files: str) -> dict[str, Case]:
    """Cases by source, from files of the store; the last line counts. One that cannot be read is done again."""
    result: dict[str, Case] = {}
    for name in files:
        try:
            lines = (target / name).read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                case = Case.from_line(line)
            except (ValueError, TypeError):
                continue
            result[case.source] = case
    return result


class _Journal:
    """Lines appended one by one, each on the disk before the next job's reply is looked at."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1

    def __enter__(self) -> "_Journal":
        try:
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            content = self.file.read_bytes()
            os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)  # a line cut short by a kill or a full disk
        except OSError as error:
            raise StoreWriteError.of(error, self.file) from error
        return self

    def append(self, line: str) -> None:
        data = f"{line}\n".encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise StoreWriteError.of(error, self.file) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
