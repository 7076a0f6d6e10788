"""One line of the doctor's report."""

from dataclasses import dataclass

GOOD, NOTE, BROKEN = "good", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """`state` is good, note (works, but not as well as it could) or broken; a remedy belongs to the last two."""

    area: str
    name: str
    state: str
    detail: str
    remedy: str = ""
