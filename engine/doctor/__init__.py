"""`voxtrast doctor`: what is installed, what will run where and why, whether it works, and remedies."""

from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import UserError
from .data_plane import check_data_plane
from .devices import check_devices
from .finding import BROKEN, Finding, from_error
from .network import check_hosts
from .operators import check_operators
from .reading import check_store
from .report import print_report
from .two_ranks import check_two_ranks
from .versions import check_versions

__all__ = ["Finding", "examine", "print_report"]


def examine(hostfile: Path | None = None, store: Path | None = None, *, quick: bool = False) -> list[Finding]:
    """All findings, in the order of the report; a check that fails in an unknown way is a finding itself.

    Args:
        hostfile: try ssh and a sum over all ranks between its hosts.
        store: measure how fast it is read.
        quick: leave out what compiles and what trains.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("versions", check_versions),
        ("devices", check_devices),
        ("operators", check_operators),
    ]
    if not quick:
        checks.append(("data plane", check_data_plane))
    if store is not None:
        checks.append(("store", lambda: check_store(store)))
    if hostfile is not None:
        checks.append(("network", lambda: check_hosts(hostfile)))
    if not quick:
        checks.append(("training", check_two_ranks))
    found: list[Finding] = []
    for area, check in checks:
        try:
            found += check()
        except UserError as error:
            found.append(from_error(area, "check", error))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            found.append(Finding(area, "check", BROKEN, said, "report this with the line"))
    return found
