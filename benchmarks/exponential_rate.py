"""How many exponentials a GPU computes in a second. torch.exp would measure its memory: here each thread takes one of
another, thousands of times, in registers. Imported where there is a GPU, for triton."""

import torch
import triton
import triton.language as tl

BLOCK, ROUNDS = 1024, 4096


@triton.jit
def _chain(target, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = -1.0 / (place + 1).to(tl.float32)
    for _ in range(ROUNDS):
        value = tl.exp2(value) - 1.5  # goes to -1 and stays: never a denormal, never folded
    tl.store(target + place, value)


def run_chain(target: torch.Tensor) -> None:
    """Args: target: float32, on the GPU, a multiple of BLOCK numbers, each of which takes ROUNDS exponentials."""
    _chain[(target.numel() // BLOCK,)](target, BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=4)
