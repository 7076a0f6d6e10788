from pathlib import Path

import pytest
from omegaconf import OmegaConf

from voxtrast.engine.config import CHOICES, differences, load_config, read_config, write_config
from voxtrast.engine.errors import UserError
from voxtrast.methods import recipe_names

WORDS = ["data=store", "output=run"]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid(recipe: str) -> None:
    config = load_config(recipe, WORDS)
    assert config.recipe == recipe
    assert len(config.views.crop) == config.backbone.dimensions


def test_words_override_the_recipe_and_keep_their_types() -> None:
    config = load_config(
        "cover-tiny", [*WORDS, "views.crop=[32,32,24]", "views.affine.rotation_degrees=7", "train.steps=90"]
    )
    assert config.views.crop == [32, 32, 24]
    assert config.views.affine.rotation_degrees == 7.0
    assert config.train.steps == 90


def test_what_a_recipe_leaves_empty_of_the_backbone_becomes_the_architectures_own(tmp_path: Path) -> None:
    words = [*WORDS, "backbone.architecture=resnet18_unet", "backbone.features=[]", "backbone.norm=''"]
    config = load_config("cover-tiny", words)
    assert config.backbone.features == [64, 64, 128, 256, 512]
    assert (config.backbone.encoder_blocks, config.backbone.norm) == ([2, 2, 2, 2], "batch")
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_data_sets_are_weighted_by_their_folders() -> None:
    config = load_config("cover-tiny", [*WORDS, "sampling.weights.mr=2", "sampling.weights.ct/chest=0.5"])
    assert config.sampling.weights == {"mr": 2.0, "ct/chest": 0.5}
    assert differences(config, load_config("cover-tiny", WORDS))


def test_words_reach_into_the_lists_of_a_recipe() -> None:
    plain = load_config("dira-tiny", WORDS)
    changed = load_config("dira-tiny", [*WORDS, "stages.2.global_batch=8", "stages[1].terms.restorative=3.5",
                                        "views.crop.0=32", "views.crop.0=40"])  # fmt: skip
    assert [stage.global_batch for stage in changed.stages] == [None, None, 8]
    assert changed.stages[1].terms == {"discriminative": 1.0, "restorative": 3.5}
    assert changed.stages[0] == plain.stages[0]
    assert changed.views.crop == [40, *plain.views.crop[1:]]


@pytest.mark.parametrize("word", ["stages.3.share=2", "stages.last.share=2", "views.crop={a: 1}", "views.crop.7=8"])
def test_a_place_that_a_recipe_does_not_have_is_named(word: str) -> None:
    with pytest.raises(UserError, match=rf"^{word.split('=')[0]}: the recipe has no such place"):
        load_config("dira-tiny", [word])


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("train.stpes=3", "'train.steps'"),
        ("steps=3", "'train.steps'"),
        ("rotation_degrees=3", "'views.affine.rotation_degrees'"),
        ("optimiser.name=adam", "'optimizer.name'"),
        ("view.crop=[8,8,8]", "'views.crop'"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(word: str, named: str) -> None:
    with pytest.raises(UserError, match="unknown") as caught:
        load_config("cover-tiny", [word])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.name=adamm", "did you mean 'adam"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "more than 0"),
        ("optimizer.weight_decay=-1", "0 or more"),
        ("deepspeed.zero_stage=7", "zero_stage"),
        ("validation.fraction=1.5", "validation.fraction"),
        ("method.name=covr", "did you mean 'cover'"),
        ("train.steps", "key=value"),
        ("--steps=3", "key=value"),
        ("views.crop=[16,16", "not readable"),
        ("data=${nowhere}", "nowhere"),
        ("views=null", "views"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("adversary_optimizer.betas=[0.9]", "adversary_optimizer.betas: expected two"),
        ("adversary_optimizer.learning_rate=0", "adversary_optimizer.learning_rate"),
        ("adversary_optimizer.name=adamm", "adversary_optimizer.name"),
        ("stages.0.share=2", "stages: expected a list"),
        ("optimizer.learning_rate=nan", "finite"),
        ("optimizer.learning_rate=1e999", "finite"),
        ("schedule.final_fraction=3", "final_fraction"),
        ("sampling.foreground=1.5", "sampling.foreground"),
        ("sampling.crops_per_visit=0", "more than 0"),
        ("sampling.weights.mr=0", "sampling.weights.mr"),
        ("sampling.weights.mr=often", "sampling.weights.mr"),
        ("sampling=null", "sampling"),
        ("loader.on_error=ignore", "substitute, raise"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("'", ".")):
        load_config("cover-tiny", [word])


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CHOICES.items() for value in values])
def test_every_choice_can_be_written(key: str, value: str) -> None:
    needed = ["schedule.rule_batch=8", *(["deepspeed.zero_stage=1"] if key == "deepspeed.offload_optimizer" else [])]
    config = OmegaConf.structured(load_config("cover-tiny", [*needed, f"{key}={value}"]))
    assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize("content", ["", "method: {name: cov", "method: {name: cover}\ntrain: {stpes: 3}\n"])
def test_a_damaged_configuration_of_a_run_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml: damaged"):
        read_config(tmp_path / "config.yaml")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="cover-3d"):
        load_config("cover-3")


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: {name: cover}\ntrain: {steps: 3}\n")
    assert load_config(str(recipe), WORDS).train.steps == 3
    recipe.write_text("method: {name: cover\n")
    with pytest.raises(UserError, match="YAML"):
        load_config(str(recipe))


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config("cover-3d", [*WORDS, "deepspeed.extra.wall_clock_breakdown=true"])
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_differences_list_what_a_resumed_run_must_not_change() -> None:
    old = load_config("cover-tiny", WORDS)
    assert differences(old, load_config("cover-tiny", [*WORDS, "train.steps=70", "checkpoint.every=3"])) == []
    changed = differences(old, load_config("cover-tiny", [*WORDS, "seed=3", "method.radius=3"]))
    assert changed == ["method.radius: 2 -> 3", "seed: 0 -> 3"]
