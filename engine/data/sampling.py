"""Which case a slot takes and where its crop lies: the choices of a run, besides the views of its method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import UserError
from .store import Case


@dataclass
class Sampling:
    crops_per_visit: int = 1  # consecutive slots that take the same volume: more of them read less and vary less
    # Folder of RAW -> its share of the visits, to be divided by their sum; without, every volume comes once an epoch
    weights: dict[str, float] = field(default_factory=dict)
    foreground: float = 0.0  # share of the crops that are drawn around a voxel that shows something


def of_validation(sampling: Sampling) -> Sampling:
    """The cases held aside are few, and each counts as much as the others."""
    return Sampling(foreground=sampling.foreground)


def data_sets(cases: Sequence[Case], weights: Mapping[str, float]) -> dict[str, str]:
    """Case id -> the folder among those of `weights` that its source lies in; the longest, where one holds another.

    Raises: UserError naming a case that lies in none of them.
    """
    if not weights:
        return {}
    folders = sorted((folder.strip("/") + "/", folder) for folder in weights)
    found: dict[str, str] = {}
    for case in cases:
        inside = [name for prefix, name in folders if case.source.lstrip("/").startswith(prefix)]
        if not inside:
            raise UserError(
                f"sampling.weights: case {case.id} ({case.source}) lies in none of {', '.join(sorted(weights))}; give "
                "its folder a weight too, or prepare it into another store"
            )
        found[case.id] = inside[-1]
    return found
