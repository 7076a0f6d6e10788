"""Whether a file of weights fits the network that it is for, tensor by tensor."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..weights import first_few

# What DistributedDataParallel, DeepSpeed and torch.compile put before the names of what they wrap.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+|(?<=\.)(?:_orig_mod\.)+")


@dataclass(frozen=True)
class Fit:
    """What becomes of a network that is given a file. Each tensor is named once, by its first name in the network.

    `loaded` and `filled` together are what the file holds for it; `partly` names some of `loaded`.
    """

    network: str  # its class
    loaded: tuple[str, ...]  # pretrained
    filled: tuple[str, ...]  # in the file with initial values, for no loss reached them
    partly: tuple[str, ...]  # pretrained in some channels, the others have initial values
    missing: tuple[str, ...]  # not in the file: the network keeps its own
    unexpected: tuple[str, ...]  # in the file, without a place in the network
    other_shape: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the screen: every count, and the first names of each."""
        titles = {
            "loaded": "pretrained",
            "filled": "not pretrained, in the file with initial values",
            "partly": "of the pretrained, some channels are not",
            "missing": "not in the file, the task's own layers",
            "unexpected": "unexpected",
            "other_shape": "of another shape",
        }
        lines = [f"fit to {self.network.rpartition('.')[2]}:"]
        for field, title in titles.items():
            names = getattr(self, field)
            shown = "" if not names or field == "loaded" else f": {first_few(list(names))}"
            lines.append(f"  {len(names):4d} {title}{shown}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For the card: the pretrained are counted, the others named in full."""
        others = ("filled", "partly", "missing", "unexpected", "other_shape")
        return {"network": self.network, "loaded": len(self.loaded)} | {
            name: list(getattr(self, name)) for name in others
        }


def examine(
    network: str,
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    *,
    task_layers: tuple[str, ...] = (),
    filled: Collection[str] = (),
    partly: Collection[str] = (),
) -> Fit:
    """How the tensors of a file fit the state dict of a network.

    Args:
        network: its class, for the report.
        expected: state dict; names of one tensor are one entry of the report, and one of them in the file is enough.
        given: the tensors of the file.
        task_layers: prefixes of what may be missing.
        filled, partly: names that are not pretrained, or not in all channels.

    Raises: UserError naming what is missing, unexpected or of another shape.
    """
    found: dict[str, list[str]] = {field: [] for field in ("loaded", "filled", "partly", "missing", "other_shape")}
    for names in _names_of_each(expected):
        inside = [name for name in names if name in given]
        if not inside:
            found["missing"].append(names[0])
            continue
        differing = [name for name in inside if given[name].shape != expected[name].shape]
        if differing:
            shapes = f"{tuple(given[differing[0]].shape)} for {tuple(expected[differing[0]].shape)}"
            found["other_shape"].append(f"{differing[0]} {shapes}")
        elif any(name in filled for name in names):
            found["filled"].append(names[0])
        else:
            found["loaded"].append(names[0])
            found["partly"] += names[:1] if any(name in partly for name in names) else []
    unexpected = tuple(name for name in given if name not in expected)
    fit = Fit(network, unexpected=unexpected, **{field: tuple(names) for field, names in found.items()})
    lacking = [name for name in fit.missing if not name.startswith(task_layers)] if task_layers else list(fit.missing)
    complaints = [
        f"{title}: {first_few(list(names))}"
        for title, names in (
            ("missing", lacking),
            ("unexpected", fit.unexpected),
            ("of another shape", fit.other_shape),
        )
        if names
    ]
    if complaints:
        raise UserError(
            f"the weights do not fit {network} ({'; '.join(complaints)}); export them with the version of voxtrast "
            "that wrote them"
        )
    return fit


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of modules put before it."""
    return _WRAPPERS.sub("", name)


def _names_of_each(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor; the libraries name most of theirs twice or more."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        groups.setdefault(place, []).append(name)
    return list(groups.values())
