"""`voxtrast launch` and what the launchers say of a process: the commands, Slurm's variables, exit codes."""

import base64
import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_processes import free_port

from voxtrast.engine import launch, pretrain
from voxtrast.engine.errors import UserError
from voxtrast.engine.hosts import check_reachable
from voxtrast.engine.meeting import place
from voxtrast.engine.slurm import first_host, from_slurm, of_srun, port_of

SBATCH = Path(__file__).parents[2] / "examples" / "pretrain.sbatch"
WORDS = ["cover-tiny", "data=store", "output=run", "device=cpu"]


def dry(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert launch.main(["--dry-run", *options, *WORDS]) == 0
    return words_of(capsys)


def words_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The printed command, less the variables in front of it."""
    words = shlex.split(capsys.readouterr().out)
    return words[words.index(sys.executable) :]


def world_of(words: list[str]) -> Any:
    [world] = [word.removeprefix("--world_info=") for word in words if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(world))


def test_on_this_machine_the_launcher_of_one_node_starts_the_processes(capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    words = dry(capsys, "--processes", "3", "--master-port", port)
    assert words[1:3] == ["-m", "deepspeed.launcher.launch"]
    assert world_of(words) == {"localhost": [0, 1, 2]}
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


def test_the_printed_command_has_the_variables_that_the_launcher_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    launch.main(["--dry-run", *WORDS])
    assert capsys.readouterr().out.startswith(f"DS_ACCELERATOR=cpu {sys.executable} -m ")


def test_slots_count_the_gpus_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(slots: list[int], gpus: int) -> Any:
        return world_of(launch.one_node({"localhost": slots}, "127.0.0.1", 29500, gpus))["localhost"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3,GPU-8a1f")
    assert world([0, 1], 3) == ["2", "3"]
    assert world([1, 2], 3) == ["3", "GPU-8a1f"]
    assert world([0, 1, 2, 3], 0) == [0, 1, 2, 3]  # ranks on the CPU
    with pytest.raises(UserError, match=r"shows 2 GPU\(s\), so that there is no slot 2"):
        world([0, 2], 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert world([0, 1], 2) == [0, 1]


def test_words_behind_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text("{}")
    for option in (["--deepspeed_config", str(file)], [f"--deepspeed_config={file}"]):
        assert launch.main(["--dry-run", *WORDS, *option]) == 0
        assert words_of(capsys)[-len(option) :] == option
    with pytest.raises(UserError, match="--dry-run: not an option of pretrain; those of launch stand before"):
        launch.main([*WORDS, "--dry-run"])
    with pytest.raises(UserError, match="give a file"):
        launch.main([*WORDS, "--deepspeed_config"])


def test_words_that_another_machines_shell_would_change_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    options = ["--hostfile", str(hostfile), "--no-ssh-check"]
    dry(capsys, *options)
    launch.main(["--dry-run", *options, *WORDS, "backbone.features=[8, 16,16]"])
    for value in ("$HOME/run", "a;b", "(a)", "it's", "a%h", "a*", "b`a`"):
        word = f"output={value}"
        with pytest.raises(UserError, match=f"{re.escape(repr(word))}: a shell on the other machines"):
            launch.main(["--dry-run", *options, *WORDS, word])
    launch.main(["--dry-run", *WORDS, "output=$HOME/run"])  # on this machine there is none between
    for folder in ("two words", "a;b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match="would change this folder where you start"):
            dry(capsys, *options)


def test_ports_are_tried_without_ipv6_too_and_not_for_a_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = socket.socket

    def without_ipv6(family: int = socket.AF_INET, *rest: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *rest)

    with real() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", without_ipv6)
            launch._check_port_free(free_port())
            with pytest.raises(UserError, match=f"--master-port {port}: cannot be used"):
                launch._check_port_free(port)
        dry(capsys, "--master-port", str(port))
    with pytest.raises(UserError, match="not from 1 to 65535"):
        launch._check_port_free(70000)


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


@pytest.mark.parametrize(
    ("code", "given"), [(0, 0), (2, 2), (69, 69), (75, 75), (143, 143), (-signal.SIGKILL, 137), (-signal.SIGABRT, 134)]
)
def test_the_exit_code_is_the_launchers(code: int, given: int) -> None:
    assert launch._run([sys.executable, "-S", "-c", f"raise SystemExit({code})"], dict(os.environ)) == given


def test_a_launcher_that_a_signal_ends_gives_128_and_its_number() -> None:
    assert launch._run(["sh", "-c", "kill -9 $$"], dict(os.environ)) == 137


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_launcher_once(number: signal.Signals, tmp_path: Path) -> None:
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
    outer.send_signal(number)
    assert outer.wait(30) == 71


STEP = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[07-08,12],big3"}  # fmt: skip


def test_the_variables_of_srun_become_those_of_torch() -> None:
    assert from_slurm(STEP) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node07", "MASTER_PORT": "24711",
    }  # fmt: skip
    assert "MASTER_PORT" not in from_slurm(STEP | {"MASTER_PORT": "29501"})


def test_a_mistake_under_srun_is_said_to_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # noted, and taken back in the end
        monkeypatch.delenv(name)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(pretrain, "decline", lambda line: said.append((line, place(os.environ).rank)))
    assert pretrain.main(["no-such-recipe"]) == 2
    [(line, rank)] = said
    assert rank == 5
    assert "no-such-recipe" in line
    assert capsys.readouterr().err.startswith("error (rank 5): ")
    assert of_srun(os.environ)
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun's, in a task that is the second of its machine
    assert not of_srun(os.environ)


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


def test_a_job_requeues_itself_but_not_for_ever(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, body in (("srun", "echo $@ >> started; exit $CODE"), ("scontrol", "echo $@ >> requeued")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "STORE": "s", "RUN": "r",
           "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip

    def requeued(code: int) -> bool:
        (tmp_path / "requeued").unlink(missing_ok=True)
        done = subprocess.run(["bash", SBATCH], env=job | {"CODE": str(code)}, cwd=tmp_path, capture_output=True)
        assert done.returncode == code
        return (tmp_path / "requeued").exists()

    ends = [0, 2, 75, 143, 69, 137, 134, 75, 137, 137, 137, 137, 137]
    assert [code for code in ends if requeued(code)] == [75, 143, 69, 137, 134, 75, 137, 137, 137, 137]
    assert "--cpus-per-task=8" in (tmp_path / "started").read_text(encoding="utf-8")


def test_a_list_of_hosts_that_is_none_and_ports_of_jobs() -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host("")
    assert len({port_of(str(job), "0") for job in range(4000, 4100)}) == 100
    assert all(1024 < port_of(str(job), "3") < 32768 for job in (1, 12345, 99999999))
