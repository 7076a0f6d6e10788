"""Predictions beside labels that people drew: scores in the images' own geometry, as a table."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.discovery import FIRST_CHANNEL, LABEL_ENDING, Source, scan, stem, unique_id
from ..data.headers import check_regular
from ..data.reading import read_label, read_volume
from ..data.rejection import RejectedError
from ..data.store import write_lines
from ..errors import UserError
from .scoring import DISTANCES, score

SCORES = "scores.csv"
COLUMNS = ("case", "class", "dice", "hd95_mm", "surface_distance_mm", "found")


def find_labels(folder: Path, sources: Sequence[Source], output: Path) -> dict[str, Path]:
    """The label files of images, by the images' ids: of the same name, also with "_label" behind it, or without the
    channel number of nnU-Net's images.

    Raises: UserError where there is no such folder, where it is the output, where no name fits or two fit one image.
    """
    if not folder.is_dir():
        raise UserError(f"--labels {folder}: no such folder")
    if output.exists() and folder.samefile(output):
        raise UserError(f"--labels {folder}: is the folder of the predictions; give that of the labels to compare with")
    tree = scan(folder, output)
    images = {os.path.realpath(file) for source in sources for file in source.files}
    files: dict[str, Path] = {}
    for names in (tree.labels, tree.images):  # what lies beside labels is images, and else the labels themselves
        known = set(files)
        for name in sorted(names):
            key = stem(name).removeprefix(f"{tree.images_folder}/").removeprefix(f"{tree.labels_folder}/")
            own = unique_id(key.removesuffix(LABEL_ENDING), name, set())
            if own in known or os.path.realpath(folder / name) in images:
                continue
            if own in files:
                raise UserError(f"--labels {folder}: {files[own]} and {name} are labels of one image; move one away")
            files[own] = folder / name
    found = {}
    for source in sources:
        names = [each for each in (source.id, source.id.removesuffix(FIRST_CHANNEL)) if each in files]
        if names:
            found[source.id] = files[names[0]]
    if not found:
        raise UserError(
            f"--labels {folder}: none of its {len(files)} labels has the name of one of the {len(sources)} images; "
            f"expected for example {sources[0].id}.nii.gz"
        )
    return found


def score_files(prediction: Path, label: Path, classes: tuple[int, ...], surface: bool) -> dict[str, Any]:
    """The fields of `scoring.score`.

    Raises: RejectedError where one of the two cannot be read, where they lie on different grids, or where the label
        holds values that are not in `classes`.
    """
    check_regular(label)
    try:
        found = read_volume([prediction], dicom=False)
        wanted = read_label(label, found)
    except (OSError, RuntimeError) as error:  # SimpleITK's own are RuntimeErrors
        raise RejectedError(f"cannot be read ({str(error).splitlines()[0]})", "repair or remove it") from error
    unknown = sorted(set(np.unique(wanted).tolist()) - set(classes))
    if unknown:
        reason = f"the label holds the values {unknown[:5]}, the model knows {list(classes)}"
        raise RejectedError(reason, "number its classes as in the store that the model was trained on")
    first, second = (np.searchsorted(classes, values).astype(np.uint16) for values in (found.values, wanted))
    try:
        return score(first, second, classes, found.spacing_mm.tolist(), surface)
    except (MemoryError, RuntimeError) as error:  # torch's allocator raises the second
        reason = f"cannot be scored ({(str(error).splitlines() or ['memory ran out'])[0]})"
        raise RejectedError(reason, "use --no-surface, or a machine with more memory") from error


def write_scores(file: Path, results: Sequence[dict[str, Any]]) -> None:
    """One row for each case and class; empty where there is no number. Raises: StoreWriteError.

    The last column says on which side the class is: both, missed (label alone), spurious (prediction alone), neither.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for result in results:
        for value, dice in result["dice"].items():
            numbers = [dice, *(result.get(name, {}).get(value) for name in DISTANCES)]
            alone = [name for name in ("missed", "spurious") if int(value) in result[name]]
            found = alone[0] if alone else "neither" if dice is None else "both"
            rows.writerow([result["case"], value, *("" if each is None else each for each in numbers), found])
    write_lines(file, text.getvalue().splitlines())
