"""Trains the same two steps on one rank and on two, and compares: what every run rests on."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import State, finished_checkpoints, load_checkpoint
from ..config import load_config
from ..data.store import FORMAT, Case, write_array, write_index, write_settings
from ..launch import one_node
from ..meeting import free_port
from ..runs import build_method
from ..signals import run_within
from .finding import BROKEN, GOOD, Finding

RECIPE = "cover-tiny"
# Plain gradient descent: the way of the parameters is the gradient times the rate.
SETTINGS = (
    "backbone.features=[8,16,16]", "backbone.encoder_blocks=[1]", "backbone.decoder_blocks=[1]", "method.units=[2,1,1]",
    "method.radius=1", "method.max_unreachable=1", "views.crop=[16,16,16]", "views.affine.translation_voxels=1",
    "views.affine.rotation_degrees=5", "train.steps=2", "train.global_batch=4", "optimizer.name=sgd",
    "optimizer.learning_rate=0.001", "optimizer.weight_decay=0", "schedule.name=constant", "schedule.warmup_steps=0",
    "validation.every=0", "loader.threads=1", "train.threads=1", "train.timeout_minutes=2",
)  # fmt: skip
LONGEST_S = 300
# Rounding alone stays far below both; a rank left out of the mean, or counted twice, is far above.
LOSS_TOLERANCE, STEP_TOLERANCE = 1e-5, 1e-2


def check_two_ranks() -> Iterator[Finding]:
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    with tempfile.TemporaryDirectory(prefix="voxtrast-doctor-") as folder:
        store = Path(folder) / "store"
        write_made_up_store(store)
        states = []
        for ranks in (1, 2):
            run = Path(folder) / f"run{ranks}"
            words = [RECIPE, f"data={store}", f"output={run}", f"device={device}", *SETTINGS]
            try:
                done = _train(ranks, words, device)
            except subprocess.TimeoutExpired:
                detail = f"training on {ranks} rank(s) of {device} had no end within {LONGEST_S} s"
                yield Finding("training", f"{ranks} rank(s)", BROKEN, detail, "see the findings above it first")
                return
            if done.returncode != 0:
                lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                said = (lines or done.stderr.strip().splitlines() or ["no message"])[-1]
                detail = f"training on {ranks} rank(s) of {device} ended with {done.returncode}: {said}"
                yield Finding("training", f"{ranks} rank(s)", BROKEN, detail, "see the findings above it first")
                return
            states.append((_losses(run), load_checkpoint(finished_checkpoints(run / "checkpoints")[-1][1])))
        yield compare(states[0], states[1], words, device)


def compare(
    one: tuple[list[float], State], two: tuple[list[float], State], words: list[str], device: str = "cpu"
) -> Finding:
    """The finding about two runs, (losses, last state) each, of one and of two ranks."""
    losses = max(abs(a - b) / abs(a) for a, b in zip(one[0], two[0], strict=True))
    start = dict(build_method(load_config(words[0], words[1:])).named_parameters())
    ours, theirs = one[1].model, two[1].model
    way = math.sqrt(sum((ours[name] - start[name].detach()).double().square().sum().item() for name in start))
    apart = math.sqrt(sum((ours[name] - theirs[name]).double().square().sum().item() for name in start)) / way
    detail = f"two ranks of {device} against one: losses differ by {losses:.1e}, the gradients' steps by {apart:.1e}"
    if losses <= LOSS_TOLERANCE and apart <= STEP_TOLERANCE:
        return Finding("training", "two ranks", GOOD, detail)
    return Finding("training", "two ranks", BROKEN, detail, "do not train on several ranks here; compare the versions")


def write_made_up_store(path: Path) -> None:
    """Four smooth volumes of 32^3 voxels."""
    (path / "volumes").mkdir(parents=True)
    generator = np.random.default_rng(0)
    axis = np.linspace(0, 1, 32)
    affine = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    cases = []
    for index in range(4):
        waves = [np.sin(2 * np.pi * (generator.uniform(1, 4) * axis + generator.uniform())) for _ in range(6)]
        products = [np.einsum("d,h,w->dhw", *(waves[(first + k) % 6] for k in range(3))) for first in range(6)]
        total = np.sum(products, axis=0)
        volume = (total / total.std()).astype(np.float16)
        intensity = {"background": float(volume.min()), "low": -2.0, "high": 2.0, "mean": 0.0, "std": 1.0}
        name = f"made-up-{index}"
        sha256 = write_array(path / "volumes" / f"{name}.npy", volume)
        cases.append(
            Case(
                name,
                (32, 32, 32),
                (1.0, 1.0, 1.0),
                affine,
                "mr",
                "float16",
                intensity,
                f"{name}.nii.gz",
                sha256,
                sha256,
            )
        )
    write_index(path, cases)
    write_settings(path, {"format": FORMAT})


def _train(ranks: int, words: list[str], device: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    # TF32 rounds each of the products, which differ in shape from one rank to two.
    environment |= {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        gpus = torch.cuda.device_count() if device == "cuda" else 0
        launcher = one_node({"localhost": list(range(ranks))}, "127.0.0.1", free_port(), gpus)
    return run_within(LONGEST_S, [*launcher, "voxtrast.engine.pretrain", *words], environment)


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
