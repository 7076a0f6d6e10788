"""The house rules that a machine can check: one-way imports, relative imports, and what the bare install gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "methods", "engine")
MAY_IMPORT = {"kernels": {"kernels"}, "methods": {"kernels", "methods"}, "engine": set(PACKAGES)}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path: Path, source: str | None = None) -> set[str]:
    """Which of our packages a file imports, whether relatively or by the installed name."""
    depth = len(path.relative_to(ROOT).parts) - 1  # folders between the file and the root
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom | ast.Import)
        and any(
            name.split(".")[0] in ("voxtrast", *PACKAGES)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else [])
            + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
        )
    ]
    assert not absolute


def test_the_import_check_sees_an_upward_import() -> None:
    assert imported_packages(ROOT / "kernels" / "x.py", "from ..engine import config\nfrom .. import methods") == {
        "engine",
        "methods",
    }
    assert imported_packages(ROOT / "methods" / "parts" / "x.py", "from ...engine.data import store") == {"engine"}
    assert imported_packages(ROOT / "methods" / "x.py", "import voxtrast.engine\nfrom .parts import heads") == {
        "engine",
        "methods",
    }


USE_A_LOSS = """
import torch
from voxtrast.kernels import vector_regression_loss
prediction = torch.ones(1, 3, 4, 4, 4, requires_grad=True)
loss = vector_regression_loss(prediction, torch.zeros(1, 3, 4, 4, 4), torch.ones(1, 1, 4, 4, 4))
loss.backward()
assert loss.item() == 3.0 and prediction.grad is not None
print("loss", loss.item())
"""


# What `pip install torch` brings with it.
TORCH_AND_ITS_OWN = ("torch", "torchgen", "functorch", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2",
                     "markupsafe", "fsspec", "filelock")  # fmt: skip


def test_the_kernels_need_torch_and_nothing_else(tmp_path: Path) -> None:
    """Runs them in a Python that finds torch, what torch needs, and the folder kernels/."""
    installed = Path(torch.__file__).parent.parent
    for name in TORCH_AND_ITS_OWN:
        (tmp_path / name).symlink_to(installed / name)
    (tmp_path / "voxtrast").mkdir()
    (tmp_path / "voxtrast" / "kernels").symlink_to(ROOT / "kernels")
    check = f"import sys; sys.path.append({str(tmp_path)!r})\n{USE_A_LOSS}\nimport numpy"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", check], capture_output=True, encoding="utf-8", errors="replace"
    )
    assert "loss 3.0" in done.stdout, done.stderr
    assert done.stderr.rstrip().endswith("No module named 'numpy'"), "the surroundings are not bare"
    assert "RuntimeWarning" not in done.stderr
