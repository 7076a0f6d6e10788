"""Fine-tuning with few labels, against the same network from scratch at the same budget."""

import copy
import json
import math
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
from ..weights import SEGMENTATION, find_weights, first_few, load_into, load_weights
from .cases import choose_crop, draw_cases, read_case, seen_in_pretraining
from .evaluation import evaluate
from .inference import (
    OVERLAP,
    check_mirrored,
    check_overlap,
    find_device,
    is_out_of_memory,
    lacking_memory,
    mirror_axes,
)
from .model import save_model
from .scoring import distances, in_words, summarise
from .training import Budget, train
from .tuning import Plan, Tuning, layers_of

RESULTS = "finetune.jsonl"
MORE_MEMORY = "use a machine with more of it, or a store of fewer classes or a larger --spacing-mm"
FINETUNE_AUTOCAST = ("none", "bfloat16")
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
    autocast: str = "none",
    test_cases: int | None = None,
    freeze: str = "none",
    layer_decay: float = 1.0,
    head_warmup: int = 0,
    overlap: float = OVERLAP,
    mirror: str = "",
    surface: bool = True,
    output: Path | str | None = None,
    device: str = "auto",
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
        steps: of training, in both arms.
        batch: crops a step.
        learning_rate: the one-cycle schedule's highest.
        weight_decay: AdamW's.
        crop: (D, H, W) voxels, rounded up to multiples of the network's stride; default: the store's median shape.
        flips: mirror the axes at random. Off by default: organs and label names have sides.
        autocast: "none", or "bfloat16" for mixed precision in training; the test is in float32.
        test_cases: how many cases of the store are held aside; default: the share that pretraining holds aside.
        freeze: "none", "encoder", or "encoder:STEPS" for the first steps alone.
        layer_decay: the learning rate of each layer is that of the one above it, from the head down to the stem,
            times this.
        head_warmup: steps in which only what pretraining did not fill is trained.
        overlap: of neighbouring windows at the test, a share of their sides.
        mirror: axes to mirror at the test, as "w" or "d,h,w".
        surface: measure distances between surfaces beside the Dice.
        output: folder of the results; default: `finetune` beside the weights.
        device: a torch device, or auto: the GPU where there is one.
        progress: show progress bars.

    Returns: the line that was appended.

    Raises: UserError.
    """
    started = time.perf_counter()
    source = find_weights(weights)
    tensors, description = load_weights(source)
    if description.get("kind") == SEGMENTATION:
        raise UserError(f"{source}: is a fine-tuned model; give the weights of a pretraining")
    if "module" in description:
        raise UserError(f"{source}: holds {description['module']!r} of a network alone; give the run that it is from")
    config = _backbone(source, description)
    data = Store(Path(store))
    split = draw_cases(data, labels=labels, seed=seed, test_cases=test_cases)
    used = copy.copy(data)
    used.cases = [*split.train, *split.test]
    used.verify(contents=True)
    if min(steps, batch) < 1 or learning_rate <= 0:
        raise UserError(f"steps {steps}, batch {batch}, learning rate {learning_rate}: expected positive numbers")
    if autocast not in FINETUNE_AUTOCAST:
        raise UserError(f"--autocast {autocast}: expected {' or '.join(FINETUNE_AUTOCAST)}")
    # Of all cases, not of the drawn ones: the crop must not change with the seed.
    labelled = [case for case in data.cases if case.label_sha256 is not None]
    sides = choose_crop(labelled, config.stride, crop)
    budget = Budget(steps, batch, learning_rate, weight_decay, sides, flips, autocast)
    tuning = Tuning(freeze, layer_decay, head_warmup)
    tuning.frozen_steps(steps)  # refuses what cannot be
    if from_scratch and not tuning.is_default:
        raise UserError("--from-scratch has no pretrained tensors: leave --freeze, --layer-decay and --head-warmup out")
    check_overlap(overlap)
    axes = mirror_axes(mirror)
    check_mirrored(axes, flips)
    console = Console(stderr=True, quiet=not progress, markup=False)
    if crop is not None and tuple(crop) != budget.crop:
        console.print(f"crop {tuple(crop)} rounded up to {budget.crop}: multiples of {config.stride}")
    target = find_device(device)
    largest = max(math.prod(case.shape) for case in split.test)
    if lacking := lacking_memory(len(split.classes), largest):
        raise UserError(f"{data.path}: the logits of a test case: {lacking}; {MORE_MEMORY}")
    seen = None if from_scratch else seen_in_pretraining(description, data, split.test)
    if seen:
        console.print(
            f"note: pretraining saw the images of {seen} of the {len(split.test)} test cases (validation.fraction="
            f"{description['data']['validation_fraction']:g}): say so beside the Dice",
            highlight=False,
        )
    folder = _writable(Path(output) if output is not None else source.parent / "finetune")
    arm = "scratch" if from_scratch else "pretrained"

    network = _seeded_network(config, len(split.classes), seed)
    plan = None
    if not from_scratch:
        listed = dict.fromkeys([*description.get("untrained", []), *description.get("not_pretrained", [])])
        untrained = [name for name in listed if name in tensors]
        try:
            new = load_into(network, tensors, untrained)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if untrained:
            console.print(f"{len(untrained)} tensors were not pretrained: {first_few(untrained)}", highlight=False)
        if not tuning.is_default:
            plan = Plan(network, layers_of(network, config, new, layer_decay), tuning, steps)
            console.print(plan.describe(learning_rate), highlight=False)
    network.to(target)
    with _progress(progress) as bars:
        task = bars.add_task(f"train ({arm}, {labels} labels)", total=steps, note="")
        training_cases = [read_case(data, case, split.classes) for case in split.train]
        training_started = time.perf_counter()
        with _out_of_memory_told("lower --batch or --crop, or take --autocast bfloat16"):
            losses = train(
                network,
                training_cases,
                budget,
                classes=len(split.classes),
                seed=seed,
                device=target,
                report=lambda step, loss: bars.update(task, completed=step, note=f"loss {loss:.3f}"),
                plan=plan,
            )
        training_seconds = time.perf_counter() - training_started
        run = {"arm": arm, "labels": labels, "seed": seed}
        settings = [file_sha256(source), file_sha256(data.path / INDEX), asdict(budget), asdict(tuning)]
        model = save_model(folder, network, data, split.classes, budget, description, run, settings)
        task_test = bars.add_task("test", total=len(split.test), note="")
        with _out_of_memory_told(f"the model is in {model}; {MORE_MEMORY}"):
            results = evaluate(
                network,
                (read_case(data, case, split.classes) for case in split.test),
                classes=split.classes,
                crop=budget.crop,
                device=target,
                report=lambda case: bars.advance(task_test),
                overlap=overlap,
                mirror=axes,
                surface=surface,
            )

    line = {
        **run,
        **asdict(budget),
        "crop": list(budget.crop),
        **asdict(tuning),
        **({"tuned": plan.summary(learning_rate)} if plan else {}),
        "overlap": overlap,
        "mirror": list(axes),
        "dice": summarise(results),
        **(distances(results) if surface else {}),
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
        "test_cases_pretrained_on": seen,
        "backbone": config.to_dict(),
        "store": str(store),
        "store_sha256": file_sha256(data.path / INDEX),
        "model": str(model),
        "model_sha256": file_sha256(model),
        "device": str(target),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    _append(folder / RESULTS, line)
    console.print(
        f"{arm}, {labels} labels, seed {seed}: {in_words(line)} on {len(results)} test cases after "
        f"{line['seconds']:.0f} s; {folder / RESULTS}, {model}",
        highlight=False,
        soft_wrap=True,  # a path that is broken into lines cannot be copied
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
def _out_of_memory_told(advice: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"memory ran out ({str(error).splitlines()[0]}); {advice}") from error


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
