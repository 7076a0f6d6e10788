"""Programs that are started and watched: signals reach them, and nothing of them is left."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from voxtrast.engine import signals
from voxtrast.engine.signals import run_within

CHILD = """
import pathlib, signal, subprocess, sys, time
{ignore}
rank = subprocess.Popen([sys.executable, "-S", "-c", "import signal, time; {ignore}; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(rank.pid))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("ignore", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_program_that_hangs_ends_with_all_that_it_started(
    ignore: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "TIME_TO_END_S", 1.0)
    file = tmp_path / "rank"
    command = [sys.executable, "-S", "-c", CHILD.format(ignore=ignore or "pass"), str(file)]
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(3.0, command)
    rank = int(file.read_text(encoding="utf-8"))
    end = time.monotonic() + 10
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the rank still runs"
        time.sleep(0.05)


def test_what_a_program_says_is_kept() -> None:
    done = run_within(
        60.0, [sys.executable, "-S", "-c", "import sys; print('yes'); print('no', file=sys.stderr); sys.exit(3)"]
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "yes\n", "no\n")
