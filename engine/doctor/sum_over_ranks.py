"""A program for every rank of a hostfile: meets the others, sums a vector over all of them, says how long it took."""

import sys
import time

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ranks import start_processes, stop_processes

VALUES, TIMES = 1_000_000, 5
TIMEOUT_MINUTES = 1.0


def main() -> int:
    try:
        ranks = start_processes("auto", TIMEOUT_MINUTES)
        values = torch.full((VALUES,), float(ranks.rank + 1), device=ranks.device)
        expected = ranks.size * (ranks.size + 1) / 2
        dist.all_reduce(values)  # makes the connections
        right = bool((values == expected).all())
        began = time.perf_counter()
        for _ in range(TIMES):
            dist.all_reduce(values)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / TIMES
        if ranks.first:
            backend, hosts = dist.get_backend(), len(set(ranks.hosts))
            speed = VALUES * 4 / 1e6 / seconds
            print(
                f"sum over {ranks.size} ranks on {hosts} host(s) by {backend}: {seconds * 1e3:.1f} ms, {speed:.0f} MB/s"
            )
            print("right" if right else "wrong", flush=True)
        return 0 if right else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        stop_processes()


if __name__ == "__main__":
    sys.exit(main())
