"""Checks of arguments. Every error names the argument, what was expected and what it got."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_map(name: str, tensor: Tensor) -> None:
    """An image, feature map or field: (B, C, H, W) or (B, C, D, H, W), floating, not empty."""
    check_floating(name, tensor)
    if tensor.dim() not in (4, 5):
        raise ValueError(f"{name}: expected (B, C, H, W) or (B, C, D, H, W), got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: is empty, shape {tuple(tensor.shape)}")


def check_displacement(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """A displacement field for the map `like`: (B, D, *S), one component for each spatial axis."""
    check_floating(name, tensor)
    dimensions = like.dim() - 2
    expected = (like.shape[0], dimensions, *like.shape[2:])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {expected}, that is {dimensions} components for each voxel of {like_name}, "
            f"got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, like_name, like)


def check_components(name: str, tensor: Tensor) -> None:
    """A displacement field by itself."""
    check_map(name, tensor)
    if tensor.shape[1] != tensor.dim() - 2:
        raise ValueError(
            f"{name}: expected {tensor.dim() - 2} components along axis 1, one for each spatial axis, "
            f"got shape {tuple(tensor.shape)}"
        )


def check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name}, {tuple(like.shape)}, got {tuple(tensor.shape)}")
    check_device(name, tensor, like_name, like)


def check_mask(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Weights of the voxels of `like`: (B, 1, *S), floating or bool."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.bool:
        check_floating(name, tensor)
    expected = (like.shape[0], 1, *like.shape[2:])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {expected}, one weight for each voxel of {like_name}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, like_name, like)


def check_vectors(name: str, tensor: Tensor, like_name: str = "", like: Tensor | None = None) -> None:
    """A set of vectors (..., N, C), not empty, with the leading dimensions and channels of `like`."""
    check_floating(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name}: expected (..., N, C), vectors along the last axis, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError(f"{name}: is empty, shape {tuple(tensor.shape)}")
    if like is None:
        return
    if tensor.shape[:-2] != like.shape[:-2] or tensor.shape[-1] != like.shape[-1]:
        expected = ", ".join(map(str, (*like.shape[:-2], "N", like.shape[-1])))
        raise ValueError(f"{name}: expected shape ({expected}) as {like_name} has, got {tuple(tensor.shape)}")
    check_device(name, tensor, like_name, like)


def check_weights(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Weights of the vectors of `like`: (..., N), floating or bool."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.bool:
        check_floating(name, tensor)
    if tensor.shape != like.shape[:-1]:
        raise ValueError(
            f"{name}: expected shape {tuple(like.shape[:-1])}, one weight for each vector of {like_name}, "
            f"got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, like_name, like)


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}; cast it first")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: is on {tensor.device} while {like_name} is on {like.device}; move one of them")
