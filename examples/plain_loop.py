"""Pretraining by any method in a loop of one's own: no configuration of the engine, no trainer, no DeepSpeed.

python examples/plain_loop.py RECIPE STORE [STEPS]

Of the engine it takes the data alone: a store that `voxtrast prepare` wrote, and the pipeline that makes the views.
"""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.data.sampling import Sampling
from voxtrast.engine.data.store import Store
from voxtrast.methods import METHODS, BackboneConfig, Method
from voxtrast.methods.stages import Stage


def recipe_file(name: str) -> str:
    return str(resources.files("voxtrast.methods") / "recipes" / f"{name}.yaml")


def typed(schema: Any, values: Any) -> Any:
    """A group of a recipe as its dataclass: defaults filled in, unknown keys refused."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def build(recipe: Any, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    kind = METHODS[recipe.method.name]
    method: Method = kind(
        typed(kind.Config, recipe.method), typed(BackboneConfig, recipe.backbone), typed(kind.Views, recipe.views)
    )
    method.seed = seed
    return method


def minimise(losses: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> float:
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total.item()


def main(name: str, store: Path, steps: int) -> tuple[nn.Module, list[float]]:
    recipe: Any = OmegaConf.load(recipe_file(name))
    method, data, totals = build(recipe), Store(store), []
    method.set_stages([typed(Stage, stage) for stage in recipe.get("stages", [])], steps)
    optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=1e-4), lr=1e-3)
    critic = torch.optim.Adam(method.adversary.parameters(), lr=2e-4) if method.adversary else None
    sampling = typed(Sampling, recipe.get("sampling", {}))
    with ViewPipeline(
        data, data.cases, method.views, seed=0, global_batch=recipe.train.global_batch, sampling=sampling
    ) as views:
        for step, (batch,) in zip(range(steps), views, strict=False):
            totals.append(minimise(method(batch, step), optimizer))
            if critic and method.adversary and "adversarial" in method.weights(step):
                minimise(method.adversary(*method.adversary_inputs(batch)), critic)
            method.after_step(step)
            print(f"step {step}: loss {totals[-1]:.4f}")
    return method, totals


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 100)
