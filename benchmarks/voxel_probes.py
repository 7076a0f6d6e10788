"""What frozen features say of a voxel, without fine-tuning: a linear probe, and nearest neighbours between two views.

Features of a voxel are those of all maps of the encoder, or of encoder and decoder, read at its place (trilinear) and
standardised by channel. The linear probe is a logistic regression on some voxels of few labelled cases, tested on whole
volumes. Correspondence: of two views of a test case, one of them rotated, scaled, shifted, deformed and of another
contrast, the voxel of one whose features are nearest in cosine to those of a voxel of the other; it is right within
2 voxels of the true place.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from voxtrast.engine.config import load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.cases import LabelledCase, draw_cases, read_case
from voxtrast.engine.downstream.scoring import score, summarise
from voxtrast.engine.weights import load_into, load_weights
from voxtrast.methods import Backbone
from voxtrast.methods.views import AffineRanges, AppearanceRanges, ElasticRanges, View, ViewSpec

from .label_plan import Plan, Task

LABELS = 4  # cases that the linear probe learns from
VOXELS = 1500  # of each class in each of them
PAIRS = 40  # of views
QUERIES = 200  # voxels of each
RIGHT_VOXELS = 2.0
PARTS = ("encoder", "encoder and decoder")


def probe(
    plan: Plan, task: Task, store: Store, weights: Path | None, *, seed: int, device: torch.device
) -> dict[str, Any]:
    """Both probes of one arm, on the maps of the encoder and on all maps.

    Args:
        weights: of a pretraining; None for the initial values that `seed` gives.
        seed: of the cases drawn, the voxels, the views and of tensors that pretraining did not reach.
    """
    backbone = frozen(plan, weights, seed).to(device)
    return {
        "linear": {part: linear(backbone, part, task, store, seed) for part in PARTS},
        "correspondence": correspondence(backbone, task, store, seed),
    }


def frozen(plan: Plan, weights: Path | None, seed: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(load_config("mae-tiny", plan.backbone).backbone)
    if weights is not None:
        tensors, description = load_weights(weights)
        load_into(backbone.network, tensors, description.get("untrained", []))
    backbone.eval()
    return backbone


@torch.no_grad()
def features(backbone: Backbone, image: Tensor, part: str) -> Tensor:
    """(1, 1, *S) to (C, *S): every map of the part at the image's resolution. Any size; what is missing is repeated."""
    size = image.shape[2:]
    missing = [-side % backbone.config.stride for side in size]
    padded = functional.pad(image, [pad for side in reversed(missing) for pad in (0, side)], mode="replicate")
    encoder_maps, decoder_maps = backbone(padded)
    maps = encoder_maps if part == "encoder" else [*encoder_maps, *decoder_maps[1:]]  # the first is the bottleneck
    whole = [at_every_voxel(each, padded.shape[2] // each.shape[2]) for each in maps]
    return torch.cat(whole, dim=1)[0][:, : size[0], : size[1], : size[2]]


def at_every_voxel(features: Tensor, stride: int) -> Tensor:
    """A map at full resolution. Its vector i is that of voxel stride * i: strided convolutions of three voxels are
    centred there, not in the middle of the cell."""
    padded = functional.pad(features, (0, 1) * 3, mode="replicate")
    size = [(length - 1) * stride + 1 for length in padded.shape[2:]]
    whole = functional.interpolate(padded, size=size, mode="trilinear", align_corners=True)
    return whole[:, :, :-1, :-1, :-1]


def linear(backbone: Backbone, part: str, task: Task, store: Store, seed: int) -> dict[str, Any]:
    """Dice of the test cases by a logistic regression on LABELS cases."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    split = draw_cases(store, labels=LABELS, seed=seed, test_cases=task.test_cases)
    generator = np.random.default_rng(seed)
    rows, values = [], []
    for case in split.train:
        item = read_case(store, case, split.classes)
        found = _features_of(backbone, item, part)
        label = item.label[0].flatten().numpy()
        for each in range(len(split.classes)):
            there = np.flatnonzero(label == each)
            chosen = generator.choice(there, min(VOXELS, len(there)), replace=False)
            rows.append(found[chosen])
            values.append(label[chosen])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a solver that stops at its limit: the same limit for every arm
        model.fit(np.concatenate(rows), np.concatenate(values))
    results = []
    for case in split.test:
        item = read_case(store, case, split.classes)
        predicted = model.predict(_features_of(backbone, item, part))
        segmented = predicted.reshape(item.label[0].shape)
        scores = score(segmented, item.label[0].numpy(), split.classes, case.spacing_mm, surface=False)
        results.append({"case": case.id, **scores})
    return {"labels": LABELS, "dice": summarise(results), "cases": results}


def _features_of(backbone: Backbone, item: LabelledCase, part: str) -> Any:
    """(voxels, C) of a case."""
    device = next(backbone.parameters()).device
    return features(backbone, item.image[None].to(device), part).flatten(1).T.float().cpu().numpy()


def correspondence(backbone: Backbone, task: Task, store: Store, seed: int) -> dict[str, Any]:
    """Share of voxels that find their place in the other view, and the median distance from it in voxels; beside them
    those of a place drawn at random."""
    device = next(backbone.parameters()).device
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    chance: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    for batch in _pairs(task, store, seed):
        places, targets = _queries(batch, generator)
        for part in PARTS:
            fixed, moving = (features(backbone, batch[name].to(device), part) for name in ("fixed", "moving"))
            nearest = match(fixed, moving, places)
            found[part].append((nearest - targets).norm(dim=1))
        size = torch.tensor(batch["moving"].shape[2:])
        chance.append((torch.rand(len(places), 3, generator=generator) * size - targets).norm(dim=1))
    return {name: _distances(torch.cat(each)) for name, each in {**found, "chance": chance}.items()}


def match(fixed: Tensor, moving: Tensor, places: Tensor) -> Tensor:
    """For voxels of one view the nearest voxel of the other.

    Args:
        fixed, moving: features (C, *S).
        places: (N, 3) indices into `fixed`.

    Returns: (N, 3) indices into `moving`, as float.
    """
    mean, std = moving.flatten(1).mean(1, keepdim=True), moving.flatten(1).std(1, keepdim=True).clamp(min=1e-6)
    depth, height, width = places.long().unbind(1)
    queries = functional.normalize((fixed[:, depth, height, width] - mean) / std, dim=0)
    keys = functional.normalize((moving.flatten(1) - mean) / std, dim=0)
    nearest = (queries.T @ keys).argmax(dim=1).cpu()
    index = np.unravel_index(nearest.numpy(), tuple(moving.shape[1:]))
    return torch.from_numpy(np.stack(index, axis=1)).float()


def _queries(batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Voxels of the fixed view whose partner is in the other view, and where that lies: (N, 3) each."""
    valid = batch["mask"][0, 0].nonzero()
    places = valid[torch.randperm(len(valid), generator=generator)[:QUERIES]]
    depth, height, width = places.unbind(1)
    return places.float(), places + batch["displacement"][0][:, depth, height, width].T


def _pairs(task: Task, store: Store, seed: int) -> Iterator[dict[str, Any]]:
    """Views of the test cases, one pair at a time, in the crop of fine-tuning."""
    test = draw_cases(store, labels=LABELS, seed=seed, test_cases=task.test_cases).test
    appearance = AppearanceRanges(order=["noise", "contrast", "gamma"])
    views = {
        "moving": View(appearance=appearance),
        "fixed": View(affine=AffineRanges(), elastic=ElasticRanges(), displacement=True),
    }
    spec = ViewSpec(crop=tuple(task.finetune["crop"]), views=views)
    with ViewPipeline(store, test, spec, seed=seed, split="validation", global_batch=1, threads=1) as pipeline:
        for _, [batch] in zip(range(PAIRS), pipeline, strict=False):
            if batch["mask"].any():
                yield batch


def _distances(errors: Tensor) -> dict[str, float]:
    return {
        "right": round((errors <= RIGHT_VOXELS).float().mean().item(), 4),
        "median_voxels": round(errors.median().item(), 3),
    }
