"""Two nodes for real: two network namespaces with addresses of their own, DeepSpeed's launcher in each."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rank_processes import free_port
from run_results import lines_of, state_of, tensors_of
from small_recipes import COMMON, METHOD, OPTIMIZER, differences
from stand_in import recipe

from voxtrast.engine.checkpoint import finished_checkpoints
from voxtrast.engine.watchdog import LOST_RANK

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("stand_in.py")
ADDRESSES = ("10.201.7.1", "10.201.7.2")
LIMIT_S = 12
# Gentle, and no Adam: it makes full steps of gradients that are rounding alone.
SETTINGS = ("optimizer.name=sgd", "optimizer.learning_rate=0.001", "schedule.name=constant", "train.global_batch=4",
            "checkpoint.every=5", "validation.every=0", f"train.timeout_minutes={LIMIT_S / 60}")  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, encoding="utf-8", errors="replace")


class Nodes:
    """Namespaces NAME0 and NAME1, joined by a pair of virtual interfaces."""

    def __init__(self, name: str) -> None:
        self.names = [f"{name}{node}" for node in range(2)]
        self.links = [f"{name}v{node}" for node in range(2)]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", self.links[0], "type", "veth", "peer", "name", self.links[1])
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def join(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, words: tuple[str, ...]) -> list[subprocess.Popen[str]]:
        world = base64.urlsafe_b64encode(json.dumps({name: [0] for name in self.names}).encode()).decode()
        port = str(free_port())
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-m", "deepspeed.launcher.launch",
                 f"--world_info={world}", f"--node_rank={node}", f"--master_addr={ADDRESSES[0]}",
                 f"--master_port={port}", "--log_level=warning", str(SCRIPT), *words],
                env=os.environ | {"GLOO_SOCKET_IFNAME": link, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8", errors="replace",
            )
            for node, (name, link) in enumerate(zip(self.names, self.links, strict=True))
        ]  # fmt: skip


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("`ip` is missing: install iproute2 to join two network namespaces")
    made = Nodes(f"vx{os.getpid() % 100000}")
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    yield made
    made.remove()


@pytest.fixture
def words(tiny_store: Path, tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    path = str(recipe(tmp_path))
    return lambda run, steps: (path, f"data={tiny_store}", f"output={run}", f"train.steps={steps}", *SETTINGS)


def alone(words: tuple[str, ...]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), *words], check=True, capture_output=True, env=environment)


def ends(processes: list[subprocess.Popen[str]], timeout_s: float) -> list[tuple[int, str]]:
    found = []
    for process in processes:
        try:
            _, said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
            said += "\n(had to be stopped)"
        found.append((process.returncode, said))
    return found


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run)]


def test_ten_steps_on_two_nodes_equal_one_process(
    nodes: Nodes, words: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    together, one = tmp_path / "together", tmp_path / "one"
    for code, said in ends(nodes.start(words(together, 10)), 200):
        assert code == 0, said
    alone(words(one, 10))
    assert losses(together) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = (dict(tensors_of(state_of(run, 10))) for run in (together, one))
    assert set(ours) == set(theirs)
    apart = {}
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            scale = max(tensor.double().norm().item(), 1e-6)
            apart[name] = (ours[name].double() - tensor.double()).nan_to_num().norm().item() / scale
    print("largest relative difference", max(apart.values()))
    assert {name: value for name, value in apart.items() if value > 1e-5 and name.startswith("model")} == {}


@pytest.mark.parametrize("method", METHOD)
def test_ten_steps_of_a_recipe_on_two_nodes_equal_one_process(
    method: str, nodes: Nodes, tiny_store: Path, tmp_path: Path
) -> None:
    words = (*METHOD[method], *COMMON, *OPTIMIZER["sgd"], f"data={tiny_store}")
    together, one = tmp_path / "together", tmp_path / "one"
    for code, said in ends(nodes.start((*words, f"output={together}")), 200):
        assert code == 0, said
    alone((*words, f"output={one}"))
    of_losses, of_parameters, *_ = differences(together, one)
    print(f"{method}: losses {of_losses:.1e}, parameters {of_parameters:.1e}")
    assert of_losses < 1e-5
    assert of_parameters < 1e-5


def test_a_node_that_is_cut_off_ends_both_sides_and_the_run_continues(
    nodes: Nodes, words: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for code, said in ends(nodes.start(words(whole, 400)), 300):
        assert code == 0, said
    processes = nodes.start(words(cut, 400))
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not finished_checkpoints(cut / "checkpoints"):
        time.sleep(0.1)
    nodes.cut()
    began = time.monotonic()
    found = ends(processes, LIMIT_S + 40)
    seconds = time.monotonic() - began
    done = len(losses(cut))
    for node, (code, said) in enumerate(found):
        assert code == LOST_RANK, said
        lines = [line for line in said.splitlines() if line.startswith("error")]
        assert len(lines) == 1, said
        assert f"rank {1 - node} on " in lines[0]
        assert "the same command continues" in lines[0]
        print(f"node {node}: {lines[0]}")
    assert seconds < LIMIT_S + 15
    assert done < 400
    nodes.join()
    for code, said in ends(nodes.start(words(cut, 400)), 300):
        assert code == 0, said
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6)
    print(f"cut off after step {done}, ended {seconds:.1f} s later, continued to step {len(losses(cut))}")
