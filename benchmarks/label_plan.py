"""What the label-efficiency benchmark compares, read from its YAML file, and the order of its runs."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from voxtrast.engine.config import load_config
from voxtrast.engine.errors import UserError
from voxtrast.methods import recipe_names

PLAN = "label_efficiency.yaml"
# Scratch begins with another network for each seed. All pretraining begins with one and the same, that of seed 0: the
# initial network is fine-tuned as well, so that its luck is not taken for the methods'.
SCRATCH, PLATEAU, INITIAL = "scratch", "scratch to its plateau", "initial network"
UNTRAINED = (SCRATCH, PLATEAU, INITIAL)
FINETUNE = {"steps", "batch", "learning_rate", "crop", "autocast"}


@dataclass(frozen=True)
class Task:
    """A labelled data set, how it is fine-tuned on, and the words of each arm's pretraining."""

    name: str
    data: str  # folder of raw volumes, with images/ and labels/
    classes: dict[int, str]
    spacing_mm: float
    test_cases: int  # held aside, of all arms and of pretraining
    finetune: dict[str, Any]
    plateau_steps: int
    pretrain: dict[str, list[str]]  # by method


@dataclass(frozen=True)
class Plan:
    backbone: list[str]
    labels: list[int]
    seeds: list[int]
    plateau_labels: list[int]
    pretrain: list[str]
    tasks: dict[str, Task]

    def words(self, task: Task, method: str) -> list[str]:
        """Of the arm's pretraining, after its recipe, but for data and output."""
        return [*self.backbone, *self.pretrain, *task.pretrain[method]]

    def jobs(self) -> Iterator["Job"]:
        """In the order in which they should run: whenever one stops, arms, tasks and seeds are in balance."""
        for seed in self.seeds:
            for labels in self.labels:
                for task in self.tasks.values():
                    if (seed, labels) == (self.seeds[0], self.labels[0]):
                        yield from (Job("pretrain", task.name, method) for method in task.pretrain)
                    for arm in (SCRATCH, INITIAL, *task.pretrain):
                        yield Job("finetune", task.name, arm, labels, seed)
            for task in self.tasks.values():
                for arm in (SCRATCH, *task.pretrain):
                    yield Job("probe", task.name, arm, 0, seed)
                for labels in self.plateau_labels:
                    yield Job("finetune", task.name, PLATEAU, labels, seed)


@dataclass(frozen=True)
class Job:
    kind: str  # pretrain | finetune | probe
    task: str
    arm: str
    labels: int = 0
    seed: int = 0

    @property
    def needs(self) -> "Job | None":
        if self.kind == "pretrain" or self.arm in UNTRAINED:
            return None
        return Job("pretrain", self.task, self.arm)

    def __str__(self) -> str:
        tuned = f", {self.labels} labels, seed {self.seed}" if self.kind == "finetune" else ""
        return f"{self.task}: {self.kind} {self.arm}{tuned}{f', seed {self.seed}' if self.kind == 'probe' else ''}"


def pretraining(plan: Plan, job: Job, transductive: bool) -> str:
    """Checksum of all that decides an arm's weights but code and volumes; the same for all arms that have none."""
    task = plan.tasks[job.task]
    if job.arm in UNTRAINED:
        # Of what a plan says of pretraining, the seed alone decides the network that it begins with.
        seeds = [word for word in plan.words(task, next(iter(task.pretrain))) if word.startswith("seed=")]
        return _checksum(seeds) if job.arm == INITIAL and seeds else "none"
    seen = [task.data, task.spacing_mm, 0 if transductive else task.test_cases]
    recipe = resources.files("voxtrast.methods") / "recipes" / f"{job.arm}-tiny.yaml"
    return _checksum([job.arm, yaml.safe_load(recipe.read_text(encoding="utf-8")), seen, plan.words(task, job.arm)])


def setting(plan: Plan, job: Job, transductive: bool) -> str:
    """Checksum of all that decides a result but code and volumes: lines of another setting are not of this plan."""
    task = asdict(plan.tasks[job.task])
    task.pop("pretrain")
    if job.arm != PLATEAU:
        task.pop("plateau_steps")
    return _checksum([task, plan.backbone, pretraining(plan, job, transductive)])


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_plan(path: Path | None = None) -> Plan:
    """The plan of a file, or the one that comes with the package.

    Raises: UserError naming the key that is wrong.
    """
    source = path or resources.files(__package__) / PLAN
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{source}: cannot be read ({error}); expected a plan as {PLAN}") from None
    values = _exactly(content, {item.name for item in fields(Plan)}, str(source))
    names = {item.name for item in fields(Task)} - {"name"}
    tasks = {
        name: Task(name, **_exactly(task, names, f"{source}: tasks.{name}")) for name, task in values["tasks"].items()
    }
    plan = Plan(**{**values, "tasks": tasks})
    for task in tasks.values():
        if not task.pretrain:
            raise UserError(f"{source}: tasks.{task.name}.pretrain: names no method; name one at least")
        _exactly(task.finetune, FINETUNE, f"{source}: tasks.{task.name}.finetune")
        for method in task.pretrain:
            if f"{method}-tiny" not in recipe_names():
                raise UserError(f"{source}: tasks.{task.name}.pretrain: there is no recipe {method}-tiny")
            load_config(f"{method}-tiny", plan.words(task, method))
    return plan


def _exactly(values: Any, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or set(values) != names:
        found = sorted(values) if isinstance(values, dict) else values
        raise UserError(f"{where}: expected the keys {', '.join(sorted(names))}, found {found}")
    return values
