"""What `nvcc -Xptxas -v` says of each kernel."""

import re

PATTERN = r"function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?(\d+) registers"


def registers_and_spills(said: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled, by the architecture and name of the kernel."""
    found = re.findall(PATTERN, said, re.DOTALL)
    return {f"{sm} {name}": (int(registers), int(stored) + int(read)) for name, sm, stored, read, registers in found}
