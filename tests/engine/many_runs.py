"""Many runs one after the other on one pool of ranks: a start of DeepSpeed costs more than a small run.

`run_pool` starts the ranks; each of them is this file as a script.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_processes import free_port
from stand_in import StandIn

from voxtrast.engine.config import load_config
from voxtrast.engine.errors import UserError
from voxtrast.engine.pretrain import pretrain
from voxtrast.engine.ranks import stop_processes
from voxtrast.methods import METHODS

Words = Sequence[str]  # a recipe and its settings


def run_pool(ranks: int, runs: Sequence[Words], folder: Path, timeout: float = 600) -> list[str]:
    """Makes the runs on so many ranks, and says how each ended: "" or the message of the UserError.

    Raises: AssertionError with what the ranks printed where one ended otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps([list(run) for run in runs]))
    port = free_port()
    processes, logs = [], []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
        logs.append(folder / f"rank{rank}.txt")
        with logs[-1].open("w") as log:
            command = [sys.executable, __file__, str(plan)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(f"rank {rank}: {log.read_text(encoding='utf-8')[-6000:]}" for rank, log in enumerate(logs))
    assert codes == [0] * ranks, f"{codes}\n{said}"
    ends: list[str] = json.loads((folder / "ends.json").read_text(encoding="utf-8"))
    return ends


def _make(runs: list[list[str]]) -> list[str]:
    ends = []
    for recipe, *words in runs:
        try:
            pretrain(load_config(recipe, words))
            ends.append("")
        except UserError as error:
            ends.append(str(error))
    return ends


def _main(plan: Path) -> int:
    METHODS["stand_in"] = StandIn
    try:
        ends: Any = _make(json.loads(plan.read_text(encoding="utf-8")))
    except BaseException:
        traceback.print_exc()
        return 1
    if int(os.environ["RANK"]) == 0:
        (plan.parent / "ends.json").write_text(json.dumps(ends))
    dist.barrier()
    stop_processes()
    return 0


if __name__ == "__main__":
    code = _main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
