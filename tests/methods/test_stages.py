import itertools
import math

import pytest

from voxtrast.methods.stages import Stage, StageSchedule, Weight, read_weight

OWN = {"discriminative": 1.0, "restorative": 10.0, "adversarial": 0.0}


def test_without_stages_the_methods_own_terms_are_active_but_for_those_of_weight_zero() -> None:
    schedule = StageSchedule((), 100, OWN)
    assert schedule.weights(0) == schedule.weights(99) == {"discriminative": 1.0, "restorative": 10.0}
    assert (schedule.moments[0].first, schedule.moments[0].last) == (0, 100)


def test_shares_divide_the_steps() -> None:
    schedule = StageSchedule([Stage("a", 1), Stage("b", 2), Stage("c", 1)], 10, OWN)
    assert [(moment.first, moment.last) for moment in schedule.moments] == [(0, 2), (2, 8), (8, 10)]
    assert [schedule.at(step).stage.name for step in (0, 1, 2, 7, 8, 9, 50)] == ["a", "a", "b", "b", "c", "c", "c"]


@pytest.mark.parametrize("steps", [38, 100, 999])
def test_every_step_belongs_to_one_stage(steps: int) -> None:
    schedule = StageSchedule([Stage(str(i), share) for i, share in enumerate((0.1, 3, 0.7))], steps, OWN)
    bounds = [(moment.first, moment.last) for moment in schedule.moments]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == steps
    assert all(before[1] == after[0] for before, after in itertools.pairwise(bounds))


def test_a_term_that_a_stage_does_not_name_is_not_active() -> None:
    stages = [Stage("d", terms={"discriminative": 1}), Stage("d+r"), Stage("a", terms={"adversarial": 0.001})]
    schedule = StageSchedule(stages, 30, OWN)
    assert schedule.weights(0) == {"discriminative": 1.0}
    assert schedule.weights(10) == {"discriminative": 1.0, "restorative": 10.0}
    assert schedule.weights(20) == {"adversarial": 0.001}
    assert [schedule.ever(term) for term in (*OWN, "other")] == [True, True, True, False]
    assert not StageSchedule((), 30, OWN).ever("adversarial")


def test_a_weight_follows_its_curve_over_its_own_stage() -> None:
    terms = {
        "discriminative": {"start": 2, "end": 0},
        "restorative": {"start": 10, "end": 1, "curve": "cosine"},
    }
    schedule = StageSchedule([Stage("before"), Stage("falling", terms=terms)], 40, OWN)
    for step in range(20, 40):
        progress = (step - 20) / 20
        found = schedule.weights(step)
        assert found["discriminative"] == pytest.approx(2 - 2 * progress)
        assert found["restorative"] == pytest.approx(1 + 9 * (1 + math.cos(math.pi * progress)) / 2)
    assert schedule.weights(40) == {"restorative": pytest.approx(1.0)}  # what has come to 0 is not computed


def test_a_single_number_is_a_constant_weight() -> None:
    assert read_weight("here", 3) == Weight(3.0, 3.0)
    assert read_weight("here", {"start": 3}).at(0.7) == 3.0


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("a", share=0), r"stages\[0\]\.share: expected a finite number, more than 0, got 0"),
        (Stage("a", share=math.inf), r"stages\[0\]\.share"),
        (Stage("a", terms={"restoration": 1}), r"stages\[0\]\.terms: 'restoration' is no term of the method; it has"),
        (Stage("a", terms={"restorative": -1}), r"stages\[0\]\.terms\.restorative: expected a finite number, 0 or"),
        (Stage("a", terms={"restorative": True}), r"stages\[0\]\.terms\.restorative: .* got True"),
        (Stage("a", terms={"restorative": {"begin": 1}}), r"stages\[0\]\.terms\.restorative: unknown \['begin'\]"),
        (Stage("a", terms={"restorative": {"end": 1}}), r"stages\[0\]\.terms\.restorative: .* got None"),
        (Stage("a", terms={"restorative": {"start": 1, "curve": "step"}}), r"\.curve: 'step' is not one of linear"),
    ],
)
def test_a_stage_that_is_wrong_is_named(stage: Stage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageSchedule([stage], 10, OWN)
