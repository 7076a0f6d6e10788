"""The tables of block sizes: complete, usable, and compiled here for machines that are not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxtrast.kernels.triton import grids
from voxtrast.kernels.triton.configurations import TABLE, Configuration, candidates, choose, key_of

ARCHITECTURES = {"80": 99, "90": 227, "100": 227}  # KiB of shared memory for a program; 80 stands for 8.6 and 12 too
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ENTRIES = [(kernel, dtype, chunk) for kernel in ("sums", "gradients") for dtype, chunk in
           ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64),
            (torch.float32, 128))]  # fmt: skip
COMPILING = Path(__file__).with_name("compiling.py")


def table() -> dict[str, dict[str, Configuration]]:
    read = json.loads(TABLE.read_text(encoding="utf-8"))
    return {name: {key: Configuration(**entry) for key, entry in entries.items()} for name, entries in read.items()}


def work(kernel: str, architecture: str, dtype: torch.dtype, chunk: int, form: str = "shifted", **more) -> str:
    chosen = table()[architecture][key_of(kernel, dtype, chunk)]
    exact = dtype != torch.float32
    constants = {"FORM": form, "EXCLUDE": True, "EXACT": exact, "PRECISION": "ieee" if exact else "tf32x3",
                 "WIDTH": chunk, "CHUNK": chunk}  # fmt: skip
    if kernel == "sums":
        constants |= {"BOTH": form != "softplus", "SAME": False}
        constants |= {"BLOCK_FIXED": chosen.own, "BLOCK_PASSING": chosen.other}
    else:
        constants |= {"LIFT": 0, "POSITIVES": "diagonal"}
        constants |= {"BLOCK_OWN": chosen.own, "BLOCK_OTHER": chosen.other}
    return json.dumps({"kernel": kernel, "architecture": int(architecture), "dtype": DTYPES[dtype],
                       "options": chosen.launch, "constants": {**constants, **more}})  # fmt: skip


def compiled(*works: str) -> list[dict[str, int]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(COMPILING), *works],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(found: dict[str, int], architecture: str, chosen: Configuration) -> None:
    assert found["spills"] == 0, found
    assert found["registers"] * 32 * chosen.warps * chosen.resident <= 65536, found
    assert found["shared"] <= ARCHITECTURES[architecture] * 1024, found
    assert found["loops"] >= 1


def test_every_architecture_has_every_entry() -> None:
    keys = {key_of(*entry) for entry in ENTRIES}
    for architecture in ARCHITECTURES:
        entries = table()[architecture]
        assert set(entries) == keys
        for each in entries.values():
            # Sets with themselves are cut in whole blocks of both sizes.
            assert each.own % each.other == 0
            assert 256 % each.own == 0


def test_small_problems_get_small_blocks() -> None:
    found = choose("sums", torch.bfloat16, 64, 20, torch.device("cpu"), pytest.fail)
    assert (found.own, found.other) == (32, 32)
    assert choose("gradients", torch.float32, 16, 1, torch.device("cpu"), pytest.fail).own == 16


@pytest.mark.parametrize(("architecture", "kernel"), [("80", "sums"), ("90", "gradients"), ("100", "sums")])
def test_a_kernel_compiles_for_an_architecture(architecture: str, kernel: str) -> None:
    (found,) = compiled(work(kernel, architecture, torch.bfloat16, 128))
    assert_fits(found, architecture, table()[architecture][key_of(kernel, torch.bfloat16, 128)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_compiles_without_spills(architecture: str) -> None:
    entries = [*ENTRIES, *((kernel, torch.float16, chunk) for kernel, dtype, chunk in ENTRIES if dtype.itemsize == 2)]
    for entry, found in zip(entries, compiled(*(work(*entry[:1], architecture, *entry[1:]) for entry in entries)),
                            strict=True):  # fmt: skip
        assert_fits(found, architecture, table()[architecture][key_of(*entry)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rarer_forms_compile() -> None:
    half = (torch.bfloat16, 128)
    works = [work(kernel, "90", *half, form) for kernel in ("sums", "gradients") for form in ("online", "softplus")]
    works += [work("sums", "90", *half, SAME=True), work("gradients", "90", *half, POSITIVES="ranges")]
    works += [work("sums", "90", *half, WIDTH=384), work("gradients", "90", *half, WIDTH=384)]
    for found in compiled(*works):
        assert found["shared"] <= ARCHITECTURES["90"] * 1024


def test_tuning_measures_what_its_table_lacks_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    monkeypatch.setenv("VOXTRAST_TUNE", str(file))
    times = {each: float(place != 3) for place, each in enumerate(candidates(torch.bfloat16, 64))}
    monkeypatch.setattr("triton.testing.do_bench", lambda work, **_: times[work()])
    arguments = ("sums", torch.bfloat16, 64, 4096, torch.device("cpu"))
    fastest = [each for each, time in times.items() if time == 0.0]
    assert [choose(*arguments, lambda each: each)] == fastest
    assert list(json.loads(file.read_text(encoding="utf-8"))["80"]) == ["sums, 16 bit, 64 channels"]
    assert [choose(*arguments, pytest.fail)] == fastest


def test_small_problems_measure_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOXTRAST_TUNE", str(tmp_path / "tuned.json"))
    found = choose("sums", torch.bfloat16, 64, 100, torch.device("cpu"), pytest.fail)
    assert found == table()["80"][key_of("sums", torch.bfloat16, 64)].shrunk(100)


@pytest.mark.parametrize("count", [200, 2048, 16384, 36864, 65536, 884736])
def test_most_of_a_device_is_busy(count: int) -> None:
    fixed, passing, places = -(-count // 128), -(-count // 64), 264
    of_fixed, of_passing = grids.groups(fixed, passing, 1, places, 64, True)
    rounds = -(-of_fixed * of_passing // places) * -(-fixed // of_fixed) * -(-passing // of_passing)
    splits = grids.even_splits(fixed, passing, places, 64)
    of_splits = -(-fixed * splits // places) * -(-passing // splits)
    for found in (rounds, of_splits):
        assert found <= max(1, 1.2 * fixed * passing / places)


def test_importing_the_package_imports_no_triton() -> None:
    script = "import sys, voxtrast.kernels; assert not any(name.split('.')[0] == 'triton' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
