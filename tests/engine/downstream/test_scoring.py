"""Scores of one case: MONAI's numbers, in millimetres, and what counts where a class is on one side alone."""

import json

import numpy as np
import pytest
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from monai.networks.utils import one_hot

from voxtrast.engine.downstream.scoring import distances, in_words, score, summarise

CLASSES = (0, 2, 5)


def box(shape: tuple[int, ...], *sides: slice, value: int = 1) -> np.ndarray:
    result = np.zeros(shape, np.uint8)
    result[sides] = value
    return result


def test_distances_of_shifted_boxes_are_the_shift_in_millimetres() -> None:
    label = box((20, 20, 20), slice(4, 12), slice(4, 12), slice(4, 12))
    for axis, spacing in enumerate((3.0, 1.0, 0.5)):
        result = score(np.roll(label, 4, axis), label, (0, 2), (3.0, 1.0, 0.5), surface=True)
        assert result["hd95"] == {"2": pytest.approx(4 * spacing)}
        assert 0 < result["surface_distance"]["2"] < 4 * spacing
    same = score(label, label, (0, 2), (3.0, 1.0, 0.5), surface=True)
    assert (same["dice"], same["hd95"], same["surface_distance"]) == ({"2": 1.0}, {"2": 0.0}, {"2": 0.0})


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_cutting_the_box_out_changes_none_of_monai_s_numbers() -> None:
    generator = np.random.default_rng(0)
    # Noise reaches every border of the volume.
    label, prediction = (generator.integers(0, 3, (9, 12, 10)).astype(np.uint8) for _ in range(2))
    prediction[:, :3] = 0
    result = score(prediction, label, CLASSES, (2.0, 1.0, 0.7), surface=True)
    maps = [one_hot(torch.from_numpy(each)[None, None], 3) for each in (prediction, label)]
    hd95 = compute_hausdorff_distance(maps[0], maps[1], percentile=95, spacing=[2.0, 1.0, 0.7])[0]
    distance = compute_average_surface_distance(maps[0], maps[1], symmetric=True, spacing=[2.0, 1.0, 0.7])[0]
    assert list(result["hd95"].values()) == pytest.approx(hd95.tolist(), abs=1e-6)
    assert list(result["surface_distance"].values()) == pytest.approx(distance.tolist(), abs=1e-6)
    foreground = [torch.from_numpy(each > 0)[None, None].float() for each in (prediction, label)]
    assert result["foreground"] == pytest.approx(compute_dice(*foreground).item(), abs=1e-6)


def test_classes_taken_for_one_another_lower_their_dice_and_not_that_of_all_as_one() -> None:
    label = box((6, 6, 6), slice(1, 3)) + box((6, 6, 6), slice(3, 5), value=2)
    swapped = np.array([0, 2, 1], np.uint8)[label]
    one, other = score(label, label, CLASSES, (1, 1, 1), False), score(swapped, label, CLASSES, (1, 1, 1), False)
    assert (other["mean"], other["foreground"]) == (0.0, 1.0)
    nothing = score(label, label * 0, CLASSES, (1, 1, 1), False)
    assert nothing["foreground"] is None
    assert summarise([one, other, nothing])["foreground"] == 1.0
    assert "foreground" not in score(label, label, (0, 1), (1, 1, 1), False)


def test_a_class_on_one_side_alone_has_no_distance_and_is_counted() -> None:
    shape = (8, 8, 8)
    ball, nothing = box(shape, slice(2, 5), slice(2, 5), slice(2, 5)), np.zeros(shape, np.uint8)
    missed = score(nothing, ball, CLASSES, (1, 1, 1), surface=True)
    assert missed["dice"] == {"2": 0.0, "5": None}
    assert (missed["hd95"], missed["missed"], missed["spurious"]) == ({"2": None, "5": None}, [2], [])
    spurious = score(ball, nothing, CLASSES, (1, 1, 1), surface=True)
    assert (spurious["dice"], spurious["mean"]) == ({"2": None, "5": None}, None)
    assert (spurious["missed"], spurious["spurious"]) == ([], [2])
    found = distances([missed, spurious, score(ball, ball, CLASSES, (1, 1, 1), surface=True)])
    assert found["hd95"] == {"mean": 0.0, "classes": {"2": 0.0, "5": None}}
    assert (found["missed"], found["spurious"]) == ({"2": 1, "5": 0}, {"2": 1, "5": 0})
    json.dumps(found, allow_nan=False)


def test_the_words_name_what_was_left_out() -> None:
    label = box((9, 9, 9), slice(1, 4), slice(1, 4), slice(1, 4))
    results = [score(label, label, CLASSES, (1, 1, 1), True), score(label * 0, label, CLASSES, (1, 1, 1), True)]
    words = in_words({"dice": summarise(results), **distances(results)})
    dice, distance = "Dice 0.500 (2: 0.500), of all classes as one 0.500", "HD95 0.00 mm, surface distance 0.00 mm"
    assert words == f"{dice}, {distance}, 1 missed"
