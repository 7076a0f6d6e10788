"""Views a second of the data plane beside what one would use otherwise, and of a recipe's own views.

voxtrast bench data [--crop 64 96 128] [--device cuda] [--store STORE] [--rows NAME ...] [--output FILE] [--plot FILE]
voxtrast bench data --recipe NAME data=STORE [key=value ...]

Each row works in a process of its own, with all cores, and the rows take turns (A B C A B C ...), so that a machine
that slows down slows all of them. Ours plans, reads its store (its files in the page cache, or cold) and gives a field
and its mask with every second view; the others have their volumes in memory as float32. Core time is what the
machine's other work disturbs least. docs/data-benchmark.md says what each row does and lacks.
"""

import argparse
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from voxtrast.engine.errors import UserError

from ..harness import REFUSED, append
from ..kernels.plot import read_lines
from ..machine import machine, measure_rates, results_file
from ..place import Cannot, Place, choose_place
from .geometry import Geometry, examine
from .host import Host, Turn
from .plot import draw
from .report import geometry_report, lines_of, parts_report, table
from .rows import OURS, ROWS, Setting, core_seconds_by_part
from .volumes import load_volumes, make_store, side_of

PEERS = ("nvidia-dali-cuda130", "monai", "batchgeneratorsv2", "torchio", "numpy")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    chosen = parser.parse_intermixed_args(arguments)
    for what, value, least in (("--rounds", chosen.rounds, 1), ("--workers", chosen.workers, 1)):
        if value < least:
            parser.error(f"{what}: expected at least {least}, got {value}")
    if chosen.seconds <= 0:
        parser.error(f"--seconds: expected more than 0, got {chosen.seconds:g}")
    if any(size < 16 for size in chosen.crop):
        parser.error(f"--crop: expected sizes of at least 16 voxels, got {' '.join(map(str, chosen.crop))}")
    if chosen.settings and not chosen.recipe:
        parser.error(f"{chosen.settings[0]}: settings go with --recipe NAME")
    try:
        place = choose_place(chosen.device, "float32")
        about = machine(place, PEERS)
        output = results_file(chosen.output, about["device"]) if chosen.output else None
        print(about["device"], f"load {about['load']:.1f}", flush=True)
        if chosen.recipe:
            from .epoch import measure_recipe

            parts = iter([measure_recipe(chosen.recipe, chosen.settings, place, chosen.steps)])
        else:
            parts = (_measure(size, chosen, place) for size in chosen.crop)
        written: list[dict[str, Any]] = []
        for lines in parts:
            records = [{**about, **line} for line in lines]
            written += records
            if output:
                append(records, output)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.plot:
        draw(read_lines(output) if output else written, chosen.plot)
    left_out = [line for line in written if "cannot" in line]
    return 1 if any(line["provider"] == OURS or line["cannot"].startswith(REFUSED) for line in left_out) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="voxtrast bench data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="with --recipe: data=STORE ...")
    parser.add_argument(
        "--recipe", metavar="NAME", help="an epoch of this recipe's own views, and the wait of its steps"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps of --recipe (default: 20)")
    parser.add_argument("--crop", type=int, nargs="+", default=[64, 96, 128], metavar="N", help="default: 64 96 128")
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(ROWS), metavar="NAME", help=f"default: all: {'; '.join(ROWS)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--store", type=Path, help="default: made-up volumes in a temporary folder")
    parser.add_argument("--stored", choices=("float32", "float16"), default="float32", help="type of made-up volumes")
    parser.add_argument(
        "--workers", type=int, default=cores(), help="threads, or processes of one (default: a core each)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn at the least (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE or FOLDER/DEVICE.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw --output, or this run")
    return parser


def _measure(size: int, chosen: argparse.Namespace, place: Place) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="voxtrast-bench-") as scratch:
        store = chosen.store
        if store is None:
            store = Path(scratch) / "store"
            make_store(store, side_of(size), chosen.stored)
        setting = Setting(store, size, chosen.workers, place.device.type)
        load_volumes(store, size)  # what is wrong with the store is said once
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            geometry: Geometry = pool.submit(examine, store, size).result()
        rates = measure_rates(place)
        turns, cannot = take_turns(setting, chosen.rows or list(ROWS), geometry, chosen.rounds, chosen.seconds)
        lines = lines_of(setting, turns, cannot, geometry, rates)
        print(table(lines, geometry, rates))
        print(geometry_report(geometry), flush=True)
        if OURS in turns and not place.on_gpu:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                parts = pool.submit(core_seconds_by_part, setting).result()
            print(parts_report(parts, size), flush=True)
            shape = {"crop": size}
            profile = {"op": "views: profile", "shape": shape, "dtype": "float32", "provider": OURS, "parts_s": parts}
            lines.append(profile)
    return lines


def take_turns(
    setting: Setting, names: list[str], geometry: Geometry, rounds: int, seconds: float
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """The turns of each row, the first of which warms up and tells the memory; and why others have none."""
    turns: dict[str, list[Turn]] = {}
    cannot: dict[str, str] = {}
    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        for name in names:
            if setting.device not in ROWS[name].devices:
                continue
            try:
                if (why := geometry.refuses(name)) is not None:
                    raise Cannot(f"{REFUSED}: {why}")
                hosts[name] = stack.enter_context(Host(name, setting))
            except Cannot as why:
                cannot[name] = str(why)
        for round_ in range(rounds + 1):
            for name, host in list(hosts.items()):
                try:
                    turns.setdefault(name, []).append(host.turn(seconds, memory=round_ == 0))
                except Cannot as why:
                    cannot[name] = str(why)
                    del hosts[name], turns[name]
    return turns, cannot


def cores() -> int:
    import psutil

    return len(psutil.Process().cpu_affinity())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the made-up store and the processes go, too
    sys.exit(main())
