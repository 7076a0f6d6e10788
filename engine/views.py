"""`voxtrast views`: the views of a recipe on one's own store, as plans to read and as a sheet to look at."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..methods.views import ViewSpec
from .config import Config, load_config
from .data.pipeline import ViewPipeline
from .data.planner import Plan
from .data.sampling import of_validation
from .errors import UserError
from .runs import build_method, open_cases
from .weights import write_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="voxtrast views",
        description="Draw the views that a run would train on: the same settings, the same views.",
    )
    parser.add_argument("recipe", help="name of a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="data=STORE seed=S views.… as for pretrain")
    parser.add_argument("--step", type=int, default=0, help="which step of the run (default 0)")
    parser.add_argument("--slots", type=int, default=3, help="how many samples of its batch (default 3)")
    parser.add_argument("--split", choices=("train", "validation"), default="train")
    parser.add_argument("--output", type=Path, default=Path("views.png"), help="the picture (default views.png)")
    parser.add_argument("--plans", action="store_true", help="also print what was decided about each sample")
    parsed = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(parsed.recipe, parsed.settings)
        if not config.data:
            raise UserError("data: not given; say data=STORE")
        if parsed.step < 0 or parsed.slots < 1:
            raise UserError(f"--step {parsed.step} --slots {parsed.slots}: expected at least 0, and at least 1")
        draw_views(config, parsed.output, parsed.step, parsed.slots, parsed.split, parsed.plans)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw_views(config: Config, output: Path, step: int, slots: int, split: str, plans: bool) -> None:
    """Writes the sheet of the first samples of one step, and prints their plans where asked to."""
    picture = sheet(config, build_method(config).views, step, slots, split, plans)
    write_whole(output, lambda partial: partial.write_bytes(picture))
    print(f"wrote {output}", file=sys.stderr)


def sheet(config: Config, spec: ViewSpec, step: int, slots: int, split: str, plans: bool = False) -> bytes:
    """The sheet as PNG."""
    try:
        from .reporting.view_sheet import draw_sheet
    except ImportError as error:
        raise UserError(
            f"{error.name}: not installed, and the sheet is drawn with it; pip install {error.name}"
        ) from None
    rows = []
    for plan, case, sample in samples(config, spec, step, slots, split):
        rows.append((f"{case}\nstep {plan.step} slot {plan.slot}", panels(spec, plan, sample)))
        if plans:
            print(plan.describe(), end="\n\n")
    return draw_sheet(rows)


def samples(
    config: Config, spec: ViewSpec, step: int, slots: int, split: str
) -> list[tuple[Plan, str, dict[str, Any]]]:
    store, cases, aside, _ = open_cases(config)
    if split == "validation" and not aside:
        raise UserError("--split validation: no case is held aside (validation.fraction=0); look at train")
    schedule = build_method(config).schedule
    found: list[tuple[Plan, str, dict[str, Any]]] = []
    while len(found) < slots:
        moment = schedule.at(step)
        batch = config.train.global_batch if split == "validation" else schedule.batch(step, config.train.global_batch)
        with ViewPipeline(
            store,
            cases if split == "train" else aside,
            spec,
            seed=config.seed,
            global_batch=batch,
            start_step=step,
            split=split,
            threads=config.loader.threads,
            prefetch=0,
            sampling=config.sampling if split == "train" else of_validation(config.sampling),
            on_error=config.loader.on_error,
        ) as views:
            for (values,) in views:
                for slot in range(min(batch, slots - len(found))):
                    sample = {key: value[slot] for key, value in values.items() if isinstance(value, Tensor)}
                    found.append((views.plan(step, slot), values["case"][slot], sample))
                step += 1
                if len(found) >= slots or step == moment.last:
                    break
    return found


def panels(spec: ViewSpec, plan: Plan, sample: dict[str, Any]) -> list[Any]:
    """The views of a sample, each followed by what else was made with its geometry."""
    from .reporting.view_sheet import Panel

    def window(image: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(image, (0.5, 99.5))
        return float(low), float(high)

    made = []
    for name, view in spec.views.items():
        image, drawn = sample[name][0].cpu().numpy(), plan.views[name]
        made.append(Panel(name, image, drawn, window(image), with_points=True))
        if view.clean:
            clean = sample[f"{name}_clean"][0].cpu().numpy()
            made.append(Panel(f"{name}, clean", clean, drawn, window(clean)))
        if view.displacement:
            field, mask = sample["displacement"].cpu().numpy(), sample["mask"][0].cpu().numpy()
            reach = max(1.0, float(np.abs(field).max()))
            length = np.sqrt((field**2).sum(0))
            made.append(Panel(f"displacement, 0 to {reach:.1f} voxels", length, drawn, (0.0, reach)))
            made.append(Panel("mask", mask, drawn, (0.0, 1.0)))
    return made
