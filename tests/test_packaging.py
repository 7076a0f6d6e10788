"""What is installed: the metadata say what the code needs, an sdist is enough to build a wheel, and that runs bare."""

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_layout import USE_A_LOSS

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# Where the name of a module is not that of its distribution.
DISTRIBUTIONS = {
    "dynamic_network_architectures": ["dynamic-network-architectures"],
    "nvidia": ["nvidia-dali-cuda130", "nvidia-dali-cuda120"],
    "yaml": ["pyyaml"],
    "sklearn": ["scikit-learn"],
    "PIL": ["pillow"],
    "cupy": ["cupy-cuda13x", "cupy-cuda12x"],
    "cupyx": ["cupy-cuda13x", "cupy-cuda12x"],
}
NO_DEPENDENCY = {"apex", "voxtrast"}  # built from source by those who want it; ourselves
# Lists of its own that an sdist leaves out: results are history, the others serve a clone.
NOT_IN_THE_SDIST = ("benchmarks/results/", ".ci/", ".gitignore", ".github/")


def names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", each, maxsplit=1)[0].lower() for each in requirements} - {"voxtrast"}


def third_party(package: str) -> set[str]:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - NO_DEPENDENCY


def undeclared(package: str, requirements: set[str]) -> list[str]:
    return sorted(
        module for module in third_party(package) if not requirements & set(DISTRIBUTIONS.get(module, [module.lower()]))
    )


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("kernels", ["gpu"]),  # Triton, where there is one
        ("methods", ["engine"]),
        ("engine", ["engine", "dali", "dali-cuda12", "dask", "demo", "gpu", "numba", "report"]),
        ("benchmarks", [*EXTRAS]),
    ],
)
def test_what_is_imported_is_declared(package: str, extras: list[str]) -> None:
    declared = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in extras))
    left = set(undeclared(package, declared)) - (
        {"batchgeneratorsv2"} if package == "benchmarks" else set()
    )  # nnunetv2
    assert not left


def test_the_check_of_imports_sees_what_is_missing() -> None:
    assert undeclared("kernels", set()) == ["torch", "triton"]
    assert "safetensors" in undeclared("engine", {"torch"})


def test_every_extra_and_every_dependency_is_documented() -> None:
    install = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    assert [extra for extra in EXTRAS if f"`{extra}`" not in install] == []
    wanted = names(PROJECT["dependencies"]).union(*(names(requirements) for requirements in EXTRAS.values()))
    lacking = {name for name in wanted if name not in table}
    # One line of the table stands for what CUDA 12 calls otherwise.
    assert {name for name in lacking if not name.endswith("-cu12")} == set()


def test_the_bare_install_needs_torch_alone() -> None:
    assert names(PROJECT["dependencies"]) == {"torch"}


def versions_in(changelog: str) -> list[str]:
    """Of the headings, the newest first."""
    return re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)


def disagreement(version: str, changelog: str, tags: list[str]) -> str | None:
    """What is wrong about the version of a commit that has these tags."""
    headings = versions_in(changelog)
    if not headings or headings[0] != "Unreleased":
        return "CHANGELOG.md begins with [Unreleased]"
    released = [tag.removeprefix("v") for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+.*", tag)]
    if any(tag != version for tag in released):
        return f"the tag says {released}, pyproject.toml {version}"
    if released and version not in headings:
        return f"CHANGELOG.md has no heading for {version}, which is tagged"
    dated = re.findall(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
    if version in headings and not dated:
        return f"the heading of {version} has no date"
    if len(headings) > 1 and headings[1] != version:
        return f"the newest release in CHANGELOG.md is {headings[1]}, pyproject.toml says {version}"
    return None


def test_version_tag_and_changelog_agree() -> None:
    git = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
    )
    tags = git.stdout.split() if git.returncode == 0 else []  # an sdist has no history
    assert disagreement(PROJECT["version"], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tags) is None


@pytest.mark.parametrize(
    ("version", "changelog", "tags", "said"),
    [
        ("1.0.0", "## [Unreleased]\n## [1.0.0] - 2026-12-01\n", ["v1.0.0", "paper"], None),
        ("1.0.0", "## [Unreleased]\n## [1.0.0] - 2026-12-01\n", [], None),
        ("0.1.0", "## [Unreleased]\n", [], None),
        ("1.0.1", "## [Unreleased]\n## [1.0.0] - 2026-12-01\n", [], "newest release"),
        ("1.0.0", "## [Unreleased]\n", ["v1.0.0"], "no heading"),
        ("1.0.0", "## [Unreleased]\n## [1.0.0] - 2026-12-01\n", ["v1.0.1"], "the tag says"),
        ("1.0.0", "## [Unreleased]\n## [1.0.0]\n", [], "no date"),
        ("1.0.0", "## [1.0.0] - 2026-12-01\n", [], "begins with"),
    ],
)
def test_a_version_that_disagrees_is_seen(version: str, changelog: str, tags: list[str], said: str | None) -> None:
    found = disagreement(version, changelog, tags)
    assert found is None if said is None else said in str(found)


def test_the_changelog_keeps_to_its_form() -> None:
    sections = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.slow
def test_a_wheel_from_the_sdist_beside_torch_alone_gives_a_loss(tmp_path: Path) -> None:
    words = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "-q", *words], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "unpacked", filter="data")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
    ).stdout.split("\n")
    assert [name for name in tracked if name and name not in inside and not name.startswith(NOT_IN_THE_SDIST)] == []
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]

    (source,) = (tmp_path / "unpacked").iterdir()
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
    assert "voxtrast/kernels/_C.abi3.so" in listed
    assert "voxtrast/kernels/triton/configurations.json" in listed
    assert "voxtrast/methods/recipes/cover-3d.yaml" in listed
    assert {"voxtrast/csrc/geometry/plan.h", "voxtrast/csrc/cpu/target.cpp"} <= set(listed)
    assert not [name for name in listed if name.startswith(("tests/", "benchmarks/", "setup", "voxtrast/__init__"))]

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run(
        [python, "-c", USE_A_LOSS], capture_output=True, encoding="utf-8", errors="replace", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    packages = subprocess.run(
        [python, "-m", "pip", "list"], capture_output=True, encoding="utf-8", errors="replace", check=True
    ).stdout
    assert "deepspeed" not in packages
    assert "numpy" not in packages
    # The command line says in one line what it lacks.
    voxtrast = subprocess.run(
        [tmp_path / "bare" / "bin" / "voxtrast", "--help"], capture_output=True, encoding="utf-8", errors="replace"
    )
    assert voxtrast.returncode != 0
    assert re.fullmatch(r"error: \w+ is not installed; .*voxtrast\[engine\]\n", voxtrast.stderr)
