"""What a rank holds of parameters and moments that ZeRO cut into pieces: found, gathered and put back by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VALUE = None  # the key of the parameter itself, beside those of its moments


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + count) of a flattened parameter are [start, start + count) of a flat partition."""

    flat: Tensor  # float32, of one parameter group, this rank's
    start: int
    offset: int
    count: int


class Pieces:
    """The flat float32 partitions of a partitioned optimizer of DeepSpeed (ZeRO 1, 2 and 3), as pieces of parameters.

    DeepSpeed's own `safe_set_full_*` fail under ZeRO 3 where the ranks do not divide a parameter's elements, and link
    the moments of the first parameter group alone under ZeRO 1 and 2 (0.19.8).

    Args:
        zero: the partitioned optimizer.
        parameters: the trained ones by name.
    """

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self._zero = zero
        self._parameters = dict(parameters)
        self._whole = hasattr(zero, "fp32_partitioned_groups_flat")  # ZeRO 3
        self._found = {name: self._find(parameter) for name, parameter in self._parameters.items()}

    @property
    def flats(self) -> list[Tensor]:
        """This rank's partition of each parameter group."""
        zero = self._zero
        found: list[Tensor] = zero.fp32_partitioned_groups_flat if self._whole else zero.single_partition_of_fp32_groups
        return found

    @property
    def state(self) -> Any:
        """Of the optimizer within, by flat partition."""
        return self._zero.optimizer.state

    def moments(self) -> tuple[list[str], dict[str, Tensor]]:
        """The names of the moments, and what is one number for all parameters, such as Adam's steps."""
        if not self.state:
            return [], {}
        flat = self.flats[0]
        cut = [key for key, value in self.state[flat].items() if torch.is_tensor(value) and value.shape == flat.shape]
        numbers = {key: torch.as_tensor(value) for key, value in self.state[flat].items() if key not in cut}
        return cut, numbers

    def keep(self, names: Iterable[str]) -> Callable[[], None]:
        """Copies all that this rank holds of some parameters; what is returned puts it back after a step."""
        names = list(names)
        copies = [(view, view.clone()) for name in names for view in self._views(name)]

        def restore() -> None:
            # Where the step made the first moments, those of zero gradients are zeros.
            for view, copy in copies:
                view.copy_(copy)
            if self._whole:
                for name in names:
                    parameter: Any = self._parameters[name]
                    parameter.partition()  # where it is whole, it is what the step made

        return restore

    def gather(self, key: str | None = VALUE) -> dict[str, Tensor]:
        """The parameters, or their moments of one name, float32 and whole, on the device. Collective."""
        sizes = [parameter_numel(parameter) for parameter in self._parameters.values()]
        device = next(iter(self._parameters.values())).device
        everything = torch.zeros(sum(sizes), device=device)
        parts = everything.split(sizes)
        for part, piece in zip(parts, self._found.values(), strict=True):
            if piece is not None:
                part.narrow(0, piece.offset, piece.count).copy_(self._own(piece, key))
        if dist.get_world_size() > 1:
            dist.all_reduce(everything)  # each element comes from one rank, the others add zeros: exact
        return {
            name: part.view(parameter_shape(parameter))
            for (name, parameter), part in zip(self._parameters.items(), parts, strict=True)
        }

    def put(self, tensors: Mapping[str, Tensor], key: str | None = VALUE) -> None:
        """Whole tensors into the pieces of this rank."""
        for name, tensor in tensors.items():
            piece = self._found[name]
            if piece is not None:
                source = tensor.detach().reshape(-1).narrow(0, piece.offset, piece.count)
                self._own(piece, key).copy_(source)

    def make_moments(self, cut: Iterable[str], numbers: Mapping[str, Tensor]) -> None:
        """Moments of zeros where there were none or others."""
        for flat in self.flats:
            state: dict[str, Tensor] = {key: torch.zeros_like(flat.detach()) for key in cut}
            # Counts of steps, too: fused optimizers read them where the moments are.
            self.state[flat] = state | {key: value.to(flat.device, copy=True) for key, value in numbers.items()}

    def forget_gradients(self) -> None:
        """Those of a parameter that the next step does not reach would be taken for its own (ZeRO 3, offload)."""
        if self._whole:
            self._zero.grad_partitions_flat_buffer.zero_()
        for flat in self.flats:
            if flat.grad is not None:
                flat.grad.zero_()

    def _views(self, name: str) -> Iterator[Tensor]:
        parameter: Any = self._parameters[name]
        yield parameter.ds_tensor.data if self._whole else parameter.data
        piece = self._found[name]
        if piece is None:
            return
        for tensor in (piece.flat, *self.state.get(piece.flat, {}).values()):
            if torch.is_tensor(tensor) and tensor.shape == piece.flat.shape:
                yield tensor.data.narrow(0, piece.start, piece.count)

    def _own(self, piece: Piece, key: str | None) -> Tensor:
        tensor = piece.flat if key is VALUE else self.state[piece.flat][key]
        return tensor.data.narrow(0, piece.start, piece.count)

    def _find(self, parameter: nn.Parameter) -> Piece | None:
        """None where all of it is on other ranks."""
        zero: Any = self._zero
        if self._whole:
            group, start, size = zero.grad_position[zero.get_param_id(parameter)]
            offset = size * zero._get_param_partition_rank(parameter)
            count = min(size, parameter_numel(parameter) - offset)  # the last ranks' ends are padding
            return Piece(self.flats[group], start, offset, count) if count > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        own, whole = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        return Piece(self.flats[mapping.param_group_index], own.start, whole.start, own.numel)


def parameter_shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where ZeRO 3 holds a part alone."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def parameter_numel(parameter: nn.Parameter) -> int:
    return parameter_shape(parameter).numel()
