"""python -m voxtrast.benchmarks.kernels [--op NAME] [--quick] [--device cuda] [--output FILE] [--plot FILE]"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..harness import REFUSED, append, peak_memory_mb, run, table
from ..machine import machine, measure_rates, results_file
from ..place import DTYPES, choose_place
from . import (
    bank_info_nce,
    info_nce,
    local_correlation,
    nt_xent,
    positional_info_nce,
    vector_pyramid,
    warp,
    warped_cosine_loss,
)
from .plot import SUBJECTS, draw, read_lines

OPS: dict[str, Any] = {
    "info_nce": info_nce,
    "nt_xent": nt_xent,
    "positional_info_nce": positional_info_nce,
    "bank_info_nce": bank_info_nce,
    "local_correlation": local_correlation,
    "vector_pyramid": vector_pyramid,
    "warp": warp,
    "warped_cosine_loss": warped_cosine_loss,
}
MODULE = "voxtrast.benchmarks.kernels"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench kernels", description="Fused operators beside their rivals.")
    parser.add_argument("--op", choices=sorted(OPS), help="one operator; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="append the JSON lines to FILE, or in a folder to DEVICE.jsonl"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw --op (info_nce, local_correlation) of --output, or of this run"
    )
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one step of one provider, in a process of its own
    chosen = parser.parse_args(arguments)
    drawn = chosen.op or "info_nce"
    if chosen.plot and drawn not in SUBJECTS:
        parser.error(f"--plot draws {' or '.join(SUBJECTS)}, and --op is {chosen.op}")
    if chosen.memory:
        return _memory(**json.loads(chosen.memory))
    try:
        place = choose_place(chosen.device, chosen.dtype)
    except ValueError as error:
        parser.error(str(error))
    about = machine(place)
    print(about["device"])
    output = results_file(chosen.output, about["device"]) if chosen.output else None
    rounds = 3 if chosen.quick else 20 if place.on_gpu else 7
    written: list[dict[str, Any]] = []
    for name in [chosen.op] if chosen.op else OPS:
        for shape in OPS[name].cases(chosen.quick, place):
            rates = measure_rates(place)  # anew for every size: shared machines change their pace
            torch.compiler.reset()  # a function is compiled for so many shapes and no more
            case = OPS[name].build(shape, place)
            lines = run(case, rates, most_rounds=rounds)
            for line in lines:
                line["peak_memory_mb"] = (
                    None if "cannot" in line else peak_memory_mb(MODULE, name, case, line["provider"])
                )
            print(table(lines))
            print(
                f"  rates: product {rates.flops / 1e9:.0f} GFLOP/s, exponential {rates.exponentials / 1e9:.2f} G/s,"
                f" copy {rates.bandwidth / 1e9:.1f} GB/s",
                flush=True,
            )
            records = [{**about, **line, "rates": vars(rates)} for line in lines]
            written += records
            if output:
                append(records, output)
    if chosen.plot:
        draw(read_lines(output) if output else written, chosen.plot, SUBJECTS[drawn])
    left_out = [line for line in written if "cannot" in line]
    return 1 if any(line["provider"] == "ours" or line["cannot"].startswith(REFUSED) for line in left_out) else 0


def _memory(op: str, shape: dict[str, int], provider: str, dtype: str) -> int:
    case = OPS[op].build(shape, choose_place("cpu", dtype))
    step = case.steps[provider]
    step()  # what is made once: compiled code, gradients
    print(case.place.peak_beyond_mb(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
