"""Pretrained tensors as one safetensors file, with what is needed to rebuild their network.

The file holds the network's own keys and, under the metadata key `voxtrast`, a JSON description: format, method,
recipe, step, backbone, version, untrained (names of tensors that no loss reached). The networks name most tensors twice
(`…convs.0.conv.weight` is also `…convs.0.all_modules.0.weight`); safetensors refuses shared tensors, so each is stored
once under its first name, the other names stand in the description, and `load_weights` gives them back.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..methods.backbone import LEFT_OUT, architecture_of, transferable_state
from .errors import UserError

METADATA_KEY = "voxtrast"
FORMAT = 1
SEGMENTATION = "segmentation"  # the `kind` of a fine-tuned model; pretrained weights have none
RUN_WEIGHTS = "weights.safetensors"
_ALIASES = "aliases"  # inside the JSON: a second metadata key would make the header's byte order a matter of chance


def save_weights(path: Path | str, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all.

    Args:
        path: target; replaced where it exists. Its folder is made.
        tensors: by the network's own names; names of one tensor are stored once. Any device, any layout.
        description: JSON values; must hold `format` and `backbone`.

    Raises: ValueError where the description lacks a field; UserError where the file cannot be written.
    """
    path = Path(path)
    for field in ("format", "backbone"):
        if field not in description:
            raise ValueError(f"description: the field {field!r} is missing; found {sorted(description)}")
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(_identity(name, tensor), _sibling(name, tensor, tensors) or name)
        if first == name:
            stored[name] = tensor.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[name] = first
    text = json.dumps({**description, _ALIASES: aliases}, sort_keys=True)
    write_whole(path, lambda partial: save_file(stored, partial, metadata={METADATA_KEY: text}))


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU under every name they had, and the description.

    Raises: UserError where the file is missing, is not safetensors, was not written by voxtrast, or has a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such weights file; expected a .safetensors file or a run that has written {RUN_WEIGHTS}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file ({error}); copy it again or write it anew with `voxtrast export`"
        ) from error
    if METADATA_KEY not in metadata:
        raise UserError(
            f"{path}: a safetensors file without the metadata key {METADATA_KEY!r}, so its network is "
            f"unknown; expected a file that voxtrast wrote, such as RUN/{RUN_WEIGHTS}"
        )
    try:
        description = json.loads(metadata[METADATA_KEY])
        found = description["format"]
        aliases = description.pop(_ALIASES, {})
        if not isinstance(description["backbone"], dict) or not isinstance(aliases, dict):
            raise TypeError("backbone and aliases must be objects")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its description is broken ({error!r}); write the file anew with `voxtrast export`"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{path}: format {found!r} is unknown, this version reads format {FORMAT}; "
            "use the version of voxtrast that wrote it, or a newer one"
        )
    for alias, first in aliases.items():
        if first not in tensors:
            raise UserError(f"{path}: the tensor {first!r} that its description names is missing; copy it again")
        tensors[alias] = tensors[first]
    return tensors, description


def find_weights(path: Path | str) -> Path:
    """The weights file of a run folder, or the file itself. `load_weights` complains where there is none."""
    path = Path(path)
    return path / RUN_WEIGHTS if path.is_dir() else path


def load_into(network: nn.Module, tensors: Mapping[str, Tensor], untrained: Sequence[str] = ()) -> list[str]:
    """Copies pretrained tensors into a network of `build_network`, all of them or none.

    Args:
        network: of any architecture.
        tensors: by the network's names; one of a tensor's several names is enough.
        untrained: names of tensors that pretraining did not train; the network keeps its own in their place.

    Returns: the network's names that were not pretrained: its segmentation layers, and those of `untrained`.

    Raises: UserError naming the tensors that are missing, have another shape, or have no place in the network.
    """
    copy_into(transferable_state(network), tensors, untrained)
    last_layers = architecture_of(network).last_layers
    return [name for name in network.state_dict() if name.startswith(last_layers)] + list(untrained)


def copy_into(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], untrained: Sequence[str] = ()) -> None:
    """Copies tensors in place over those of the same names, all of them or none; see `load_into`."""
    sources = matching(expected, tensors, untrained)
    with torch.no_grad():
        for name, source in sources.items():
            expected[name].copy_(source)


def matching(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], untrained: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors that go over those of `expected`, each under its first name; see `load_into`."""
    names_of: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in expected.items():
        names_of.setdefault(_identity(name, tensor), []).append(name)
    missing: list[str] = []
    differing: list[str] = []
    sources: dict[str, Tensor] = {}
    for names in names_of.values():
        found = [name for name in names if name in tensors]
        if not found:
            missing.append(names[0])
        for name in found:
            if tensors[name].shape != expected[name].shape:
                differing.append(f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name].shape)}")
            elif not any(each in untrained for each in names):
                sources[names[0]] = tensors[name]
    unknown = [name for name in tensors if name not in expected and not name.startswith(LEFT_OUT)]
    complaints = [
        f"{title}: {first_few(names)}"
        for title, names in (("missing", missing), ("of another shape", differing), ("unknown", unknown))
        if names
    ]
    if complaints:
        raise UserError(
            f"the weights do not fit the network ({'; '.join(complaints)}); "
            "build the network from the backbone that the weights file describes"
        )
    return sources


def write_whole(path: Path, write: Any) -> None:
    """Calls `write(partial path)`, then puts the result in place: a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # as the umask has it; safetensors would leave its owner alone to read
        write(partial)
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors wrap the system's errors
        raise UserError(f"{path}: cannot be written ({error}); free space or name another place") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor, different otherwise."""
    if tensor.numel() == 0:
        return (name,)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _sibling(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """The first name of a tensor that the library names twice, where copying (by a moving average, say) parted them."""
    block, found, rest = name.rpartition(".all_modules.")
    if not found:
        return None
    index, _, leaf = rest.partition(".")
    # By place first: in a fresh network the biases of both parts are zeros.
    parts = ("conv", "norm") if index == "0" else ("norm", "conv")
    names = (f"{block}.{part}.{leaf}" for part in parts)
    return next((other for other in names if other in tensors and torch.equal(tensors[other], tensor)), None)


def first_few(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
