"""Fine-tuning with few labels, against the same network from scratch at the same budget."""

import copy
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ...methods.backbone import BackboneConfig, build_network
from ..data.store import INDEX, Store, file_sha256
from ..errors import UserError
from ..weights import FORMAT, find_weights, first_few, load_into, load_weights, save_weights
from .cases import choose_crop, draw_cases, read_case
from .evaluation import evaluate, summarise
from .training import Budget, train

RESULTS = "finetune.jsonl"
VERSIONS = ("voxtrast", "torch", "monai", "dynamic-network-architectures")


def finetune(
    weights: Path | str,
    store: Path | str,
    *,
    labels: int,
    seed: int,
    from_scratch: bool = False,
    steps: int = 300,
    batch: int = 2,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    crop: tuple[int, int, int] | None = None,
    flips: bool = False,
    test_cases: int | None = None,
    output: Path | str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Trains on `labels` cases of the store, tests on the cases held aside, appends one line to `finetune.jsonl`.

    Both arms of a comparison get the same cases, the same crops and augmentations, the same initial segmentation
    layer and the same number of steps; only the tensors of the weights file differ. On the CPU a repetition gives
    the same numbers.

    Args:
        weights: weights file or run folder. `from_scratch` takes its backbone alone.
        store: a prepared store with labels.
        labels: number of labelled training cases.
        seed: of the cases drawn, the initial weights, the crops and the augmentations.
        steps, batch, learning_rate, weight_decay: see `Budget`.
        crop: (D, H, W) voxels, rounded up to multiples of the network's stride; default: the store's median shape.
        flips: mirror the axes at random. Off by default: organs and label names have sides.
        test_cases: how many cases of the store are held aside; default: the share that pretraining holds aside.
        output: folder of the results; default: `finetune` beside the weights.
        device: a torch device.
        progress: show progress bars.

    Returns: the line that was appended.

    Raises: UserError.
    """
    started = time.perf_counter()
    source = find_weights(weights)
    tensors, description = load_weights(source)
    config = _backbone(source, description)
    data = Store(Path(store))
    split = draw_cases(data, labels=labels, seed=seed, test_cases=test_cases)
    used = copy.copy(data)
    used.cases = [*split.train, *split.test]
    used.verify(contents=True)
    if min(steps, batch) < 1 or learning_rate <= 0:
        raise UserError(f"steps {steps}, batch {batch}, learning rate {learning_rate}: expected positive numbers")
    # Of all cases, not of the drawn ones: the crop must not change with the seed.
    labelled = [case for case in data.cases if case.label_sha256 is not None]
    budget = Budget(steps, batch, learning_rate, weight_decay, choose_crop(labelled, config.stride, crop), flips)
    console = Console(stderr=True, quiet=not progress)
    if crop is not None and tuple(crop) != budget.crop:
        console.print(f"crop {tuple(crop)} rounded up to {budget.crop}: multiples of {config.stride}")
    target = _device(device)
    folder = _writable(Path(output) if output is not None else source.parent / "finetune")
    arm = "scratch" if from_scratch else "pretrained"

    network = _seeded_network(config, len(split.classes), seed)
    if not from_scratch:
        untrained = description.get("untrained", [])
        load_into(network, tensors, untrained)
        if untrained:
            console.print(f"{len(untrained)} tensors were not pretrained: {first_few(untrained)}", highlight=False)
    network.to(target)
    with _progress(progress) as bars:
        task = bars.add_task(f"train ({arm}, {labels} labels)", total=steps, note="")
        training_cases = [read_case(data, case, split.classes) for case in split.train]
        training_started = time.perf_counter()
        losses = train(
            network,
            training_cases,
            budget,
            classes=len(split.classes),
            seed=seed,
            device=target,
            report=lambda step, loss: bars.update(task, completed=step, note=f"loss {loss:.3f}"),
        )
        training_seconds = time.perf_counter() - training_started
        task_test = bars.add_task("test", total=len(split.test), note="")
        results = evaluate(
            network,
            (read_case(data, case, split.classes) for case in split.test),
            classes=split.classes,
            crop=budget.crop,
            device=target,
            report=lambda case: bars.advance(task_test),
        )

    model = folder / f"{arm}-labels{labels}-seed{seed}.safetensors"
    _save_model(model, network, data, split.classes, budget, description, arm, labels, seed)
    line = {
        "arm": arm,
        "labels": labels,
        "seed": seed,
        **asdict(budget),
        "crop": list(budget.crop),
        "dice": summarise(results),
        "cases": results,
        "train_cases": [case.id for case in split.train],
        "classes": list(split.classes),
        "loss": {"first": losses[0], "last": sum(losses[-10:]) / len(losses[-10:])},
        "seconds": round(time.perf_counter() - started, 2),
        "training_seconds": round(training_seconds, 2),
        "weights": str(source),
        "weights_sha256": file_sha256(source),
        "method": description.get("method"),
        "recipe": description.get("recipe"),
        "pretraining_steps": description.get("step"),
        "backbone": config.to_dict(),
        "store": str(store),
        "store_sha256": file_sha256(data.path / INDEX),
        "model": str(model),
        "device": str(target),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    _append(folder / RESULTS, line)
    classes = ", ".join(f"{value}: {dice:.3f}" for value, dice in line["dice"]["classes"].items() if dice is not None)
    console.print(
        f"{arm}, {labels} labels, seed {seed}: Dice {line['dice']['mean']:.3f} ({classes}) on "
        f"{len(results)} test cases after {line['seconds']:.0f} s; {folder / RESULTS}",
        highlight=False,
    )
    return line


def _backbone(source: Path, description: dict[str, Any]) -> BackboneConfig:
    try:
        config = BackboneConfig.from_dict(description["backbone"])
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{source}: its backbone cannot be built ({error}); use the version of voxtrast that "
            f"wrote it ({description.get('version', 'unknown')})"
        ) from error
    if config.dimensions != 3:
        raise UserError(
            f"{source}: holds a {config.dimensions}-D network, fine-tuning segments 3-D volumes; use the "
            "weights of a 3-D recipe, or `voxtrast export` and a code base that segments slices (nnU-Net's 2d)"
        )
    if config.input_channels != 1:
        raise UserError(
            f"{source}: its network takes {config.input_channels} channels, a store's volumes have 1; "
            "use weights pretrained with backbone.input_channels=1"
        )
    return config


def _seeded_network(config: BackboneConfig, classes: int, seed: int) -> nn.Module:
    """Initial weights by the seed alone, without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_network(config, classes)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: not usable here ({str(error).splitlines()[0]}); take cpu") from error
    return device


def _save_model(
    path: Path,
    network: nn.Module,
    store: Store,
    classes: tuple[int, ...],
    budget: Budget,
    description: dict[str, Any],
    arm: str,
    labels: int,
    seed: int,
) -> None:
    """The whole network, with what predicting on new images needs: classes, crop and how the store was prepared."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("decoder.encoder.")}
    spacings = {case.spacing_mm for case in store.cases}
    save_weights(
        path,
        tensors,
        {
            "format": FORMAT,
            "kind": "segmentation",
            "method": description.get("method"),
            "recipe": description.get("recipe"),
            "step": budget.steps,
            "backbone": description["backbone"],
            "version": version("voxtrast"),
            "arm": arm,
            "labels": labels,
            "seed": seed,
            "classes": list(classes),
            "crop": list(budget.crop),
            "spacing_mm": list(spacings.pop()) if len(spacings) == 1 else None,
            "prepare": store.settings,
        },
    )


def _writable(folder: Path) -> Path:
    """Makes the folder: better to fail before training than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name another folder for the results"
        ) from error
    return folder


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        # One write: lines of runs that end at the same moment do not mix.
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or name another folder") from error


@contextmanager
def _progress(shown: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bars:
        yield bars
