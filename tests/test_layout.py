"""The house rules that a machine can check: one-way imports, relative imports, and what the bare install gives."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "methods", "engine")
MAY_IMPORT = {"kernels": {"kernels"}, "methods": {"kernels", "methods"}, "engine": set(PACKAGES)}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    """Which of our packages a file imports, whether relatively or by the installed name."""
    depth = len(path.relative_to(ROOT).parts) - 1  # folders between the file and the root
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0:
                names = [module]
            elif node.level == depth + 1:
                names = [f"voxtrast.{module}"] if module else [f"voxtrast.{alias.name}" for alias in node.names]
            else:
                names = [f"voxtrast.{path.relative_to(ROOT).parts[0]}"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("voxtrast.")}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported_packages(path) - MAY_IMPORT[package])
        for path in sources(package)
        if imported_packages(path) - MAY_IMPORT[package]
    }
    assert not wrong, f"only {sorted(MAY_IMPORT[package])} may be imported from {package}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_the_packages_are_relative(package: str) -> None:
    absolute = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom | ast.Import)
        and any(
            name.split(".")[0] in ("voxtrast", *PACKAGES)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else [])
            + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        )
    ]
    assert not absolute


def test_the_import_check_sees_an_upward_import(tmp_path: Path) -> None:
    module = ROOT / "kernels" / "warp.py"
    assert imported_packages(module) <= {"kernels"}
    tree = ast.parse("from ..engine import config")
    assert isinstance(tree.body[0], ast.ImportFrom)
    upward = ROOT / "kernels" / "_upward_import_for_the_test.py"
    upward.write_text("from ..engine import config\nfrom .. import methods\n")
    try:
        assert imported_packages(upward) == {"engine", "methods"}
    finally:
        upward.unlink()


BARE = """
import importlib.abc, sys
class OnlyTorch(importlib.abc.MetaPathFinder):
    # what a machine with nothing but torch lacks
    missing = {"numpy", "scipy", "deepspeed", "nvidia", "monai", "omegaconf", "typer", "rich", "SimpleITK",
               "dynamic_network_architectures", "safetensors", "triton", "cupy", "numba", "psutil"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.missing:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)
sys.meta_path.insert(0, OnlyTorch())
"""
USE_A_LOSS = """
import torch
from voxtrast.kernels import vector_regression_loss
prediction = torch.ones(1, 3, 4, 4, 4, requires_grad=True)
loss = vector_regression_loss(prediction, torch.zeros(1, 3, 4, 4, 4), torch.ones(1, 1, 4, 4, 4))
loss.backward()
assert loss.item() == 3.0 and prediction.grad is not None
print("loss", loss.item())
"""


def test_the_kernels_need_torch_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", BARE + USE_A_LOSS], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "loss 3.0" in done.stdout
    assert "Warning" not in done.stderr.replace("Failed to initialize NumPy", "")


@pytest.mark.slow
def test_a_wheel_installed_beside_torch_alone_gives_a_loss(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "voxtrast/kernels/_C.abi3.so" in names
    assert "voxtrast/methods/recipes/cover-3d.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "setup", "voxtrast/__init__"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run([python, "-c", USE_A_LOSS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "deepspeed" not in listed
    assert "numpy" not in listed
