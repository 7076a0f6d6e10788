"""`voxtrast launch` and what the launchers say of a process: the commands, Slurm's variables, exit codes."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import free_port

from voxtrast.engine import launch
from voxtrast.engine.errors import UserError
from voxtrast.engine.hosts import check_reachable
from voxtrast.engine.slurm import first_host, from_slurm, port_of

WORDS = ["cover-tiny", "data=store", "output=run", "device=cpu"]


def dry(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert launch.main(["--dry-run", *options, *WORDS]) == 0
    return capsys.readouterr().out.split()


def test_on_this_machine_the_launcher_of_one_node_starts_the_processes(capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    words = dry(capsys, "--processes", "3", "--master-port", port)
    assert words[1:3] == ["-m", "deepspeed.launcher.launch"]
    [world] = [word.removeprefix("--world_info=") for word in words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [0, 1, 2]}
    assert words[-6:] == ["--module", "voxtrast.engine.pretrain", *WORDS]
    assert f"--master_port={port}" in words


def test_a_hostfile_of_several_machines_is_tried_and_started_through_deepspeed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    tried: list[list[str]] = []
    monkeypatch.setattr(launch, "check_reachable", lambda hosts, port: tried.append(hosts))
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    words = dry(capsys, "--hostfile", str(hostfile), "--include", "node2", "--master-addr", "10.0.0.2")
    assert tried == [["node2"]]
    assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={hostfile}", "--include=node2", "--master_addr=10.0.0.2", "--force_multi"} <= set(words)
    assert words[-6:] == ["--module", "voxtrast.engine.pretrain", *WORDS]
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="pdsh is not installed"):
        dry(capsys, "--hostfile", str(hostfile))
    monkeypatch.setattr(launch, "check_reachable", check_reachable)
    hostfile.write_text("no-such-host.invalid slots=1\n")
    with pytest.raises(UserError, match="1 of 1 hosts cannot be reached"):
        dry(capsys, "--hostfile", str(hostfile))


def test_mistakes_are_found_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--master-port {port}: cannot be used"):
            launch.main(["--master-port", port, *WORDS])
    for options, said in (
        (["--include", "node1"], "give --hostfile"),
        (["--processes", "0"], "expected 1 or more"),
        (["--hostfile", str(tmp_path / "none")], "cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            launch.main([*options, *WORDS])
    with pytest.raises(UserError, match="output: not given"):
        launch.main(["cover-tiny", "data=store"])
    with pytest.raises(UserError, match=r"did you mean 'train\.steps'"):
        launch.main([*WORDS, "train.step=3"])


@pytest.mark.parametrize("code", [0, 2, 69, 75])
def test_the_exit_code_is_the_launchers(code: int) -> None:
    assert launch._run([sys.executable, "-c", f"raise SystemExit({code})"], dict(os.environ)) == code


@pytest.mark.slow
def test_a_signal_reaches_the_launcher_once(tmp_path: Path) -> None:
    counting = tmp_path / "counting.py"
    counting.write_text(
        "import signal, sys, time\nseen = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        f"open({str(tmp_path / 'up')!r}, 'w').close()\n"
        "while not seen: time.sleep(0.02)\ntime.sleep(0.3)\nsys.exit(70 + len(seen))\n"
    )
    outer = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; from voxtrast.engine import launch; "
         f"sys.exit(launch._run([sys.executable, {str(counting)!r}], dict(os.environ)))"]
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    outer.send_signal(signal.SIGTERM)
    assert outer.wait(30) == 71


STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[07-08,12],big3"}  # fmt: skip


def test_the_variables_of_srun_become_those_of_torch() -> None:
    assert from_slurm(STEP) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "24711",
    }  # fmt: skip
    assert "MASTER_PORT" not in from_slurm(STEP | {"MASTER_PORT": "29501"})


def test_other_launchers_and_plain_processes_in_a_job_are_left_alone() -> None:
    assert from_slurm(STEP | {"RANK": "0"}) == {}
    script = {name: value for name, value in STEP.items() if "STEP" not in name} | {"SLURM_NTASKS": "8"}
    assert from_slurm(script) == {}  # the body of an sbatch script
    assert from_slurm(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert from_slurm({}) == {}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node1", "node1"), ("node[01-04]", "node01"), ("node[3,7-9]", "node3"), ("a-1,b-2", "a-1"),
     ("r[1-2]-ib", "r1-ib"), ("gpu.cluster.org,b", "gpu.cluster.org")],
)  # fmt: skip
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_list_of_hosts_that_is_none_and_ports_of_jobs() -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host("")
    assert len({port_of(str(job), "0") for job in range(4000, 4100)}) == 100
    assert all(1024 < port_of(str(job), "3") < 32768 for job in (1, 12345, 99999999))
