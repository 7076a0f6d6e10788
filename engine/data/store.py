"""The store: one `.npy` per volume plus an index, written by prepare and read by everything else.

    STORE/store.json        settings of prepare, written once
    STORE/index.jsonl       one case a line, sorted by id
    STORE/rejected.jsonl    one rejected file a line, sorted by file
    STORE/duplicates.jsonl  as the index, for sources left out because they become the volume of another; often absent
    STORE/volumes/ID.npy    (D, H, W) float16 or float32, C order
    STORE/labels/ID.npy     (D, H, W) uint8, uint16 where a class is above 255

Nothing in it depends on the time, the machine's name or the number of workers: equal input gives equal bytes, with the
same versions of the libraries and the same kind of processor (on another one matrix products round differently).
"""

import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import secrets
import shutil
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from .rejection import Rejection

FORMAT = 1
SETTINGS, INDEX, REJECTED, JOURNAL = "store.json", "index.jsonl", "rejected.jsonl", "journal.jsonl"
DUPLICATES = "duplicates.jsonl"
VOLUMES, LABELS = "volumes", "labels"
READERS = 16  # files that are looked at together: a network disk takes its time for each
REDO = "delete that file and run the same `voxtrast prepare` again"


_PARSER = threading.Lock()

# What a network disk says when it is away for a moment. A file that is damaged or forbidden says something else.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ENETDOWN, errno.ENETUNREACH,
             errno.ENETRESET, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
             errno.ENOTCONN, errno.EREMOTEIO, errno.ENOMEM}  # fmt: skip


class StoreReadError(UserError):
    """The system refused to read a file of the store; `number` as in errno."""

    def __init__(self, file: Path, error: OSError) -> None:
        super().__init__(f"{file} cannot be read ({error.strerror or error}): see to the disk and its permissions")
        self.number = error.errno or 0


