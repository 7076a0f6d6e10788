"""Why a file did not enter the store: one line that a person can act on."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, order=True)
class Rejection:
    """A line of rejected.jsonl: the file (relative to RAW), what is wrong with it, what to do."""

    file: str
    reason: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class RejectedError(Exception):
    """Raised wherever a file turns out not to be usable; caught once, where the file's name is known."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = " ".join(reason.split())
        self.remedy = " ".join(remedy.split())
