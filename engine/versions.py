"""Which versions compute: they are part of what a run's numbers depend on."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

PACKAGES = ("voxtrast", "torch", "deepspeed", "numpy")
DALI = "nvidia-dali-"  # its name goes on with the version of CUDA


def versions() -> dict[str, str]:
    """By name; "none" where a package is not installed."""
    found = {name: _version(name) for name in PACKAGES}
    dali = (each for each in distributions() if str(each.metadata["Name"]).lower().startswith(DALI))
    found["nvidia-dali"] = next((each.version for each in dali), "none")
    return found | {"python": platform.python_version()}


def commit() -> str | None:
    """Of the clone that this package runs from, `-dirty` where it was changed; VOXTRAST_COMMIT where that is set."""
    clone = Path(__file__).parent.parent
    if named := os.environ.get("VOXTRAST_COMMIT"):
        return named
    if not (clone / ".git").exists():  # installed: the version says it
        return None
    words = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
    try:
        return (
            subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=10).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, as `torch 2.12.0 -> 2.13.0, ...`; empty where nothing does or nothing was known."""
    names = [name for name in before if before[name] != now.get(name, "none")]
    return ", ".join(f"{name} {before[name]} -> {now.get(name, 'none')}" for name in names)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