@dataclass(frozen=True)
class Case:
    """One volume of the store.

    Voxel index (d, h, w) increases toward superior, anterior, right; `affine` takes (d, h, w, 1) to (x, y, z, 1) in
    RAS millimetres. `intensity` describes the stored values: background (their minimum, what padding takes), low and
    high (0.5 and 99.5 percentile), mean, std.
    """

    id: str
    shape: tuple[int, int, int]  # voxels (D, H, W)
    spacing_mm: tuple[float, float, float]  # (D, H, W)
    affine: tuple[tuple[float, float, float, float], ...]  # 4 x 4
    modality: str  # "ct" or "mr"
    dtype: str  # "float16" or "float32"
    intensity: dict[str, float]
    source: str  # path relative to RAW; FOLDER#HASH for one of several DICOM series in a folder
    source_sha256: str
    sha256: str  # of volumes/ID.npy
    label_sha256: str | None = None  # of labels/ID.npy
    label_dtype: str | None = None  # "uint8" or "uint16"
    label_classes: tuple[int, ...] = ()  # values in the stored label, without the background 0
    label_source: str | None = None  # path relative to RAW
    label_source_sha256: str | None = None
    # Voxels that show something, d, h, w, d, h, w, ...; flat, as a hundred thousand cases have six million of them.
    # None in stores of before.
    foreground: "array[int]" = field(default_factory=lambda: array("i"))

    @property
    def places(self) -> list[list[int]]:
        """The voxels (d, h, w) of `foreground`."""
        flat = self.foreground.tolist()
        return [flat[start : start + 3] for start in range(0, len(flat), 3)]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"foreground": self.places}

    def as_line(self) -> str:
        return json.dumps(self.as_dict(), allow_nan=False)

    @staticmethod
    def from_line(line: str) -> "Case":
        """Read a line of the index; raises ValueError or TypeError saying what is wrong with it."""
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        known = {each.name for each in fields(Case)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown field {unknown[0]!r}")
        for name in ("shape", "spacing_mm", "label_classes"):
            values[name] = tuple(values[name]) if name in values else ()
        values["affine"] = tuple(tuple(row) for row in values.get("affine", ()))
        values["foreground"] = flat_places(values.get("foreground", ()))
        case = Case(**values)
        if len(case.shape) != 3 or len(case.spacing_mm) != 3 or [len(row) for row in case.affine] != [4] * 4:
            raise ValueError("shape, spacing_mm or affine has the wrong length")
        return case


class Store:
    """A finished store, opened for reading.

    Raises UserError where there is no store, no index (prepare did not finish), or a line that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        settings = read_settings(self.path)
        if settings is None:
            raise UserError(f"{self.path} is not a store (no {SETTINGS} in it): run `voxtrast prepare RAW {self.path}`")
        self.settings = settings
        self.cases = self._read_index()

    def _read_index(self) -> list[Case]:
        index = self.path / INDEX
        try:
            lines = index.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            message = f"{index} is missing: prepare did not finish; run the same `voxtrast prepare` again"
            raise UserError(message) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{index} cannot be read ({error}): run the same `voxtrast prepare` again") from None
        cases = []
        for number, line in enumerate(lines, 1):
            try:
                cases.append(Case.from_line(line))
            except (ValueError, TypeError) as error:
                message = f"{index}, line {number}, cannot be read ({error}): run the same `voxtrast prepare` again"
                raise UserError(message) from None
        return sorted(cases, key=lambda case: case.id)

    def volume(self, case: Case) -> np.memmap:
        """The stored volume, (D, H, W), read-only and memory-mapped. Raises UserError where the file does not fit."""
        return self._map(self.path / VOLUMES / f"{case.id}.npy", case.shape, case.dtype)

    def label(self, case: Case) -> np.memmap:
        """The stored label, (D, H, W) on the volume's grid, read-only. Raises UserError where the case has none."""
        if case.label_dtype is None:
            remedy = "put labels beside the images and prepare again"
            raise UserError(f"case {case.id} of {self.path} has no label: {remedy}")
        return self._map(self.path / LABELS / f"{case.id}.npy", case.shape, case.label_dtype)

    def _map(self, file: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
        with open_array(file, shape, dtype) as stream:  # one opening for check and map: a file may vanish in between
            return np.memmap(stream, dtype, mode="r", offset=stream.tell(), shape=shape)

    def damaged(self, contents: bool) -> dict[str, str]:
        """As `verify`, of the volumes alone and all of them: case id -> what is wrong with its file."""

        def complaint(case: Case) -> str | None:
            file, dtype, expected = case_files(self.path, case)[0]
            try:
                check_file(file, case.shape, dtype, expected if contents else None)
            except UserError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(READERS) as readers:
            complaints = readers.map(complaint, self.cases, chunksize=1)
            return {case.id: each for case, each in zip(self.cases, complaints, strict=True) if each is not None}

    def verify(self, contents: bool) -> None:
        """Check that the files are those that the index describes.

        Sizes always; the sha256 of every file where `contents` is true (reads the whole store).
        Raises UserError naming the first file that is missing or changed.
        """
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(lambda case: check_case_files(self.path, case, contents), self.cases):
                pass


def flat_places(places: Iterable[Sequence[int]]) -> "array[int]":
    """The field `foreground` of a case. Raises ValueError or TypeError for anything but rows of three whole numbers."""
    rows = list(places)
    flat = array("i", itertools.chain.from_iterable(rows))
    if len(flat) != 3 * len(rows):
        raise ValueError("foreground has a row that is not of three numbers")
    return flat


def check_case_files(store: Path, case: Case, contents: bool = False) -> None:
    """Raise UserError unless the files of a case are there with the right size and, if asked for, the right bytes."""
    for file, dtype, expected in case_files(store, case):
        check_file(file, case.shape, dtype, expected if contents else None)


def case_files(store: Path, case: Case) -> list[tuple[Path, str, str]]:
    """File, dtype and sha256 of a case's volume and, where it has one, of its label."""
    files = [(store / VOLUMES / f"{case.id}.npy", case.dtype, case.sha256)]
    if case.label_dtype is not None and case.label_sha256 is not None:
        files.append((store / LABELS / f"{case.id}.npy", case.label_dtype, case.label_sha256))
    return files


def check_file(file: Path, shape: tuple[int, ...], dtype: str, sha256: str | None = None) -> None:
    """Raise UserError unless a file is there with the right size and, if given, the right bytes."""
    with open_array(file, shape, dtype):
        pass  # opening checks
    try:
        found = sha256 and file_sha256(file)
    except OSError as error:
        raise StoreReadError(file, error) from None
    if found != sha256:
        short = f"sha256 {str(found)[:12]}, index {str(sha256)[:12]}"
        raise UserError(f"{file} changed since the index was written ({short}): {REDO}")


@contextlib.contextmanager
def open_array(file: Path, shape: tuple[int, ...], dtype: str) -> Iterator[BinaryIO]:
    """A stored `.npy`, open and standing at its first value.

    Raises: UserError unless it is C-ordered, of that shape and dtype, with exactly the bytes that it needs.
    """
    try:
        with open(file, "rb") as stream:
            found_shape, fortran, found_dtype = _read_header(stream, shape, dtype)
            size, needed = os.fstat(stream.fileno()).st_size, stream.tell() + found_dtype.itemsize * int(np.prod(shape))
            if found_shape != shape or found_dtype != np.dtype(dtype) or fortran:
                raise UserError(f"{file} holds {found_dtype} {found_shape}, the index says {dtype} {shape}: {REDO}")
            if size != needed:
                raise UserError(f"{file} has {size} bytes, its header asks for {needed}: {REDO}")
            yield stream
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file} is missing though the index lists it: run the same `voxtrast prepare` again") from None
    except OSError as error:
        raise StoreReadError(file, error) from None
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({error}): {REDO}") from None


def _read_header(stream: BinaryIO, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    expected = _header(shape, dtype)
    if stream.read(len(expected)) == expected:
        return shape, False, np.dtype(dtype)
    stream.seek(0)
    # numpy reads a header with Python's parser, which in CPython 3.11 now and then fails with a SystemError where two
    # threads are in it.
    with _PARSER:
        np.lib.format.read_magic(stream)
        return np.lib.format.read_array_header_1_0(stream)


@functools.lru_cache(maxsize=4096)
def _header(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def file_sha256(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises OSError."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_settings(store: Path) -> dict[str, Any] | None:
    """The settings in store.json, or None where there is none. Raises UserError where it cannot be understood."""
    file = store / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): prepare into a new folder") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else settings
        raise UserError(f"{file} has format {found!r}, this version reads {FORMAT}: prepare into a new folder")
    settings.setdefault("order", 3)  # there was no choice at first
    return settings


# Writing: a file appears under its name complete and on the disk, or not at all.


class StoreWriteError(Exception):
    """The store's own disk refused a write: full, read-only, gone. Every other case would meet the same."""

    def __init__(self, detail: str, number: int) -> None:
        super().__init__(detail)
        self.detail, self.number = detail, number  # number: as in errno

    @staticmethod
    def of(error: OSError, file: Path) -> "StoreWriteError":
        return StoreWriteError(f"{error.strerror or error} ({file})", error.errno or 0)


class _HashingWriter:
    """A stream that numpy can write an array to, and that knows the sha256 of what went through."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.stream.write(block)


def write_atomically(file: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write beside the file, flush to the disk, rename. Raises StoreWriteError; leaves no temporary file behind.

    A process killed half-way leaves one, which the next prepare removes (`remove_leftovers`).
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with open(temporary, "wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
            flush_folder(file.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreWriteError.of(error, file) from error


def write_array(file: Path, array: np.ndarray) -> str:
    """Write a C-ordered `.npy` atomically; returns the sha256 of the file. Raises StoreWriteError."""
    digests: list[str] = []

    def write(stream: BinaryIO) -> None:
        writer = _HashingWriter(stream)
        np.lib.format.write_array(writer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        digests.append(writer.digest.hexdigest())

    write_atomically(file, write)
    return digests[0]


def write_settings(store: Path, settings: dict[str, Any]) -> None:
    write_lines(store / SETTINGS, [json.dumps(settings, indent=2)])


def write_index(store: Path, cases: Iterable[Case]) -> None:
    write_cases(store / INDEX, cases)


def write_duplicates(store: Path, cases: Iterable[Case]) -> None:
    """Write duplicates.jsonl, or remove it where there are none."""
    if cases := list(cases):
        write_cases(store / DUPLICATES, cases)
    else:
        remove(store / DUPLICATES)


def write_cases(file: Path, cases: Iterable[Case]) -> None:
    """Write cases as lines sorted by id, atomically. Raises StoreWriteError."""
    write_lines(file, [case.as_line() for case in sorted(cases, key=lambda case: case.id)])


def write_rejected(store: Path, rejections: Iterable[Rejection]) -> None:
    write_lines(store / REJECTED, [json.dumps(rejection.as_dict()) for rejection in sorted(set(rejections))])


def remove_leftovers(store: Path) -> None:
    """Remove the temporary files of a prepare that was killed. Call it only while holding the store's lock."""
    for folder in (store, store / VOLUMES, store / LABELS):
        for file in folder.glob(".*.tmp"):
            if file.is_dir():  # shards that were merged
                shutil.rmtree(file, ignore_errors=True)
            else:
                remove(file)


def remove(file: Path) -> None:
    """Remove a file if it is there. Raises StoreWriteError."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise StoreWriteError.of(error, file) from error


def write_lines(file: Path, lines: list[str]) -> None:
    """Write a text atomically. Raises StoreWriteError."""
    text = "".join(f"{line}\n" for line in lines).encode("utf-8")

    def write(stream: BinaryIO) -> None:
        stream.write(text)

    write_atomically(file, write)


def flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call for folders
            raise
    finally:
        os.close(descriptor)
