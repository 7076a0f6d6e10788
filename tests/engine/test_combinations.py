"""Settings that cannot work together are refused by both their names, before anything is started."""

from pathlib import Path

import pytest
from stand_in import recipe

from voxtrast.engine import combinations
from voxtrast.engine.combinations import TABLE, check_combinations
from voxtrast.engine.config import Config, load_config
from voxtrast.engine.errors import UserError


def config_with(tmp_path: Path, **settings: object) -> Config:
    config = load_config(str(recipe(tmp_path)))
    for key, value in settings.items():
        group, name = key.split("__")
        setattr(getattr(config, group), name, value)
    return config


@pytest.mark.parametrize(
    ("settings", "place", "named"),
    [
        ({"optimizer__name": "lamb", "deepspeed__zero_stage": 1}, {},
         r"optimizer\.name=lamb with deepspeed\.zero_stage=1: .*norm of every layer.*zero_stage=0, or optimizer\.name"),
        ({"adversary_optimizer__name": "apex_fused_lamb", "deepspeed__zero_stage": 2}, {}, r"^adversary_optim"),
        ({"optimizer__name": "apex_fused_adam"}, {"device": "cpu"}, r"with device=cpu: its step is a CUDA kernel"),
        ({"method__adversary": "wgan_gp", "train__autocast": "float16"}, {}, r"not scaled.*bfloat16"),
        ({"backbone__compile": True, "backbone__checkpoint_levels": 2}, {},
         r"backbone\.compile=true with backbone\.checkpoint_levels=2: .*levels=0, or backbone\.compile=false"),
        ({"backbone__compile": True, "deepspeed__zero_stage": 3}, {}, r"gathers the parameters.*zero_stage=2"),
    ],
)  # fmt: skip
def test_a_pair_is_refused_with_reason_and_remedy(
    settings: dict[str, object], place: dict[str, object], named: str, stand_in: None, tmp_path: Path
) -> None:
    config = config_with(tmp_path, **settings)
    with pytest.raises(UserError, match=named):
        check_combinations(config, **place)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"optimizer__name": "lamb"}, {"device": "cpu"}),
        ({"optimizer__name": "apex_fused_adam"}, {"device": "cuda"}),
        ({"optimizer__name": "apex_fused_adam"}, {}),  # not known yet
        ({"method__adversary": "wgan_gp", "train__autocast": "bfloat16"}, {}),
        ({"backbone__compile": True}, {}),
    ],
)
def test_what_fits_is_not_refused(settings: dict[str, object], place: dict[str, str], stand_in, tmp_path: Path) -> None:
    check_combinations(config_with(tmp_path, **settings), **place)


def test_a_row_can_be_added(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = combinations.Combination("device", ("cuda",), "method.name", ("stand_in",), "it is alone", "leave")
    monkeypatch.setattr(combinations, "TABLE", (*TABLE, row))
    check_combinations(config_with(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"device=cuda with method\.name=stand_in: it is alone; leave"):
        check_combinations(config_with(tmp_path), device="cuda")


def test_words_are_looked_at_as_well(stand_in: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.name=lamb with deepspeed\.zero_stage=1"):
        load_config(str(recipe(tmp_path)), ["optimizer.name=lamb", "deepspeed.zero_stage=1"])
