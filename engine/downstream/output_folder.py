"""The folder of predictions: what each label file in it was made of, so that a later run knows what it may keep."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.discovery import SUFFIXES, Source
from ..data.reading import FileGrid, write_label
from ..data.store import REJECTED
from ..errors import UserError
from .labelled import SCORES

RECORD = "predict.jsonl"  # one line a label, written before the label is put in place; the last of a file counts
LOCK = ".predict.lock"


class OutputFolder:
    """Labels of images, each with a record of the model, the settings and the image that it was made of.

    Args:
        path: made where it does not exist.
        settings: of this run; JSON values.
        files: target of each image, by the image's id.
        sources: of the images.
        force: whether labels of another model, other settings, another image or unknown origin are replaced.

    Raises: UserError where the folder cannot be written, or holds what would be replaced.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        files: Mapping[str, Path],
        sources: Mapping[str, Source],
        force: bool,
    ) -> None:
        self.path, self.settings, self.files, self.sources = path, settings, files, sources
        records = self._records()
        self.present = set()
        self._replaced: list[Path] = []
        for id, file in files.items():
            if not file.exists():
                continue
            said = None if force else self._objection(file, records.get(file.name), self._record(id))
            if said:
                raise UserError(said)
            if force:
                self._replaced.append(file)
            else:
                self.present.add(id)
        if not records and not force:
            for foreign in (path / SCORES, path / REJECTED):
                if foreign.exists():
                    raise UserError(_unknown(foreign))
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / RECORD).touch()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder") from error

    def _objection(self, file: Path, known: dict[str, Any] | None, wanted: dict[str, Any]) -> str | None:
        """Why a label that is there is not that of this run."""
        if known is None:
            return _unknown(file)
        changed = [name for name, value in wanted.items() if known.get(name) != value]
        if not changed:
            return None
        what = ", ".join("image" if name == "image_sha256" else name for name in changed)
        return f"{file}: was made with another {what}; give another folder, or --force to replace it"

    def write(self, id: str, values: np.ndarray, grid: FileGrid) -> None:
        """Puts a label in its place, whole or not at all. Raises: UserError."""
        file = self.files[id]
        suffix = next(each for each in SUFFIXES if file.name.endswith(each))
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial{suffix}")
        try:
            write_label(partial, values, grid)
            with open(partial, "rb") as stream:
                os.fsync(stream.fileno())
            with open(self.path / RECORD, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(self._record(id)) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
            raise UserError(f"{file}: cannot be written ({reason}); free space or name another folder") from error
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """What is replaced goes now. Raises: UserError where another run writes into the folder."""
        with open(self.path / LOCK, "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"{self.path}: another `voxtrast predict` writes into it; wait for its end") from None
            scores = [self.path / SCORES] if self._replaced else []  # of the labels that go
            for file in (*self._replaced, *scores, self.path / REJECTED, *self.path.glob(".*.partial.*")):
                file.unlink(missing_ok=True)
            yield

    def _record(self, id: str) -> dict[str, Any]:
        return {"file": self.files[id].name, **self.settings, "image_sha256": _fingerprint(self.sources[id])}

    def _records(self) -> dict[str, dict[str, Any]]:
        try:
            texts = (self.path / RECORD).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        found = {}
        for text in texts:
            try:
                line = json.loads(text)
                found[line["file"]] = line
            except (ValueError, KeyError, TypeError):
                continue  # cut off: its label was not put in place
        return found


def _unknown(file: Path) -> str:
    return f"{file} exists and is not known to be of `voxtrast predict`; give another folder, or --force to replace it"


def _fingerprint(source: Source) -> str:
    """Of the names, sizes and times of an image's files: their contents would be read twice."""
    state = []
    for file in sorted(source.files):
        try:
            status = os.stat(file)
        except OSError:
            continue  # it is refused by name when it is read
        state.append((os.path.basename(file), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()
