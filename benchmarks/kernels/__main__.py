"""python -m voxtrast.benchmarks.kernels [--op NAME] [--quick] [--output FILE] [--plot FILE]"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..harness import REFUSED, append, machine, measure_rates, peak_beyond_mb, peak_memory_mb, run, table
from . import bank_info_nce, info_nce, nt_xent, positional_info_nce
from .plot import draw, read_lines

OPS = {
    "info_nce": info_nce,
    "nt_xent": nt_xent,
    "positional_info_nce": positional_info_nce,
    "bank_info_nce": bank_info_nce,
}
MODULE = "voxtrast.benchmarks.kernels"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench kernels", description="Fused operators beside their rivals.")
    parser.add_argument("--op", choices=sorted(OPS), help="one operator; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the JSON lines to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw symmetric InfoNCE of --output, or of this run")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one step of one provider, in a process of its own
    chosen = parser.parse_args(arguments)
    if chosen.plot and not chosen.output and chosen.op not in (None, "info_nce"):
        parser.error(f"--plot draws info_nce, and --op {chosen.op} measures none of it")
    if chosen.memory:
        return _memory(**json.loads(chosen.memory))
    about = machine()
    print(about["device"])
    written: list[dict[str, Any]] = []
    for name in [chosen.op] if chosen.op else OPS:
        for shape in OPS[name].cases(chosen.quick):
            rates = measure_rates()  # anew for every size: shared machines change their pace
            lines = run(OPS[name].build(shape), rates, most_rounds=3 if chosen.quick else 7)
            for line in lines:
                line["peak_memory_mb"] = (
                    None if "cannot" in line else peak_memory_mb(MODULE, name, shape, line["provider"])
                )
            print(table(lines))
            print(
                f"  rates: product {rates.flops / 1e9:.0f} GFLOP/s, exponential {rates.exponentials / 1e9:.2f} G/s",
                flush=True,
            )
            records = [{**about, **line, "rates": vars(rates)} for line in lines]
            written += records
            if chosen.output:
                append(records, chosen.output)
    if chosen.plot:
        draw(read_lines(chosen.output) if chosen.output else written, chosen.plot)
    return 1 if any(line.get("cannot", "").startswith(REFUSED) for line in written) else 0


def _memory(op: str, shape: dict[str, int], provider: str) -> int:
    step = OPS[op].build(shape).steps[provider]
    step()  # what is made once: compiled code, gradients
    print(peak_beyond_mb(step))
    return 0


if __name__ == "__main__":
    sys.exit(main())
