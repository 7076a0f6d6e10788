"""An epoch of a recipe's own views by the pipeline alone, and the share of its training steps that is spent waiting."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from voxtrast.engine.config import Config, load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.errors import UserError
from voxtrast.engine.runs import build_method, open_cases

from .. import train
from ..place import Place


def measure_recipe(recipe: str, settings: Sequence[str], place: Place, steps: int) -> list[dict[str, Any]]:
    """Raises: UserError for settings that make no run."""
    if steps < 1:
        raise UserError(f"--steps: expected at least 1, got {steps}")
    config = load_config(recipe, settings)
    if not config.data:
        raise UserError("data: not given; say data=STORE")
    epoch = measure_epoch(config, place)
    (form,), _, _ = train.measure(config, steps, place, names=train.FORMS[:1])
    step = form.whole()
    line = {
        "op": f"views of {config.recipe}",
        "shape": {"crop": list(config.views.crop), "batch": config.train.global_batch},
        "dtype": "float32",
        "provider": "ours",
        "mode": "with reading",
        "workers": config.loader.threads,
        **epoch,
        "training_step_s": step,
        "training_steps": steps,
        "share_of_waiting": form.share_of_waiting(),
    }
    print(
        f"{config.recipe}, crop {config.views.crop}, batch {config.train.global_batch}, {line['workers']} threads\n"
        f"  pipeline alone      {epoch['views_per_s']:.1f} views/s, {epoch['steps']} steps of {epoch['cases']} cases, "
        f"{epoch['cpu_s_per_view'] * 1e3:.1f} ms of a core a view, {epoch['step_s'] * 1e3:.1f} ms a step\n"
        f"  training step       {step * 1e3:.1f} ms without the wait\n"
        f"  waiting for data    {line['share_of_waiting']:.1%} of {steps} training steps",
        flush=True,
    )
    return [line]


def measure_epoch(config: Config, place: Place) -> dict[str, Any]:
    """Steps as fast as they come, as many as an epoch has, after those that the pipeline makes ahead."""
    method = build_method(config)
    store, cases, _, _ = open_cases(config)
    first = method.schedule.moments[-1].first  # of the last stage, as in `bench train`
    batch, prefetch = method.schedule.batch(first, config.train.global_batch), config.loader.prefetch
    options: dict[str, Any] = {"seed": config.seed, "global_batch": batch, "threads": config.loader.threads}
    options |= {"prefetch": prefetch, "device_id": place.device.index if place.on_gpu else None}
    options |= {"sampling": config.sampling, "start_step": first}
    with ViewPipeline(store, cases, method.views, **options) as pipeline:
        used = len(pipeline.planner.cases)
        steps = -(-used // batch)
        for _ in range(prefetch + 2):
            next(pipeline)
        started, busy = _now(place), time.process_time()
        for _ in range(steps):
            next(pipeline)
        seconds, busy = _now(place) - started, time.process_time() - busy
    views = steps * batch * len(method.views.views)
    return {
        "cases": used,
        "steps": steps,
        "step_s": seconds / steps,
        "views_per_s": views / seconds,
        "cpu_s_per_view": busy / views,
    }


def _now(place: Place) -> float:
    if place.on_gpu:
        torch.cuda.synchronize(place.device)
    return time.perf_counter()
