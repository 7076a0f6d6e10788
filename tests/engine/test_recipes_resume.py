"""Every method's small recipe, as it stands: from any checkpoint it goes on as if it had not stopped."""

import shutil
from pathlib import Path

import pytest
from run_results import assert_same_bits, lines_of, state_of

from voxtrast.engine.config import load_config
from voxtrast.engine.pretrain import pretrain
from voxtrast.methods import METHODS, recipe_names

STEPS = 6
WORDS = (f"train.steps={STEPS}", "checkpoint.every=1", "checkpoint.keep=9", "validation.every=3",
         "validation.fraction=0.34", "loader.threads=1", "device=cpu")  # fmt: skip
TINY = [name for name in recipe_names() if name.endswith("-tiny")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_a_recipe_goes_on_from_any_checkpoint_bit_for_bit(recipe: str, tiny_store: Path, tmp_path: Path) -> None:
    def run(name: str) -> Path:
        pretrain(load_config(recipe, [f"data={tiny_store}", f"output={tmp_path / name}", *WORDS]))
        return tmp_path / name

    whole = run("whole")
    assert len(lines_of(whole)) == STEPS
    for taken in (1, 2, 3, 5):  # dira-tiny's stages end after 2, 3 and 6 steps
        resumed = tmp_path / f"from{taken}"
        shutil.copytree(whole, resumed)
        for file in (resumed / "checkpoints").iterdir():
            if int(file.stem.removeprefix("step-")) > taken:
                file.unlink()
        run(resumed.name)
        assert lines_of(resumed) == lines_of(whole), taken
        assert lines_of(resumed, "validation") == lines_of(whole, "validation"), taken
        assert_same_bits(state_of(resumed), state_of(whole))


def test_every_method_has_a_small_recipe() -> None:
    assert {name.removesuffix("-tiny") for name in TINY} == set(METHODS)
