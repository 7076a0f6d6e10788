"""A fine-tuned network on raw images: one label file for each, on the image's own grid.

Every image goes through prepare's own code with the settings of the store that the network was trained on, in a process
of its own, so that a file which kills its reader costs itself alone. What is done is in OUT: the same command goes on
where it was ended.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data.discovery import DICOM_SUFFIXES, SUFFIXES, Source, scan, stem, unique_id
from ..data.inventory import of_tree
from ..data.progress import Progress
from ..data.reading import FileGrid, keep_locale
from ..data.rejection import RejectedError, Rejection
from ..data.resampling import isotropic_grid
from ..data.store import VOLUMES, StoreWriteError, file_sha256, write_rejected
from ..data.workers import Job, WorkerPool
from ..errors import UserError
from .inference import (
    AXES,
    OVERLAP,
    check_mirrored,
    check_overlap,
    find_device,
    is_out_of_memory,
    lacking_memory,
    mirror_axes,
    predict_logits,
)
from .labelled import SCORES, find_labels, score_files, write_scores
from .model import SegmentationModel, find_model, load_model
from .original_grid import most_probable
from .output_folder import OutputFolder
from .scoring import distances, in_words, summarise

LOGIT_COPIES = 2  # the sum of the windows, and what is made of it
MORE_MEMORY = "use a machine with more of it, or a model of a coarser store"
WRITTEN_AS = {".nii": ".nii.gz", ".nhdr": ".nrrd", ".mhd": ".mha"}  # in one file, compressed; else as the image


@dataclass(frozen=True)
class PredictSummary:
    """What a run did. `scores` holds the means over the cases that have a label, where labels were given."""

    predicted: int
    kept: int  # were in OUT before
    rejected: list[Rejection]
    scores: dict[str, Any] = field(default_factory=dict)
    scored: int = 0

    @property
    def exit_code(self) -> int:
        """0 where every image has its label file and every label that was given its score, else 1."""
        return 1 if self.rejected else 0

    def __str__(self) -> str:
        words = f"{self.predicted} predicted, {self.kept} kept from before, {len(self.rejected)} rejected"
        return words + (f"; {in_words(self.scores)} on {self.scored} labelled cases" if self.scores else "")


@keep_locale()
def predict(
    model: Path | str,
    raw: Path | str,
    output: Path | str,
    *,
    labels: Path | str | None = None,
    overlap: float = OVERLAP,
    mirror: str = "",
    surface: bool = True,
    device: str = "auto",
    timeout_s: float = 3600.0,
    force: bool = False,
    progress: bool = True,
) -> PredictSummary:
    """Segment every image below `raw` into `output`, and score it where there is a label.

    Args:
        model: a `.safetensors` that `finetune` saved, or a folder that holds one.
        raw: an image file, or what `prepare` takes: a tree of images and DICOM series; labels in it are passed over.
        output: folder of ID.nii.gz (.nrrd, .mha for images of these formats), values as in the labels of the store.
        labels: folder of labels with the names of the images; scores go into scores.csv of `output`.
        overlap: of neighbouring windows, a share of their sides.
        mirror: axes to mirror, as "w" or "d,h,w".
        surface: score distances between surfaces beside the Dice.
        device: a torch device, of the network, or auto: the GPU where there is one.
        timeout_s: an image that takes longer to read and resample is given up.
        force: replace what `output` holds from another model or other settings, or of unknown origin.
        progress: show a bar on standard error.

    Raises:
        UserError: no images, no such model, wrong setting, or `output` holds what would be overwritten. A bad image
        does not raise: it gets a line in `output`/rejected.jsonl and `exit_code` is 1.
    """
    raw, output = Path(raw), Path(output)
    check_overlap(overlap)
    axes, target = mirror_axes(mirror), find_device(device)
    path = find_model(model)
    loaded = load_model(path)
    loaded.network.to(target)
    sources, rejected = _sources(raw, output)
    label_files = {} if labels is None else find_labels(Path(labels), sources, output)
    files = {source.id: output / f"{source.id}{_suffix(source)}" for source in sources}
    _refuse_images(files, sources)
    check_mirrored(axes, loaded.flips)
    settings = {
        "model_sha256": file_sha256(path),
        "overlap": overlap,
        "mirror": ",".join(AXES[axis] for axis in axes),
    }
    folder_of_labels = OutputFolder(output, settings, files, {source.id: source for source in sources}, force)
    present = folder_of_labels.present
    console = Console(stderr=True, quiet=not progress, markup=False)
    wanted = [source for source in sources if source.id not in present]
    predicted: set[str] = set()
    kind = np.uint8 if max(loaded.classes) <= 255 else np.uint16

    def reject(name: str, error: RejectedError) -> None:
        rejected.append(Rejection(name, error.reason, error.remedy))
        console.print(f"rejected: {name}: {error.reason}: {error.remedy}", highlight=False, soft_wrap=True)
        with _own_disk(output):
            write_rejected(output, rejected)

    def one_by_one() -> Iterator[tuple[int, Job]]:
        with _workplace() as folder, WorkerPool(1, timeout_s) as pool:
            for position, source in enumerate(wanted):
                try:
                    image = _prepared(source, loaded, folder, pool)
                    classes = _segment(image, loaded, target, overlap, axes)
                    folder_of_labels.write(source.id, np.asarray(loaded.classes, kind)[classes], image.file_grid)
                    predicted.add(source.id)
                except RejectedError as error:
                    reject(source.name, error)
                yield position, {}

    with folder_of_labels.locked(), Progress(progress) as bars:
        for _ in bars.follow("predicting", len(wanted), one_by_one()):
            pass
    results = []
    for name, label in label_files.items():
        if name in predicted | present:
            try:
                results.append({"case": name, **score_files(files[name], label, loaded.classes, surface)})
            except RejectedError as error:
                reject(str(label), error)  # the whole path: its name may be the image's
    scores: dict[str, Any] = {}
    with _own_disk(output):
        if labels is not None:
            write_scores(output / SCORES, results)
        if results:
            scores = {"dice": summarise(results), **(distances(results) if surface else {})}
        if rejected:
            write_rejected(output, rejected)
    return PredictSummary(len(predicted), len(present), rejected, scores, len(results))


@dataclass(frozen=True)
class _Image:
    """One image as the network sees it, and the grid of its file."""

    values: np.ndarray  # (d, h, w) float32
    background: float
    shape: tuple[int, ...]  # (D, H, W) of the file's volume, axes as in the store
    spacing_mm: np.ndarray  # (3,) of the file's voxels
    store_spacing_mm: float
    file_grid: FileGrid


def _prepared(source: Source, model: SegmentationModel, folder: Path, pool: WorkerPool) -> _Image:
    """Raises: RejectedError, UserError where the disk is full."""
    job: Job = {
        "task": "convert_and_describe",
        "source": source.name,
        "id": source.id,
        "files": source.files,
        "dicom": source.dicom,
        "label": None,
        "store": str(folder),
        # A volume that is too small to cut training crops from can still be segmented.
        "settings": {**model.prepare, "minimum_size_voxels": 1},
        "modality": source.modality,
        "device": "cpu",
        "memory_limit_gb": None,
    }
    [(_, reply)] = pool.map([job])
    if "store_error" in reply:
        raise UserError(f"cannot write to {folder}: {reply['store_error']}; free space, or set TMPDIR to another disk")
    if "late" in reply:
        raise RejectedError(f"took longer than {reply['late']:g} s and was given up", "remove it, or give it more time")
    if "died" in reply:
        reason = f"the process that read it was ended by {reply['died']}, twice"
        raise RejectedError(reason, "most often memory ran out: use a machine with more memory, else remove it")
    if "rejected" in reply:
        raise RejectedError(reply["rejected"]["reason"], reply["rejected"]["remedy"])
    done, file = reply["done"], folder / VOLUMES / f"{source.id}.npy"
    values = np.load(file).astype(np.float32)
    file.unlink()
    return _Image(
        values,
        done["case"]["intensity"]["background"],
        tuple(done["shape"]),
        np.array(done["spacing_mm"]),
        model.prepare["spacing_mm"],
        FileGrid(**{name: tuple(numbers) for name, numbers in done["file_grid"].items()}),
    )


def _segment(
    image: _Image, model: SegmentationModel, device: torch.device, overlap: float, mirror: tuple[int, ...]
) -> np.ndarray:
    """(D, H, W) class indices on the file's grid. Raises: RejectedError where memory does not suffice."""
    values = torch.from_numpy(image.values)[None]
    if lacking := lacking_memory(len(model.classes), image.values.size, LOGIT_COPIES):
        raise RejectedError(lacking, MORE_MEMORY)
    try:
        scores = predict_logits(
            model.network, values, model.crop, image.background, device, overlap=overlap, mirror=mirror
        )
        # softmax in place: the logits of many classes are the largest thing in memory
        scores.sub_(scores.amax(dim=0, keepdim=True)).exp_()
        scores.div_(scores.sum(dim=0, keepdim=True))
        grid = isotropic_grid(image.shape, image.spacing_mm, image.store_spacing_mm)
        return most_probable(scores.numpy(), image.shape, grid)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RejectedError(f"memory ran out ({str(error).splitlines()[0]})", MORE_MEMORY) from error


