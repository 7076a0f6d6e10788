"""The example, run as it stands."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxtrast.methods import recipe_names

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


TINY = [name for name in recipe_names() if name.endswith("-tiny")]


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name == "cover-tiny" else [pytest.mark.slow]) for name in TINY]
)
def test_it_trains_any_method_through_its_stages(
    recipe: str, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    import plain_loop

    steps = 4 if recipe == "dira-tiny" else 2  # one at least of each stage
    method, totals = plain_loop.main(recipe, tiny_store, steps)
    assert len(totals) == steps
    assert all(math.isfinite(total) for total in totals)
    initial = plain_loop.build(plain_loop.OmegaConf.load(plain_loop.recipe_file(recipe))).state_dict()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert sum(not torch.equal(p, initial[name]) for name, p in trained.items()) > len(trained) / 2


@pytest.mark.slow  # another process imports everything anew
def test_it_runs_from_the_command_line(tiny_store: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "cover-tiny", str(tiny_store), "1"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    assert said.startswith("step 0: loss ")
