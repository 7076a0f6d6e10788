"""One line of the doctor's report."""

from dataclasses import dataclass

from ..errors import UserError

GOOD, NOTE, BROKEN = "good", "note", "broken"


@dataclass(frozen=True)
class Finding:
    """`state` is good, note (works, but not as well as it could) or broken; a remedy belongs to the last two."""

    area: str
    name: str
    state: str
    detail: str
    remedy: str = ""


def from_error(area: str, name: str, error: UserError, state: str = BROKEN) -> Finding:
    """What was found and the remedy, of an error that says both in one line."""
    text = str(error)
    for mark in ("; ", ": "):
        detail, _, remedy = text.rpartition(mark)
        if detail:
            return Finding(area, name, state, detail, remedy)
    return Finding(area, name, state, text, "the documentation of this command says more")
