"""One run of prepare over a store that is locked: find, digest, convert what is new, write the index.

The store is a function of RAW and the settings. Whatever happens on the way (a kill, a full disk, another number of
workers), the run that finishes leaves the same bytes: what each source becomes depends on that source alone, and all
that depends on several (ids, which of two equal files stays) is decided here, in the order of their names.
What was converted is noted in a journal as it happens, so that the next run goes on from there.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UserError
from . import store as layout
from .discovery import SUFFIXES, Series, Source, scan, sources
from .headers import COPY_AGAIN
from .rejection import Rejection
from .store import Case, StoreWriteError
from .workers import Job, WorkerPool

Digests = dict[Source, tuple[str, str | None]]  # sha256 of the volume's files, of the label's


class Preparation:
    """The state of one run; `run()` does it. Files that are rejected collect in `rejected`, results in `cases`."""

    def __init__(self, raw: Path, target: Path, settings: dict[str, Any], workers: int, progress: bool) -> None:
        self.raw, self.target, self.settings, self.workers = raw, target, settings, workers
        self.known: dict[str, Case] = {}  # by source: what the index and the journal say is in the store
        self.equal: dict[str, Case] = {}  # by source: what became the same volume as another source, and is not kept
        self.cases: list[Case] = []
        self.rejected: list[Rejection] = []
        self.prepared = self.duplicates = self.dropped = self.other_files = self.bytes = 0
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        hidden = not (progress and console.is_terminal)  # in a log file a bar is only noise
        self._bars = Progress(*columns, console=console, disable=hidden, transient=True)
        self._new: set[str] = set()  # sources converted in this run

    def run(self) -> None:
        """Raises UserError where there is nothing to prepare, StoreWriteError where the store's disk refuses."""
        self.known = _known_cases(self.target, layout.INDEX, layout.JOURNAL)
        self.equal = _known_cases(self.target, layout.DUPLICATES)
        tree = scan(self.raw, self.target)
        self.other_files = tree.other
        self.rejected += tree.rejected
        with WorkerPool(self.workers) as pool, self._bars:
            found, orphans = sources(self.raw, tree, self._series(pool, tree.dicom_files))
            self.rejected += orphans
            self._check_found(found)
            self.dropped = len(set(self.known) - {source.name for source in found})
            self._convert(pool, self._digests(pool, found))
        self._leave_out_equal_results()
        self.prepared = sum(case.source in self._new for case in self.cases)
        layout.write_index(self.target, self.cases)
        layout.write_rejected(self.target, self.rejected)
        layout.write_duplicates(self.target, self.equal.values())
        self._clean()

    def _check_found(self, found: list[Source]) -> None:
        if not found:
            first = f"; first problem: {self.rejected[0].file}: {self.rejected[0].reason}" if self.rejected else ""
            expected = f"files ending in {', '.join(SUFFIXES)}, or DICOM folders"
            others = f"{self.other_files} other files{first}"
            raise UserError(f"no volume found below {self.raw} ({others}): give a folder with {expected}")
        if self.known and not set(self.known) & {source.name for source in found}:
            message = f"none of the {len(self.known)} volumes in {self.target} comes from {self.raw}"
            raise UserError(f"{message}: give the folder that it was prepared from, or another store")

    def _perform(self, pool: WorkerPool, title: str, jobs: list[Job]) -> Iterator[tuple[int, Job]]:
        """Replies as they come, with a bar. Raises StoreWriteError at the first reply that says so."""
        bar = self._bars.add_task(title, total=len(jobs), visible=bool(jobs))
        for position, reply in pool.map(jobs):
            self._bars.advance(bar)
            if "store_error" in reply:
                raise StoreWriteError(reply["store_error"], reply["number"])
            if "died" in reply:
                reason = f"the process that read it was ended by {reply['died']}, twice"
                remedy = "most often memory ran out: use fewer workers or a machine with more memory, else remove it"
                reply = {"rejected": {"reason": reason, "remedy": remedy, "label": False}}
            yield position, reply

    def _reject(self, source: Source, reply: Job) -> None:
        reason, remedy = reply["rejected"]["reason"], reply["rejected"]["remedy"]
        if reply["rejected"]["label"] and source.label_name:
            reason = f"{reason} (a label; its image {source.name} is left out too)"
            self.rejected.append(Rejection(source.label_name, reason, remedy))
        else:
            self.rejected.append(Rejection(source.name, reason, remedy))

    def _series(self, pool: WorkerPool, dicom_files: dict[str, list[str]]) -> list[Series]:
        """The series of all folders. Where files of a folder cannot be listed, its series may lack them: rejected."""
        folders = sorted(dicom_files)
        jobs = [{"task": "series", "folder": str(self.raw / each), "names": dicom_files[each]} for each in folders]
        result = []
        for position, reply in self._perform(pool, "series", jobs):
            folder = folders[position]
            if "rejected" in reply:
                self.rejected.append(Rejection(folder, reply["rejected"]["reason"], reply["rejected"]["remedy"]))
                continue
            series, lost = reply["done"]["series"], reply["done"]["lost"]
            for name, reason in lost:
                self.rejected.append(Rejection(name if folder == "." else f"{folder}/{name}", reason, COPY_AGAIN))
            if series and lost:
                shown = lost[0][0] if len(lost) == 1 else f"{lost[0][0]} and {len(lost) - 1} more"
                reason = f"the series may be incomplete: {len(lost)} of the folder's files cannot be read ({shown})"
                remedy = "copy those files again; remove them if they are no slices, and the series is prepared"
                self.rejected.append(Rejection(folder, reason, remedy))
                continue
            for each in series:
                result.append(Series(folder, each["uid"], tuple(each["files"]), alone=len(series) == 1))
        return result

    def _digests(self, pool: WorkerPool, found: list[Source]) -> Digests:
        jobs = [{"task": "digest", "files": source.files, "label": source.label_file} for source in found]
        result: Digests = {}
        for position, reply in self._perform(pool, "checksums", jobs):
            if "rejected" in reply:
                self._reject(found[position], reply)
            else:
                result[found[position]] = reply["done"]["source"], reply["done"]["label"]
        return {source: result[source] for source in found if source in result}

    def _convert(self, pool: WorkerPool, digests: Digests) -> None:
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
            "id": source.id,
            "files": source.files,
            "dicom": source.dicom,
            "label": source.label_file,
            "store": str(self.target),
            "settings": self.settings,
        }

    def _is_stored(self, source: Source, digest: tuple[str, str | None]) -> bool:
        case = self.known.get(source.name)
        if case is None or not _same_source(case, source, digest):
            return False
        try:
            layout.check_case_files(self.target, case)
        except UserError:  # gone or cut short since: convert it again
            return False
        return True

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
    fields["label_classes"] = tuple(fields.get("label_classes", ()))
    return Case(
        id=source.id,
        source=source.name,
        source_sha256=digest[0],
        label_source=source.label_name,
        label_source_sha256=digest[1],
        **fields,
    )


def _same_source(case: Case, source: Source, digest: tuple[str, str | None]) -> bool:
    """Whether a case was made of this very volume and label, under the id that they have now."""
    names = (case.id, case.label_source) == (source.id, source.label_name)
    return names and (case.source_sha256, case.label_source_sha256) == digest


def _known_cases(target: Path, *files: str) -> dict[str, Case]:
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
