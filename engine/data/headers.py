"""Checks of a file's header and length before a reader sees it, so that a damaged file gets a clear line.

NIfTI: https://nifti.nimh.nih.gov/nifti-1 and the NIfTI-2 update. The reader beneath us replaces a zero spacing by one,
NaN by zero and the missing end of a file by whatever, all without a word: hence our own look at header and data.
"""

import math
import stat
import struct
import zlib
from pathlib import Path

import numpy as np

from .rejection import RejectedError

GZIP_MAGIC = b"\x1f\x8b"
NIFTI_FLOATS = {16: "f4", 64: "f8"}  # datatype code -> numpy type
COPY_AGAIN = "copy or download the file again, or remove it"


def check_regular(path: Path) -> None:
    """Reject what is not a readable file with something in it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        reason = "a symbolic link to a file that does not exist" if path.is_symlink() else "the file does not exist"
        raise RejectedError(reason, "restore the file or remove the reference to it") from None
    except OSError as error:
        raise RejectedError(f"cannot be reached: {error.strerror}", "repair or remove the link or file") from None
    if not stat.S_ISREG(status.st_mode):
        raise RejectedError("not a regular file but a pipe, device or socket", "remove or rename it")
    if status.st_size == 0:
        raise RejectedError("the file is empty (0 bytes)", COPY_AGAIN)


def check_nifti(path: Path) -> bytes:
    """Reject a NIfTI file that is damaged, short, not 3-D, has no usable spacing or values that are not finite.

    Returns what it holds, unpacked.
    """
    data = path.read_bytes()
    if data.startswith(GZIP_MAGIC):
        data = _decompress(data)
    order, version = _kind(data)
    if version == 1:
        dimensions = struct.unpack_from(f"{order}8h", data, 40)
        datatype, bits = struct.unpack_from(f"{order}2h", data, 70)
        spacing = struct.unpack_from(f"{order}8f", data, 76)[1:4]
        offset = struct.unpack_from(f"{order}f", data, 108)[0]
    else:
        dimensions = struct.unpack_from(f"{order}8q", data, 16)
        datatype, bits = struct.unpack_from(f"{order}2h", data, 12)
        spacing = struct.unpack_from(f"{order}8d", data, 104)[1:4]
        offset = struct.unpack_from(f"{order}q", data, 168)[0]
    _check_dimensions(dimensions)
    check_spacing(spacing)
    start = int(offset) if math.isfinite(offset) else 0
    voxels = math.prod(dimensions[1 : 1 + dimensions[0]])
    needed = start + voxels * bits // 8
    if start < 0 or len(data) < needed:
        raise RejectedError(f"truncated: the header promises {needed} bytes, the file holds {len(data)}", COPY_AGAIN)
    if datatype in NIFTI_FLOATS:
        check_finite(np.frombuffer(data, order + NIFTI_FLOATS[datatype], voxels, start))
    return data


def _decompress(data: bytes) -> bytes:
    """To the end, member by member, which also checks gzip's own checksums."""
    parts, rest = [], data
    try:
        while rest.rstrip(b"\0"):  # some writers pad with zeros
            member = zlib.decompressobj(wbits=31)
            parts.append(member.decompress(rest))
            if not member.eof:
                reason = f"truncated: the compressed data end early, after {len(data)} bytes"
                raise RejectedError(reason, COPY_AGAIN)
            rest = member.unused_data
    except zlib.error:
        raise RejectedError("damaged: the compressed data contradict their checksum or structure", COPY_AGAIN) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_finite(values: np.ndarray) -> None:
    """Reject floating-point values that are NaN or infinite."""
    bad = int(values.size - np.count_nonzero(np.isfinite(values)))
    if bad:
        kinds = " and ".join(n for n, test in (("NaN", np.isnan), ("infinite", np.isinf)) if test(values).any())
        reason = f"{bad} of {values.size} voxels are not finite numbers ({kinds})"
        raise RejectedError(reason, "find where they come from and replace them, or remove the file")


def _kind(start: bytes) -> tuple[str, int]:
    """Byte order ("<" or ">") and version of a NIfTI header, told by its first number (its own length)."""
    for order in "<>":
        if len(start) >= 348:
            length = struct.unpack_from(f"{order}i", start, 0)[0]
            if length == 348 or (length == 540 and len(start) >= 540):
                return order, 1 if length == 348 else 2
    shown = start[:12]
    raise RejectedError(f"not a NIfTI file: it starts with {shown!r}", "give the file its right suffix, or remove it")


def _check_dimensions(dimensions: tuple[int, ...]) -> None:
    count = dimensions[0]
    if not 1 <= count <= 7 or any(each < 1 for each in dimensions[1 : 1 + count]):
        raise RejectedError(f"the header's dimensions {dimensions} make no sense", COPY_AGAIN)
    check_three_dimensional(dimensions[1 : 1 + count])


def check_three_dimensional(size: tuple[int, ...]) -> None:
    """Reject sizes (x, y, z, ...) that are not those of one volume; axes of length one after the third are fine."""
    shown = " x ".join(str(each) for each in size)
    if len(size) < 3:
        raise RejectedError(f"{len(size)}-D: the image is {shown}", "give whole volumes; single slices cannot be used")
    if math.prod(size[3:]) > 1:
        remedy = "split it into one 3-D file for each time point, echo or channel"
        raise RejectedError(f"{len(size)}-D: the image is {shown}, one volume was expected", remedy)


def check_spacing(spacing: tuple[float, ...]) -> None:
    if not all(math.isfinite(each) and each != 0 for each in spacing):
        shown = " x ".join(f"{each:g}" for each in spacing)
        raise RejectedError(f"the voxel spacing in the header is {shown}", "write the true voxel size into the header")


def detached_files(path: Path) -> list[Path]:
    """The data files that an .mhd or .nhdr header points to; rejects what is missing. Empty for every other file."""
    suffix = path.suffix.lower()
    if suffix not in (".mhd", ".nhdr"):
        return []
    key, separator = ("elementdatafile", "=") if suffix == ".mhd" else ("data file", ":")
    lines = path.read_text(encoding="latin-1").splitlines()
    for number, line in enumerate(lines):
        name, found, value = line.partition(separator)
        if found and name.strip().lower() in (key, key.replace(" ", "")):
            names = _expand(value.strip(), [each.strip() for each in lines[number + 1 :]])
            files = [path.parent / each for each in names]
            missing = next((each for each in files if not each.is_file()), None)
            if missing is not None:
                remedy = "put the data file beside its header, or remove the header"
                raise RejectedError(f"its data file {missing.name} is missing", remedy)
            return files
    raise RejectedError("the header names no data file", COPY_AGAIN)


def _expand(value: str, following: list[str]) -> list[str]:
    """The names meant by a data-file field: one name, LOCAL (none), LIST (the lines that follow), numbered pattern."""
    words = value.split()
    if value.upper() == "LOCAL":
        return []
    if words and words[0].upper().startswith("LIST"):
        return [each for each in following if each]
    if len(words) >= 3 and "%" in words[0] and all(word.lstrip("-").isdigit() for word in words[1:]):
        first, last, step = int(words[1]), int(words[2]), int(words[3]) if len(words) > 3 else 1
        try:
            return [words[0] % number for number in range(first, last + (1 if step > 0 else -1), step)]
        except (TypeError, ValueError):
            raise RejectedError(f"the pattern of data files {value!r} cannot be understood", COPY_AGAIN) from None
    return [value]
