"""Which labelled cases are trained and tested on, and what they hold.

The test cases depend on the store alone and are those that pretraining holds aside where its `validation.fraction` is
the default, so that no seed, number of labels or arm sees them in training. The training cases are drawn by the seed
alone: fewer labels are a part of more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ValidationConfig
from ..data.splits import held_aside
from ..data.store import INDEX, Case, Store, file_sha256
from ..errors import UserError


@dataclass(frozen=True)
class Split:
    train: list[Case]  # in the order drawn
    test: list[Case]  # sorted by id
    classes: tuple[int, ...]  # label values of the store; class k of the network is classes[k], classes[0] = 0


@dataclass(frozen=True)
class LabelledCase:
    case: Case
    image: Tensor  # (1, D, H, W) float32, as the store holds it
    label: Tensor  # (1, D, H, W) uint8 or int16, class indices


def draw_cases(store: Store, *, labels: int, seed: int, test_cases: int | None = None) -> Split:
    """The cases of one run.

    Args:
        labels: number of labelled training cases.
        seed: of the draw.
        test_cases: how many cases of the store are held aside; default: the share that pretraining holds aside.

    Raises: UserError where the store has no or too few labels, or the drawn cases lack a class.
    """
    if labels < 1:
        raise UserError(f"--labels {labels}: expected at least 1")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected 0 or more")
    if test_cases is not None and not 1 <= test_cases < len(store.cases):
        raise UserError(
            f"test cases {test_cases}: expected 1 to {len(store.cases) - 1}, the store {store.path} has "
            f"{len(store.cases)} cases"
        )
    labelled = {case.id for case in store.cases if case.label_sha256 is not None}
    if not labelled:
        raise UserError(
            f"{store.path}: none of its {len(store.cases)} cases has a label; prepare it from a folder "
            "with images/ and labels/ under the same file names"
        )
    kept, aside = held_aside(store.cases, ValidationConfig().fraction, count=test_cases)
    pool = sorted((case for case in kept if case.id in labelled), key=lambda case: case.id)
    test = sorted((case for case in aside if case.id in labelled), key=lambda case: case.id)
    if not any(case.label_classes for case in test):
        raise UserError(
            f"{store.path}: none of the {len(aside)} cases held aside for the test has labelled voxels; "
            f"label one of {', '.join(sorted(case.id for case in aside)[:5])}, or prepare the labelled cases as "
            f"a store of their own"
        )
    if labels > len(pool):
        raise UserError(
            f"--labels {labels}: the store {store.path} has {len(pool)} labelled cases to train on "
            f"({len(test)} more are held aside for the test); ask for at most {len(pool)}"
        )
    classes = tuple(sorted({0, *(value for case in (*pool, *test) for value in case.label_classes)}))
    if len(classes) < 2:
        raise UserError(f"{store.path}: its labels hold the value {classes[0]} alone; there is nothing to segment")
    trainable = {value for case in pool for value in case.label_classes}
    if aside_alone := sorted(set(classes) - {0} - trainable):
        having = [case.id for case in test if not trainable.issuperset(case.label_classes)]
        raise UserError(
            f"{store.path}: the classes {aside_alone} are in the cases held aside for the test alone "
            f"({', '.join(having[:5])}), so that nothing can learn them; check whether these labels number their "
            "classes as the others do, or label them in more cases"
        )
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pool))
    train = [pool[index] for index in order[:labels]]
    absent = sorted(set(classes) - {0} - {value for case in train for value in case.label_classes})
    if absent:
        raise UserError(
            f"--labels {labels} --seed {seed}: the drawn training cases "
            f"{', '.join(case.id for case in train[:5])}{' …' if labels > 5 else ''} hold no voxel of "
            f"the classes {absent}, which the store has; raise --labels or take another --seed"
        )
    return Split(train, test, classes)


def seen_in_pretraining(description: dict[str, Any], store: Store, test: list[Case]) -> int | None:
    """How many of the test images the weights were pretrained on; None where their file does not say.

    Args:
        description: of the weights; it says which store they were pretrained on, and which part of it was held aside.
    """
    about = description.get("data", {})
    fraction = about.get("validation_fraction")
    if fraction is None or about.get("index_sha256") != file_sha256(store.path / INDEX):
        return None
    _, aside = held_aside(store.cases, fraction)
    return len({case.id for case in test} - {case.id for case in aside})


def read_case(store: Store, case: Case, classes: tuple[int, ...]) -> LabelledCase:
    """A case's volume and its label as class indices.

    Raises: UserError where the label's shape or values are not those of the index.
    """
    volume = np.array(store.volume(case), dtype=np.float32)
    label = np.array(store.label(case))
    if label.shape != volume.shape:
        raise UserError(
            f"{store.path}: the label of {case.id} has the shape {label.shape}, its volume {volume.shape}; "
            "prepare the store again"
        )
    values = np.asarray(classes)
    indices = np.minimum(np.searchsorted(values, label), len(values) - 1)
    if not np.array_equal(values[indices], label):
        raise UserError(
            f"{store.path}: the label of {case.id} holds values that its index does not name "
            f"({sorted(set(np.unique(label).tolist()) - set(classes))[:5]}); prepare the store again"
        )
    kind = np.uint8 if len(classes) <= 256 else np.int16
    return LabelledCase(case, torch.from_numpy(volume)[None], torch.from_numpy(indices.astype(kind))[None])


def choose_crop(cases: list[Case], stride: int, wanted: tuple[int, ...] | None = None) -> tuple[int, int, int]:
    """The training crop, in voxels: each side a multiple of the network's total stride.

    Args:
        cases: whose median shape the default follows, at most 96 voxels a side.
        stride: of the backbone.
        wanted: sides to round up instead.
    """
    if wanted is None:
        # The smaller of two middle values: half of the padding in a batch is wasted work.
        sides = np.percentile([case.shape for case in cases], 50, axis=0, method="lower").tolist()
        sides = [min(int(side), 96) for side in sides]
    elif len(wanted) != 3 or any(side < 1 for side in wanted):
        raise UserError(f"crop {tuple(wanted)}: expected three positive numbers (D, H, W)")
    else:
        sides = list(wanted)
    depth, height, width = (-(-side // stride) * stride for side in sides)
    if depth == height == width == stride:
        # Instance norm has nothing to normalise over at a bottleneck of a single voxel.
        width *= 2
    return depth, height, width
