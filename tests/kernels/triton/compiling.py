"""Compiles the kernels for an architecture that need not be there: python compiling.py '{"architecture": 90, ...}' ...

Prints a JSON object for each argument: what the kernel takes of a multiprocessor, and how often its inner loops go to
memory for registers. In a process of its own, because the tests around it run Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from voxtrast.kernels.triton.pairwise_gradients import gradient_kernel
from voxtrast.kernels.triton.pairwise_sums import sums_kernel

KERNELS = {"sums": sums_kernel, "gradients": gradient_kernel}
VECTORS = ("fixed_ptr", "passing_ptr", "own_ptr", "other_ptr")
WHOLE = ("first_ptr", "last_ptr")
ALIGNED = [["tt.divisibility", 16]]


def compiled(kernel: str, architecture: int, dtype: str, options: dict[str, Any], constants: dict[str, Any]) -> Any:
    function = KERNELS[kernel]
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}" if name in VECTORS else "*i64" if name in WHOLE else "*fp32"
            attributes[(position,)] = ALIGNED
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def inner_loops(assembly: str) -> list[list[str]]:
    """The instructions of the loops that hold no other loop."""
    lines = [line for line in assembly.splitlines() if re.search(r"/\*[0-9a-f]{4,5}\*/", line) or line[:2] == ".L"]
    labels = {line.split(":")[0]: place for place, line in enumerate(lines) if line[:2] == ".L"}
    spans = []
    for end, line in enumerate(lines):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch.group(1), end) < end - 2:
            spans.append((labels[branch.group(1)], end))
    inner = [span for span in spans if not any(span[0] <= a and b <= span[1] and (a, b) != span for a, b in spans)]
    return [lines[begin:end] for begin, end in inner]


def resources(**work: Any) -> dict[str, Any]:
    kernel = compiled(**work)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output_of(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        loops = inner_loops(output_of(knobs.nvidia.nvdisasm.path, "-c", file.name))
    counts = dict(re.findall(r"(\w+):(\d+)", next(line for line in usage.splitlines() if "REG:" in line)))
    products = [loop for loop in loops if any("MMA" in line for line in loop)]
    least = min(map(len, products))
    whole = [loop for loop in products if len(loop) < 1.2 * least]  # the loops that mask no pairs have the least to do
    return {
        "registers": int(counts["REG"]),
        "stack": int(counts["STACK"]),
        "shared": kernel.metadata.shared,
        "loops": len(products),
        "spills": max(sum("LDL" in line or "STL" in line for line in loop) for loop in whole),
        "instructions": least,
    }


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(resources(**json.loads(argument))), flush=True)
