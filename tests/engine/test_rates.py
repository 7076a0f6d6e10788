"""Learning rates that follow the global batch."""

import math

import pytest
from run_results import lines_of
from stand_in import STAGES, Run, recipe

from voxtrast.engine.config import load_config
from voxtrast.engine.errors import UserError
from voxtrast.engine.rates import batch_factor, derivation, stage_rate


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_a_rate_made_for_one_batch_is_that_of_another(rule: str, factor: float, stand_in: None, tmp_path) -> None:
    words = [f"schedule.batch_rule={rule}", "schedule.rule_batch=64", "optimizer.learning_rate=0.0001"]
    config = load_config(str(recipe(tmp_path)), words)
    assert batch_factor(config.schedule, 256) == factor
    assert batch_factor(config.schedule, 64) == 1
    assert stage_rate(config, None, 256) == pytest.approx(1e-4 * factor)
    assert stage_rate(config, 0.01, 16) == pytest.approx({"none": 0.01, "linear": 0.0025, "sqrt": 0.005}[rule])


def test_a_rate_says_where_it_comes_from(stand_in: None, tmp_path) -> None:
    words = ["schedule.batch_rule=linear", "schedule.rule_batch=64", "optimizer.learning_rate=0.0001"]
    config = load_config(str(recipe(tmp_path)), words)
    assert derivation(config, None, 256) == "0.0004 = 0.0001 x 4 (linear, batch 256 for 64)"
    config.schedule.batch_rule = "none"
    assert derivation(config, None, 256) == "0.0001"


def test_every_stage_has_the_rate_of_its_own_batch_and_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("schedule.batch_rule=sqrt", "schedule.rule_batch=4", "schedule.name=constant")
    folder = run("run", *words, "schedule.warmup_steps=2", stages=STAGES)
    root = math.sqrt(2)
    wanted = [0.005 * root, 0.01 * root, 0.0015, 0.003, 0.005, 0.01]
    assert [line["learning_rate"] for line in lines_of(folder)] == pytest.approx(wanted)
    said = capsys.readouterr().err
    assert "8 samples, learning rate 0.0141421 = 0.01 x 1.41421 (sqrt, batch 8 for 4), terms" in said
    assert "4 samples, learning rate 0.003 = 0.003 x 1 (sqrt, batch 4 for 4), terms" in said


def test_a_run_without_stages_says_its_rate_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", "schedule.batch_rule=linear", "schedule.rule_batch=2", "train.steps=2")
    assert capsys.readouterr().err.count("learning rate 0.02 = 0.01 x 2 (linear, batch 4 for 2)") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["schedule.batch_rule=linear"], r"batch_rule=linear with schedule\.rule_batch=0: .*set schedule\.rule_batch"),
        (["schedule.batch_rule=liner"], r"schedule\.batch_rule: 'liner' is not one of .* did you mean 'linear'"),
        (["schedule.rule_batch=-1"], r"schedule\.rule_batch: expected .* 0 or more, got -1"),
    ],
)
def test_a_rule_without_its_batch_is_refused(words: list[str], named: str, stand_in: None, tmp_path) -> None:
    with pytest.raises(UserError, match=named):
        load_config(str(recipe(tmp_path)), words)
