"""Ranks as forked processes that do no tensor work: for what ranks say to each other through the store."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class RankProcesses:
    """Starts work(rank) in one process for each; what it prints on stderr is kept."""

    def __init__(self, folder: Path, work: Callable[[int], None], size: int = 2, **variables: str) -> None:
        self.folder = folder
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | variables
        self.processes = [
            CONTEXT.Process(target=self._run, args=(work, rank, common | {"RANK": str(rank)})) for rank in range(size)
        ]

    def _run(self, work: Callable[[int], None], rank: int, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        file = os.open(self.folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        try:
            work(rank)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def start(self) -> None:
        for process in self.processes:
            process.start()

    def ends(self, timeout_s: float) -> list[int | None]:
        """Exit code of each, None for one that had to be killed."""
        codes = []
        for process in self.processes:
            process.join(timeout_s)
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes

    def said(self, rank: int) -> list[str]:
        """Lines of a rank, less those of torch's own log."""
        lines = (self.folder / f"stderr{rank}").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.startswith(("error", "Traceback", "voxtrast"))]
