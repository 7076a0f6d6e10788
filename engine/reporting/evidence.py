"""What a report shows of a run, gathered from its folder and by running its method on the cases held aside."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels import warp
from ...methods import Method
from ...methods.views import ViewSpec
from ..data.store import Case, Store
from ..downstream.inference import OVERLAP, lacking_memory, predict_logits
from ..downstream.model import load_model
from ..downstream.table import setting_of
from ..errors import UserError
from ..runs import LoadedRun, build_method
from ..validation_views import validation_views
from .planes import Frame, frame_of

Volume = NDArray[Any]
Line = dict[str, Any]

LARGEST_SIDE_VOXELS = 96  # of what is looked at in one piece; a larger volume is cut about its middle


def read_log(run: Path) -> tuple[list[Line], list[Line]]:
    """The lines of RUN/log.jsonl and RUN/validation.jsonl, without any that was cut off; none where no file is."""
    return _read_lines(run / "log.jsonl"), _read_lines(run / "validation.jsonl")


def _read_lines(path: Path) -> list[Line]:
    lines: list[Line] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the step that a kill interrupted
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


@dataclass(frozen=True)
class MatchedPair:
    """A pair of views of a held-aside case with the true and the recovered displacement; S is the crop."""

    case: str
    frame: Frame
    moving: Volume  # (*S)
    fixed: Volume  # (*S)
    true: Volume  # (D, *S) voxels
    recovered: Volume  # (D, *S) voxels
    mask: Volume  # (*S) 0 or 1
    warped_true: Volume  # (*S) moving, warped by the true displacement
    warped_recovered: Volume  # (*S)

    @property
    def error(self) -> Volume:
        """(*S) Euclidean distance of the recovered from the true displacement, voxels."""
        return numpy.sqrt(((self.recovered - self.true) ** 2).sum(axis=0))

    @property
    def magnitude(self) -> Volume:
        """(*S) length of the true displacement: the error of predicting zero, voxels."""
        return numpy.sqrt((self.true**2).sum(axis=0))


def match_pairs(run: LoadedRun) -> list[MatchedPair]:
    """The views that validation looks at, with what the method makes of them. Two-dimensional where the method is."""
    config, method = run.config, run.method
    if not run.validation_cases:
        raise UserError("no case is held aside (validation.fraction=0), so there is no unseen pair to show")
    by_id = {case.id: case for case in run.validation_cases}
    pairs: list[MatchedPair] = []
    with validation_views(run, run.validation_cases) as views:
        for [batch] in itertools.islice(views, config.validation.batches):
            seen = method.inspect(batch)
            moving = batch["moving"].float()
            warped_true = warp(moving, batch["displacement"])
            warped_recovered = warp(moving, seen["displacement"].float())
            for index, name in enumerate(batch["case"]):
                case = by_id[name]
                pairs.append(
                    MatchedPair(
                        case=name,
                        frame=frame_of(case.affine, case.spacing_mm, len(method.views.crop)),
                        moving=_numpy(moving[index, 0]),
                        fixed=_numpy(batch["fixed"][index, 0]),
                        true=_numpy(batch["displacement"][index]),
                        recovered=_numpy(seen["displacement"][index]),
                        mask=_numpy(batch["mask"][index, 0]),
                        warped_true=_numpy(warped_true[index, 0]),
                        warped_recovered=_numpy(warped_recovered[index, 0]),
                    )
                )
    return pairs


def differing_cases(pairs: Sequence[MatchedPair], count: int) -> list[MatchedPair]:
    """The first pair of each of the first `count` cases: chosen by order, not by how well it turned out."""
    first: dict[str, MatchedPair] = {}
    for pair in pairs:
        first.setdefault(pair.case, pair)
    return list(first.values())[:count]


@dataclass(frozen=True)
class Restoration:
    """A view of a held-aside case, what should be restored of it, and what is; all (*S)."""

    case: str
    frame: Frame
    seen: Volume
    target: Volume
    restored: Volume


def restorations(run: LoadedRun, count: int) -> list[Restoration]:
    """Of the first `count` cases that validation looks at; none where the method restores nothing."""
    if not run.validation_cases:
        raise UserError("no case is held aside (validation.fraction=0), so there is no unseen view to show")
    by_id = {case.id: case for case in run.validation_cases}
    found: dict[str, Restoration] = {}
    first = next(iter(run.method.views.views))
    with validation_views(run, run.validation_cases) as views:
        for [batch] in itertools.islice(views, run.config.validation.batches):
            seen = run.method.inspect(batch)
            if "restored" not in seen:
                return []
            clean = f"{first}_clean" if f"{first}_clean" in batch else first
            given = seen["input"] if "input" in seen else batch[first]
            target = seen["target"] if "target" in seen else batch[clean]
            for index, name in enumerate(batch["case"]):
                case, restored = by_id[name], seen["restored"].float()
                frame = frame_of(case.affine, case.spacing_mm, restored.ndim - 2)
                images = (each.float()[index, 0] for each in (given, target, restored))
                found.setdefault(name, Restoration(name, frame, *(_numpy(image) for image in images)))
            if len(found) >= count:
                break
    return list(found.values())[:count]


@dataclass(frozen=True)
class FeatureMap:
    name: str
    frame: Frame
    image: Volume  # (*S)
    features: Volume  # (C, *S) float32


def features_of(run: LoadedRun, case: Case, *, untrained: bool = False) -> FeatureMap:
    """The full-resolution features of a whole volume, or of its middle where it is large.

    Args:
        untrained: with the method's initial weights, for comparison.
    """
    dimensions = len(run.method.views.crop)
    volume = numpy.asarray(run.store.volume(case), dtype=numpy.float32)
    image = volume if dimensions == 3 else volume[volume.shape[0] // 2]
    starts = [max(0, (size - LARGEST_SIDE_VOXELS) // 2) for size in image.shape]
    image = image[tuple(slice(start, start + LARGEST_SIDE_VOXELS) for start in starts)]
    stride = run.config.backbone.stride
    background = case.intensity["background"]
    padded = numpy.pad(image, [(0, -size % stride) for size in image.shape], constant_values=background)
    method = _untrained(run) if untrained else run.method
    seen = method.inspect(batch_of(torch.from_numpy(padded)[None, None], method.views))
    if "features" not in seen:
        raise UserError(f"{run.config.method.name} has no features to show")
    features = seen["features"][:1].float()
    if features.shape[2:] != padded.shape:  # of a coarser level
        features = torch.nn.functional.interpolate(features, padded.shape, mode="nearest")
    inside = (slice(None), *(slice(size) for size in image.shape))
    return FeatureMap(case.id, frame_of(case.affine, case.spacing_mm, dimensions), image, _numpy(features[0])[inside])


def batch_of(image: Tensor, spec: ViewSpec) -> dict[str, Any]:
    """One image as every view of a batch, neither turned nor changed."""
    batch: dict[str, Any] = {"position": torch.full((1,), 0.5), "case": [""]}
    for name in spec.views:
        batch[name] = batch[f"{name}_clean"] = image
        batch[f"{name}_flips"] = torch.zeros(1, len(spec.crop), dtype=torch.int64)
        batch[f"{name}_quarter_turns"] = torch.zeros(1, dtype=torch.int64)
    return batch


def _untrained(run: LoadedRun) -> Method:
    return build_method(run.config).eval()


def principal_colours(maps: Sequence[FeatureMap]) -> tuple[list[Volume], list[float]]:
    """The three directions in which the features of the first map vary most, as red, green and blue.

    The directions and the range of the colours come from the bright half of the first volume and serve all maps, so
    that equal colours mean equal features.

    Returns: (*S, 3) from 0 to 1 for each map; share of the variance that each of the three directions holds.
    """
    first = maps[0]
    foreground = first.image > first.image.mean(dtype=numpy.float64)
    samples = first.features[:, foreground].astype(numpy.float64)
    mean = samples.mean(axis=1, keepdims=True)
    if len(samples) < 3:
        raise UserError(f"{len(samples)} features a voxel: three are needed for red, green and blue")
    values, vectors = numpy.linalg.eigh(numpy.cov(samples - mean))
    values, vectors = values[::-1], vectors[:, ::-1][:, :3]
    # An eigenvector has no sign of its own: its largest entry is made positive.
    vectors = vectors * numpy.sign(vectors[numpy.abs(vectors).argmax(axis=0), numpy.arange(vectors.shape[1])])
    low, high = numpy.percentile(vectors.T @ (samples - mean), (1, 99), axis=1)
    colours = []
    for each in maps:
        projected = numpy.tensordot(vectors.T, each.features - mean.reshape(-1, *[1] * first.image.ndim), axes=1)
        span = numpy.maximum(high - low, 1e-12)
        shape = (-1, *[1] * first.image.ndim)
        scaled = (projected - low.reshape(shape)) / span.reshape(shape)
        colours.append(numpy.moveaxis(scaled.clip(0, 1), 0, -1).astype(numpy.float32))
    total = max(float(values.sum()), 1e-12)
    return colours, [float(value) / total for value in values[:3]]


@dataclass(frozen=True)
class Segmentation:
    case: str
    frame: Frame
    image: Volume  # (D, H, W)
    truth: Volume  # (D, H, W) label values
    predictions: dict[str, Volume]  # by arm, label values


def segmentations(lines: Sequence[Line]) -> Segmentation:
    """What the saved models of the arms make of the first test case: of the setting, labels and seed that most arms
    have, fewest labels and first seed; of an arm's runs there, the last.

    Args:
        lines: of finetune.jsonl.

    Raises: UserError where no store is left, or a model is not or does not fit.
    """
    runs: dict[tuple[int, int, str], dict[str, Line]] = {}
    for line in lines:
        runs.setdefault((line["labels"], line["seed"], setting_of(line)), {})[line["arm"]] = line
    same = runs[min(runs, key=lambda key: (-len(runs[key]), *key))]
    chosen = next(iter(same.values()))
    store = Store(Path(chosen["store"]))
    name = chosen["cases"][0]["case"]
    case = next((each for each in store.cases if each.id == name), None)
    if case is None:
        raise UserError(f"{store.path}: the test case {name} is not in it any more")
    image = numpy.asarray(store.volume(case), dtype=numpy.float32)
    predictions = {}
    for arm in sorted(same):
        model = load_model(Path(same[arm]["model"]))
        background = case.intensity["background"]
        whole = torch.from_numpy(image)[None]
        if lacking := lacking_memory(len(model.classes), image.size):
            raise UserError(f"{name}: {lacking}")
        look: dict[str, Any] = {
            "overlap": same[arm].get("overlap", OVERLAP),
            "mirror": tuple(same[arm].get("mirror", ())),
        }
        logits = predict_logits(model.network, whole, model.crop, background, torch.device("cpu"), **look)
        predictions[arm] = numpy.asarray(model.classes)[_numpy(logits.argmax(dim=0))]
    return Segmentation(
        name, frame_of(case.affine, case.spacing_mm), image, numpy.asarray(store.label(case)), predictions
    )


def _numpy(tensor: Tensor) -> Volume:
    array: Volume = tensor.detach().cpu().numpy()
    return array
