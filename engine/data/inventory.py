"""What is to be prepared, from a tree of files: the walk, and the series of its DICOM folders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .discovery import SUFFIXES, Series, Source, Tree, scan, sources
from .headers import COPY_AGAIN
from .rejection import Rejection
from .workers import Job

Perform = Callable[[str, list[Job]], Iterator[tuple[int, Job]]]  # title, jobs -> (position, reply)


@dataclass
class Found:
    """Sources sorted by name; what is refused already; how many files are of other kinds."""

    sources: list[Source]
    rejected: list[Rejection]
    other: int = 0


Inventory = Callable[[Perform], Found]


def of_tree(raw: Path, store: Path) -> Inventory:
    """The volumes below `raw`, apart from `store`. Raises UserError, when called, where there is none."""

    def find(perform: Perform) -> Found:
        tree = scan(raw, store)
        series, rejected = _series(raw, tree, perform)
        found, orphans = sources(raw, tree, series)
        rejected = [*tree.rejected, *rejected, *orphans]
        if not found:
            first = f"; first problem: {rejected[0].file}: {rejected[0].reason}" if rejected else ""
            expected = f"files ending in {', '.join(SUFFIXES)}, or DICOM folders"
            others = f"{tree.other} other files{first}"
            raise UserError(f"no volume found below {raw} ({others}): give a folder with {expected}")
        return Found(found, rejected, tree.other)

    return find


def _series(raw: Path, tree: Tree, perform: Perform) -> tuple[list[Series], list[Rejection]]:
    """The series of all folders. Where files of a folder cannot be listed, its series may lack them: rejected."""
    folders = sorted(tree.dicom_files)
    jobs: list[Job] = [
        {"task": "series", "folder": str(raw / folder), "names": tree.dicom_files[folder]} for folder in folders
    ]
    result, rejected = [], []
    for position, reply in perform("series", jobs):
        folder = folders[position]
        if "rejected" in reply:
            rejected.append(Rejection(folder, reply["rejected"]["reason"], reply["rejected"]["remedy"]))
            continue
        series, lost = reply["done"]["series"], reply["done"]["lost"]
        for name, reason in lost:
            rejected.append(Rejection(name if folder == "." else f"{folder}/{name}", reason, COPY_AGAIN))
        if series and lost:
            shown = lost[0][0] if len(lost) == 1 else f"{lost[0][0]} and {len(lost) - 1} more"
            reason = f"the series may be incomplete: {len(lost)} of the folder's files cannot be read ({shown})"
            remedy = "copy those files again; remove them if they are no slices, and the series is prepared"
            rejected.append(Rejection(folder, reason, remedy))
            continue
        for each in series:
            result.append(Series(folder, each["uid"], tuple(each["files"]), alone=len(series) == 1))
    return result, rejected
