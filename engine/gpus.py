"""NVIDIA GPUs that are in the machine but that torch cannot use, so that `device: auto` means the CPU."""

import os
import sys
from pathlib import Path

import torch

DEVICES = Path("/dev")
REMEDY = "install the build of torch that fits the driver (`nvidia-smi` shows its CUDA; docs/install.md)"


def unused_gpus() -> str | None:
    """What stands in the way, in words; None where torch sees a GPU, where there is none, or where all are hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or torch.cuda.is_available():
        return None
    count = len(list(DEVICES.glob("nvidia[0-9]*")))
    if count == 0:
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"{count} NVIDIA GPU(s) are here, but torch {torch.__version__}, built {built}, cannot use them"


def note_unused_gpus() -> None:
    """One line where `auto` is about to mean the CPU for want of another torch."""
    if found := unused_gpus():
        print(f"note: {found}: running on the CPU; {REMEDY}", file=sys.stderr)
