"""One run of the label-efficiency benchmark, in a process of its own: fine-tuning an arm, or probing its features."""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from voxtrast.engine.config import load_config, read_config
from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import RUN_WEIGHTS, load_weights, save_weights

from .label_plan import PLATEAU, SCRATCH, Job, Plan, Task, read_plan
from .machine import machine
from .place import Place
from .voxel_probes import probe

# Of a fine-tuning's line: what it computed, without the paths and names of this machine.
KEPT = ("labels", "seed", "steps", "batch", "learning_rate", "weight_decay", "crop", "flips", "autocast",
        "dice", "hd95", "surface_distance", "cases", "train_cases", "classes", "loss", "seconds", "training_seconds",
        "weights_sha256", "threads")  # fmt: skip


def tune(plan: Plan, task: Task, job: Job, store: Path, run: Path | None, device: str) -> dict[str, Any]:
    """The line of a fine-tuning."""
    settings = dict(task.finetune)
    if job.arm == PLATEAU:
        settings["steps"] = task.plateau_steps
    with tempfile.TemporaryDirectory() as folder:
        weights = run / RUN_WEIGHTS if run else untrained(plan, task, Path(folder))
        line = finetune(
            weights, store, labels=job.labels, seed=job.seed, from_scratch=job.arm in (SCRATCH, PLATEAU), device=device,
            test_cases=task.test_cases, output=folder, progress=False,
            **settings | {"crop": tuple(settings["crop"])},
        )  # fmt: skip
    return {key: line[key] for key in KEPT if key in line}


def untrained(plan: Plan, task: Task, folder: Path) -> Path:
    """A weights file of the network with which each arm's pretraining begins: it depends on the network and the seed,
    not on the method. Training from scratch takes its architecture alone."""
    arm = next(iter(task.pretrain))
    config = load_config(f"{arm}-tiny", plan.words(task, arm))
    file = folder / "untrained.safetensors"
    description = {"format": 1, "backbone": config.backbone.to_dict()}
    save_weights(file, build_method(config).transferable(), description)
    return file


def told_of(run: Path) -> dict[str, Any]:
    """What a pretraining took, from its log and its weights."""
    description = load_weights(run / RUN_WEIGHTS)[1]
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = read_config(run / "config.yaml").train.global_batch
    losses = [line["loss"] for line in lines[-10:] if line["loss"] is not None]  # null where it was not finite
    seconds = [batch / line["samples_per_second"] for line in lines]
    return {
        "recipe": description["recipe"],
        "steps": description["step"],
        "samples": batch * description["step"],
        "seconds": round(sum(seconds), 1),
        "median_step_s": round(statistics.median(seconds), 4),
        "loss": {"first": lines[0]["loss"], "last": statistics.mean(losses) if losses else None},
        "untrained": len(description.get("untrained", [])),
    }


def main(about: dict[str, Any]) -> None:
    torch.set_num_threads(about["threads"])
    job = Job(**about["job"])
    plan = read_plan(Path(about["plan"]) if about["plan"] else None)
    task, store = plan.tasks[job.task], Path(about["store"])
    run = Path(about["pretrained"]) if about["pretrained"] else None
    place = Place(torch.device(about["device"]), torch.float32)
    line: dict[str, Any] = {**machine(place), **vars(job)}
    if run:
        line["pretraining"] = told_of(run)
    if job.kind == "finetune":
        line |= tune(plan, task, job, store, run, about["device"])
    else:
        weights = run / RUN_WEIGHTS if run else None
        line |= probe(plan, task, Store(store), weights, seed=job.seed, device=torch.device(about["device"]))
    result = Path(about["result"])
    result.with_suffix(".part").write_text(json.dumps(line, allow_nan=False), encoding="utf-8")
    result.with_suffix(".part").rename(result)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
