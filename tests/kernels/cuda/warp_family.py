"""The operators of the warp family by the emulated kernels: as csrc/cuda/*.cu, on guarded copies of the tensors."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from emulated import TYPES, Emulated
from torch import Tensor

OPERATORS = (
    "warp",
    "warp_backward",
    "compose_displacement",
    "vector_regression_loss",
    "vector_regression_loss_backward",
    "warped_cosine_loss",
    "warped_cosine_loss_backward",
)


@contextmanager
def in_place_of_the_cpu(run: Emulated) -> Iterator[None]:
    """The public functions run the emulated kernels on tensors of the CPU."""
    library = torch.library.Library("voxtrast", "IMPL")
    operators = WarpFamily(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in OPERATORS:
            library.impl(name, getattr(operators, name), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


class WarpFamily:
    def __init__(self, run: Emulated) -> None:
        self.run = run

    def warp(self, image: Tensor, displacement: Tensor, deterministic: bool = True) -> Tensor:
        image, displacement, output = self.copy(image), self.copy(displacement), self.like(image)
        self.run("warp", image, displacement, output, *self.shape(image))
        return output.clone()

    def compose_displacement(self, outer: Tensor, inner: Tensor) -> Tensor:
        outer, inner, output = self.copy(outer), self.copy(inner), self.like(outer)
        self.run("compose_displacement", outer, inner, output, *self.shape(outer)[:2])
        return output.clone()

    def warp_backward(
        self,
        gradient: Tensor,
        image: Tensor,
        displacement: Tensor,
        need_image: bool,
        need_displacement: bool,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor]:
        gradient, image, displacement = (self.copy(tensor) for tensor in (gradient, image, displacement))
        grad_image, grad_displacement = self.like(image, need_image), self.like(displacement, need_displacement)
        shape = self.shape(image)
        if need_image:
            words, sums = self.words(image), self.run.empty(*image.shape)
            arguments = gradient, displacement, grad_image, words, sums
            self.run("differentiate_image", *arguments, *shape, int(deterministic))
        if need_displacement:
            self.run("differentiate_displacement", gradient, image, displacement, grad_displacement, *shape)
        return grad_image.clone(), grad_displacement.clone()

    def vector_regression_loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        tensors, sizes = self.fields(prediction, target, mask)
        loss, mask_sum, partials = self.run.empty(1), self.run.empty(1), self.partials(prediction)
        self.run("vector_regression_loss", *tensors, loss, mask_sum, partials, *sizes)
        return loss[0].clone(), mask_sum[0].clone()

    def vector_regression_loss_backward(
        self, grad_loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, mask_sum: Tensor
    ) -> Tensor:
        tensors, sizes = self.fields(prediction, target, mask)
        gradient = self.like(tensors[0])
        scalars = self.copy(grad_loss), self.copy(mask_sum)
        self.run("vector_regression_loss_backward", scalars[0], *tensors, scalars[1], gradient, *sizes)
        return gradient.clone()

    def warped_cosine_loss(
        self, fixed: Tensor, moving: Tensor, displacement: Tensor, mask: Tensor, deterministic: bool = True
    ) -> tuple[Tensor, Tensor]:
        tensors = [self.copy(tensor) for tensor in (fixed, moving, displacement, mask)]
        loss, mask_sum, partials = self.run.empty(1), self.run.empty(1), self.partials(fixed)
        self.run("warped_cosine_loss", *tensors, loss, mask_sum, partials, *self.shape(fixed))
        return loss[0].clone(), mask_sum[0].clone()

    def warped_cosine_loss_backward(
        self,
        grad_loss: Tensor,
        fixed: Tensor,
        moving: Tensor,
        displacement: Tensor,
        mask: Tensor,
        mask_sum: Tensor,
        need_fixed: bool,
        need_moving: bool,
        need_displacement: bool,
        deterministic: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [self.copy(tensor) for tensor in (grad_loss, fixed, moving, displacement, mask, mask_sum)]
        found = [
            self.like(tensor, need)
            for tensor, need in zip(tensors[1:4], (need_fixed, need_moving, need_displacement), strict=True)
        ]
        slopes, stored = self.run.empty(2 * mask.numel() if need_moving else 0), self.run.empty(*fixed.shape)
        scratch = slopes, self.words(fixed), stored, self.run.empty(*fixed.shape)
        self.run("warped_cosine_loss_backward", *tensors, *found, *scratch, *self.shape(fixed), int(deterministic))
        return tuple(tensor.clone() for tensor in found)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.run.copy(tensor.reshape(1) if tensor.dim() == 0 else tensor)

    def like(self, tensor: Tensor, needed: bool = True) -> Tensor:
        return self.run.empty(*tensor.shape if needed else (0,), dtype=tensor.dtype)

    def shape(self, tensor: Tensor) -> tuple[Tensor, int, int]:
        return torch.tensor(tensor.shape), tensor.dim(), TYPES[tensor.dtype]

    def fields(self, *tensors: Tensor) -> tuple[list[Tensor], tuple[int, int, int]]:
        batch, components, *sizes = tensors[0].shape
        return [self.copy(tensor) for tensor in tensors], (batch, components, torch.Size(sizes).numel())

    def words(self, image: Tensor) -> Tensor:
        return self.run.empty(self.run.count("count_words", *self.shape(image)[:2]), dtype=torch.int32)

    def partials(self, image: Tensor) -> Tensor:
        points = image[0, 0].numel()
        return self.run.empty(2 * self.run.count("count_partials", image.shape[0], points), dtype=torch.float64)