def _sources(raw: Path, output: Path) -> tuple[list[Source], list[Rejection]]:
    if raw.is_file():
        name = raw.name.lower()
        if not name.endswith((*SUFFIXES, *DICOM_SUFFIXES)):
            raise UserError(f"{raw}: not an image; expected a file ending in {', '.join((*SUFFIXES, *DICOM_SUFFIXES))}")
        dicom = name.endswith(DICOM_SUFFIXES)
        key = raw.stem if dicom else stem(raw.name)
        return [Source(unique_id(key, raw.name, set()), raw.name, (str(raw.absolute()),), dicom)], []
    if not os.access(raw, os.R_OK | os.X_OK) or not raw.is_dir():
        raise UserError(f"{raw}: no such image or folder that can be read; give an image, or a folder of images")

    if output.exists() and output.samefile(raw):
        raise UserError(f"{output}: is the folder of the images; give another folder for the labels")
    with WorkerPool(1) as pool:
        found = of_tree(raw.absolute(), output)(lambda title, jobs: pool.map(jobs))
    # What is wrong with labels of RAW is no matter here: none of them is read.
    labels = set(scan(raw, output).labels)
    return found.sources, [each for each in found.rejected if each.file not in labels]


def _suffix(source: Source) -> str:
    if source.dicom:
        return ".nii.gz"
    suffix = next(each for each in SUFFIXES if source.name.lower().endswith(each))
    return WRITTEN_AS.get(suffix, suffix)


def _refuse_images(files: dict[str, Path], sources: list[Source]) -> None:
    images = {os.path.realpath(file) for source in sources for file in source.files}
    for file in files.values():
        if os.path.realpath(file) in images:
            raise UserError(f"{file}: is one of the images; give another folder for the labels")


@contextmanager
def _own_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except StoreWriteError as error:
        raise UserError(f"cannot write to {output}: {error.detail}; free space or name another folder") from error


@contextmanager
def _workplace() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="voxtrast-"))
    (folder / VOLUMES).mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
