"""Which cases a run sees: fixed by the store and the seed, and refused clearly where there are too few."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from voxtrast.engine.data.splits import held_aside
from voxtrast.engine.data.store import LABELS, Store, write_array
from voxtrast.engine.downstream.cases import choose_crop, draw_cases, read_case
from voxtrast.engine.errors import UserError


def test_the_test_cases_depend_on_the_store_alone_and_are_those_pretraining_holds_aside(make_store) -> None:
    store = make_store([(1,)] * 10, size=8)
    splits = [draw_cases(store, labels=labels, seed=seed) for labels in (1, 4) for seed in range(5)]
    aside = {case.id for case in held_aside(store.cases, 0.2)[1]}
    assert all({case.id for case in split.test} == aside for split in splits)
    assert all(not aside & {case.id for case in split.train} for split in splits)


def test_fewer_labels_are_a_part_of_more_and_the_seed_changes_the_draw(make_store) -> None:
    store = make_store([(1,)] * 10, size=8)
    four, eight = (draw_cases(store, labels=labels, seed=3).train for labels in (4, 8))
    assert eight[:4] == four
    assert len({tuple(case.id for case in draw_cases(store, labels=4, seed=seed).train) for seed in range(5)}) > 1


def test_label_values_with_gaps_become_indices(store: Store) -> None:
    split = draw_cases(store, labels=2, seed=0)
    assert split.classes == (0, 2, 5)
    item = read_case(store, split.train[0], split.classes)
    original = np.array(store.label(item.case))
    assert item.image.shape == item.label.shape == (1, *item.case.shape)
    assert np.array_equal(np.array(split.classes)[item.label[0].numpy()], original)


def test_values_the_index_does_not_name_are_refused(store: Store) -> None:
    case = store.cases[0]
    label = np.array(store.label(case))
    label[0, 0, 0] = 7
    write_array(store.path / LABELS / f"{case.id}.npy", label)
    with pytest.raises(UserError, match=r"values that its index does not name \(\[7\]\)"):
        read_case(store, case, (0, 2, 5))


def test_impossible_requests_say_what_is_there(make_store: Callable[..., Store], tmp_path) -> None:
    store = make_store([(1, 2), (1,), (1,), (1,), (1,), (1,)], size=8)
    with pytest.raises(UserError, match=r"--labels 6: .* has 5 labelled cases to train on \(1 more"):
        draw_cases(store, labels=6, seed=0)
    with pytest.raises(UserError, match="--labels 0: expected at least 1"):
        draw_cases(store, labels=0, seed=0)
    with pytest.raises(UserError, match="--seed -1"):
        draw_cases(store, labels=1, seed=-1)
    with pytest.raises(UserError, match="test cases 6: expected 1 to 5"):
        draw_cases(store, labels=1, seed=0, test_cases=6)
    errors = []
    for seed in range(6):
        try:
            draw_cases(store, labels=1, seed=seed)
        except UserError as error:
            errors.append(str(error))
    assert errors
    assert all("hold no voxel of the classes [2]" in error for error in errors)


def test_a_class_that_only_the_test_has_is_named_with_the_cases_that_have_it(make_store: Callable[..., Store]) -> None:
    store = make_store([(1,)] * 5, size=8)
    [aside] = held_aside(store.cases, 0.2)[1]
    store.cases = [replace(case, label_classes=(1, 4)) if case is aside else case for case in store.cases]
    with pytest.raises(UserError, match=rf"the classes \[4\] are in the cases held aside .* alone \({aside.id}\)"):
        draw_cases(store, labels=4, seed=0)


def test_a_store_without_labels_is_refused(make_store: Callable[..., Store]) -> None:
    with pytest.raises(UserError, match="none of its 3 cases has a label; prepare it from a folder with images/"):
        draw_cases(make_store([(1,)] * 3, labelled=False, size=8), labels=1, seed=0)


def test_test_cases_without_foreground_are_refused(make_store: Callable[..., Store]) -> None:
    store = make_store([(1,)] * 4, size=8)
    [aside] = held_aside(store.cases, 0.2)[1]
    store.cases = [replace(case, label_classes=()) if case is aside else case for case in store.cases]
    with pytest.raises(UserError, match=f"has labelled voxels; label one of {aside.id}, or prepare the labelled cases"):
        draw_cases(store, labels=1, seed=0)


def test_the_crop_follows_the_store_and_the_stride(make_store: Callable[..., Store]) -> None:
    cases = make_store([(1,)] * 3, size=20).cases
    assert choose_crop(cases, 8) == (24, 24, 24)
    assert choose_crop(cases, 8, (16, 30, 33)) == (16, 32, 40)
    # A bottleneck of one voxel would leave instance norm nothing to normalise over.
    assert choose_crop(cases, 32) == (32, 32, 64)
    for wrong in ((8, 8), (0, 8, 8)):
        with pytest.raises(UserError, match="expected three positive numbers"):
            choose_crop(cases, 8, wrong)
