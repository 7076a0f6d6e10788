"""Volumes a second through prepare's resampling, beside nnU-Net's and MONAI's, and from file to file.

voxtrast bench prepare [--data FOLDER] [--spacing-mm 1.5] [--order 3] [--rounds 5] [--output FILE]

Two processes of one thread each work for every provider, the way that nnU-Net and prepare are run; the providers take
turns (A B C A B C), so that a machine that slows down slows all of them. `resample` starts from arrays in memory;
`file to file` reads, resamples and writes: ours also checks, hashes, normalises and describes, the others do not.
nnU-Net resamples with the same order along every axis here (its default takes the nearest slice along thick ones).
Volumes are made up (noise as smooth as images are, in int16), and those of --data or VOXTRAST_DATA.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from voxtrast.engine.data import conversion, normalise, reading, resampling, store
from voxtrast.engine.data.workers import ONE_THREAD
from voxtrast.engine.errors import UserError

from .harness import append
from .machine import machine, results_file

PROCESSES = 2
MADE = {  # (D, H, W) voxels, spacing in mm
    "made up, CT of 2.5 mm slices": ((100, 320, 320), (2.5, 0.8, 0.8)),
    "made up, MR of 1 mm": ((170, 220, 180), (1.0, 1.0, 1.0)),
    "made up, MR of 5 mm slices": ((26, 320, 320), (5.0, 0.7, 0.7)),
}
QUICK = {"made up, small": ((40, 64, 60), (2.0, 0.9, 0.9))}
MOST_REAL = 40  # files, every so manieth
PROFILE = {  # part: what it is timed by, in the order of the work
    "read and check the header": ("reading", "_read_file"),
    "reorient": ("reading", "_to_ras"),
    "check values": ("normalise", "check_values"),
    "tell CT from MR": ("normalise", "guess_modality"),
    "normalise": ("normalise", "normalise"),
    "resample": ("resampling", "resample_image"),
    "statistics": ("normalise", "describe"),
    "write, with its hash": ("store", "write_array"),
}
HASH = "hash of the source"
Resample = Callable[[np.ndarray, np.ndarray, float, int], np.ndarray]


def by_ours(values: np.ndarray, spacing: np.ndarray, target_mm: float, order: int) -> np.ndarray:
    return resampling.resample_image(values, resampling.isotropic_grid(values.shape, spacing, target_mm), order=order)


def by_nnunet(values: np.ndarray, spacing: np.ndarray, target_mm: float, order: int) -> np.ndarray:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

    target = (target_mm,) * 3
    shape = compute_new_shape(values.shape, spacing, target)
    return resample_data_or_seg_to_shape(values[None], shape, spacing, target, order=order, force_separate_z=False)[0]


def by_monai(values: np.ndarray, spacing: np.ndarray, target_mm: float, order: int) -> np.ndarray:
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    image = MetaTensor(torch.from_numpy(values[None]), affine=torch.diag(torch.tensor([*spacing, 1.0])))
    mode: str | int = "bilinear" if order == 1 else order
    return np.asarray(Spacing((target_mm,) * 3, mode=mode)(image)[0])


PROVIDERS: dict[str, Resample] = {"ours": by_ours, "nnunetv2": by_nnunet, "monai": by_monai}
_volumes: dict[Path, tuple[np.ndarray, np.ndarray]] = {}


def _warm(files: list[Path]) -> None:
    """In each process: one thread, everything imported, all volumes in memory."""
    import torch

    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    warnings.simplefilter("ignore")
    small = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    for resample in PROVIDERS.values():
        for order in (1, 3):
            resample(small, np.array([2.0, 1.0, 1.0]), 1.5, order)
    for file in files:
        volume = reading.read_volume([file], dicom=False)
        _volumes[file] = volume.values.astype(np.float32), volume.spacing_mm


def _resample(provider: str, file: Path, spacing_mm: float, order: int, _: Path) -> float:
    started = time.process_time()
    PROVIDERS[provider](*_volumes[file], spacing_mm, order)
    return time.process_time() - started


def _convert(provider: str, file: Path, spacing_mm: float, order: int, target: Path) -> float:
    started = time.process_time()
    if provider == "ours":
        for task in ("digest", "convert"):
            reply = conversion.perform(job_of(task, file, spacing_mm, order, target))
            if "done" not in reply:
                raise RuntimeError(f"{file.name}: {reply}")
    else:
        image = sitk.ReadImage(str(file))
        spacing = np.array(image.GetSpacing()[::-1])
        values = sitk.GetArrayFromImage(image).astype(np.float32)
        np.save(target / f"{provider}-{file.name}.npy", PROVIDERS[provider](values, spacing, spacing_mm, order))
    return time.process_time() - started


def job_of(task: str, file: Path, spacing_mm: float, order: int, target: Path) -> dict[str, Any]:
    settings = {"spacing_mm": spacing_mm, "minimum_size_voxels": 1, "modality": "auto", "dtype": "float16"}
    return {
        "task": task, "source": file.name, "id": file.name.partition(".")[0], "files": [str(file)], "dicom": False,
        "label": None, "store": str(target), "settings": {**settings, "order": order}, "modality": "", "device": "cpu",
        "memory_limit_gb": None,
    }  # fmt: skip


WORK = {"resample": _resample, "file to file": _convert}


def measure(
    pool: Executor, op: str, files: list[Path], spacing_mm: float, order: int, rounds: int, target: Path
) -> list[dict[str, Any]]:
    """A line for each provider: volumes a second (median over rounds, after one that is not counted), and processor
    time of a volume, which other work on the machine disturbs less."""
    rates: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    busy: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    cannot: dict[str, str] = {}
    for _ in range(rounds + 1):
        for name in [each for each in PROVIDERS if each not in cannot]:
            started = time.perf_counter()
            tasks = [pool.submit(WORK[op], name, file, spacing_mm, order, target) for file in files]
            wait(tasks)  # one that fails would leave the others to the next provider's time
            try:
                seconds = [task.result() for task in tasks]
            except Exception as error:  # of a peer, of any kind: the others are measured all the same
                cannot[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                continue
            rates[name].append(len(files) / (time.perf_counter() - started))
            busy[name].append(sum(seconds) / len(files))
    lines: list[dict[str, Any]] = []
    for name in PROVIDERS:
        if name in cannot:
            lines.append({"provider": name, "cannot": cannot[name]})
            continue
        taken = rates[name][1:]
        lines.append(
            {
                "provider": name,
                "volumes_per_s": statistics.median(taken),
                "spread_per_s": max(taken) - min(taken),
                "cpu_s_per_volume": statistics.median(busy[name][1:]),
            }
        )
    return lines


def profile(files: list[Path], spacing_mm: float, order: int, target: Path) -> dict[str, float]:
    """Processor seconds of a volume by part, in one process; "other" is what no part accounts for."""
    modules = {"reading": reading, "normalise": normalise, "resampling": resampling, "store": store}
    seconds = dict.fromkeys([HASH, *PROFILE], 0.0)
    kept = {part: getattr(modules[module], name) for part, (module, name) in PROFILE.items()}

    def timed(part: str) -> Callable[..., Any]:
        def run(*positional: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return kept[part](*positional, **named)
            finally:
                seconds[part] += time.process_time() - started

        return run

    def convert_all() -> None:
        for file in files:
            before = time.process_time()
            conversion.perform(job_of("digest", file, spacing_mm, order, target))
            seconds[HASH] += time.process_time() - before
            conversion.perform(job_of("convert", file, spacing_mm, order, target))

    convert_all()  # what is slow once is not counted
    seconds = dict.fromkeys(seconds, 0.0)
    started = time.process_time()
    try:
        for part, (module, name) in PROFILE.items():
            setattr(modules[module], name, timed(part))
        convert_all()
    finally:
        for part, (module, name) in PROFILE.items():
            setattr(modules[module], name, kept[part])
    seconds["other"] = time.process_time() - started - sum(seconds.values())
    return {part: each / len(files) for part, each in seconds.items()}


def make_volume(file: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int) -> Path:
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    values = ndimage.gaussian_filter(noise, 1.0)
    image = sitk.GetImageFromArray((values / values.std() * 200 + 800).astype(np.int16))
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(file))
    return file


def real_files(folder: Path) -> list[Path]:
    found = [file for file in sorted(folder.rglob("*.nii.gz")) if "label" not in str(file.relative_to(folder))]
    return found[:: max(1, -(-len(found) // MOST_REAL))]


def report(title: str, lines: list[dict[str, Any]]) -> str:
    rows, ours = [title], next((line for line in lines if line["provider"] == "ours" and "cannot" not in line), None)
    for line in lines:
        if "cannot" in line:
            rows.append(f"  {line['provider']:<12} cannot: {line['cannot']}")
            continue
        ratio = f"{ours['volumes_per_s'] / line['volumes_per_s']:8.1f} x slower" if ours not in (None, line) else ""
        rows.append(
            f"  {line['provider']:<12} {line['volumes_per_s']:9.2f} volumes/s ± {line['spread_per_s']:<7.2f}"
            f" {line['cpu_s_per_volume'] * 1e3:9.1f} ms of a core each {ratio}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench prepare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of .nii.gz files (default: VOXTRAST_DATA, else none)")
    parser.add_argument("--spacing-mm", type=float, default=1.5)
    parser.add_argument("--order", type=int, choices=(1, 3), help="default: both")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one small volume, to see that it runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE or FOLDER/DEVICE.jsonl")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {chosen.rounds}")
    folder = chosen.data or (Path(os.environ["VOXTRAST_DATA"]) if os.environ.get("VOXTRAST_DATA") else None)
    try:
        if folder is not None and not real_files(folder):
            raise UserError(f"--data {folder}: no .nii.gz file below it: give a folder of volumes")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ |= ONE_THREAD  # for the processes started below
    about = machine()
    about["versions"] |= _versions("nnunetv2", "numpy", "scipy", "SimpleITK")
    print(about["device"], f"{PROCESSES} processes of one thread, to {chosen.spacing_mm:g} mm")
    with tempfile.TemporaryDirectory() as scratch:
        sets: dict[str, list[Path]] = {}
        for name, (shape, spacing) in (QUICK if chosen.quick else MADE).items():
            files = [make_volume(Path(scratch) / f"{len(sets)}_{seed}.nii.gz", shape, spacing, seed) for seed in (0, 1)]
            sets[name] = files
        if folder is not None and not chosen.quick:
            sets["real volumes"] = real_files(folder)
        target = Path(scratch) / "store"
        for each in (target, target / store.VOLUMES, target / store.LABELS):
            each.mkdir()
        records = _measure_all(sets, chosen, target)
    if chosen.output:
        append([{**about, **record} for record in records], results_file(chosen.output, about["device"]))
    return 1 if any(record["provider"] == "ours" and "cannot" in record for record in records) else 0


def _measure_all(sets: dict[str, list[Path]], chosen: argparse.Namespace, target: Path) -> list[dict[str, Any]]:
    records = []
    for name, files in sets.items():
        context = get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, context, initializer=_warm, initargs=(files,)) as pool:
            for op in WORK:
                for order in [chosen.order] if chosen.order else [3, 1]:
                    lines = measure(pool, op, files, chosen.spacing_mm, order, chosen.rounds, target)
                    print(report(f"{op}, order {order}, {name} ({len(files)})", lines), flush=True)
                    shape = {"set": name, "volumes": len(files), "spacing_mm": chosen.spacing_mm, "order": order}
                    records += [{"op": f"prepare: {op}", "shape": shape, **line} for line in lines]
            parts = pool.submit(profile, files, chosen.spacing_mm, chosen.order or 3, target).result()
        total = sum(parts.values())
        print(f"where the time goes, order {chosen.order or 3}, {name}: {total * 1e3:.1f} ms of a core a volume")
        for part, seconds in parts.items():
            print(f"  {part:<28}{seconds * 1e3:9.2f} ms {seconds / total:6.1%}")
        shape = {"set": name, "volumes": len(files), "spacing_mm": chosen.spacing_mm, "order": chosen.order or 3}
        records.append({"op": "prepare: profile", "shape": shape, "provider": "ours", "parts_s": parts})
    return records


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
