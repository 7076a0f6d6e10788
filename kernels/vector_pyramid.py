"""Coarse-to-fine aggregation of local correlations to one displacement field (COVER, ICCV 2025, vector pyramid).

    level 0:  phi = up(u_0)        level l:  phi <- W(up(phi), w) + w,  w = up(u_l)        last level:  w = u_l

with u_l the local correlation of the fixed map with the moving map warped by the phi so far, and up the same field on a
grid twice as fine. Each level searches a small window, and together they reach radius (2^levels - 1) voxels: five
levels of radius 2 do the work of a window of 125^D offsets.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from torch import Tensor
from torch.nn import functional

from ._checks import check_map, check_same_shape
from .compose_displacement import compose_displacement, compose_displacement_reference
from .local_correlation import local_correlation, local_correlation_reference
from .warp import warp, warp_reference

Head = Callable[[Tensor], Tensor]


def vector_pyramid(
    fixed: Sequence[Tensor],
    moving: Sequence[Tensor],
    *,
    radius: int,
    units: int | Sequence[int] = 1,
    heads: Sequence[Head] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The displacement that leads from every voxel of `fixed` to its counterpart in `moving`.

    Args:
        fixed: maps (B, C_l, *S_l) of each level, 2-D or 3-D, from coarse to fine; each twice as large as the last.
        moving: the same shapes.
        radius: of the local correlation of every level, in voxels of that level.
        units: vectors at each voxel, one number or one for each level.
        heads: for each level what turns a map into the (B, units_l * d, *S_l) that is correlated; called for the fixed
            map and for the warped moving map. Without heads the maps themselves are correlated. What a head begins with
            that is linear at each voxel, as a 1x1 convolution without its bias, may as well be done to the maps before:
            fewer channels are warped then.
        scale: of the dot products, 1 / sqrt(d) if not given.

    Returns: displacement (B, D, *S) in voxels of the finest level, float32 (float64 where the maps have that):
        fixed(p) corresponds to moving(p + displacement(p)). Gradients reach the maps and the heads through every level.

    Fields are upsampled with cells aligned: a factor of exactly 2, as strided and transposed convolutions have it.

    Raises:
        TypeError: a map is not a floating tensor.
        ValueError: maps, heads or units do not fit each other, or an argument of `local_correlation` is out of range.
    """
    _check(fixed, moving, heads, units)
    return _aggregate(fixed, moving, radius, units, heads, scale, _FUSED)


def vector_pyramid_reference(
    fixed: Sequence[Tensor],
    moving: Sequence[Tensor],
    *,
    radius: int,
    units: int | Sequence[int] = 1,
    heads: Sequence[Head] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same in plain torch."""
    _check(fixed, moving, heads, units)
    return _aggregate(fixed, moving, radius, units, heads, scale, _REFERENCE)


def double_resolution(displacement: Tensor) -> Tensor:
    """The same field on a grid twice as fine: linear interpolation with aligned cells, vectors doubled."""
    mode = "trilinear" if displacement.ndim == 5 else "bilinear"
    return functional.interpolate(2 * displacement, scale_factor=2, mode=mode, align_corners=False)


def pyramid_reach(radius: int, levels: int) -> int:
    """The largest displacement component that `vector_pyramid` can express, in voxels of the finest level."""
    return radius * (2**levels - 1)


_FUSED = SimpleNamespace(warp=warp, compose=compose_displacement, correlate=local_correlation)
_REFERENCE = SimpleNamespace(
    warp=warp_reference, compose=compose_displacement_reference, correlate=local_correlation_reference
)


def _aggregate(
    fixed: Sequence[Tensor],
    moving: Sequence[Tensor],
    radius: int,
    units: int | Sequence[int],
    heads: Sequence[Head] | None,
    scale: float | None,
    operators: SimpleNamespace,
) -> Tensor:
    last = len(fixed) - 1
    total: Tensor | None = None
    for level in range(len(fixed)):
        head = (lambda maps: maps) if heads is None else heads[level]
        aligned = moving[level] if total is None else operators.warp(moving[level], total)
        count = units if isinstance(units, int) else units[level]
        vectors = operators.correlate(head(fixed[level]), head(aligned), radius=radius, units=count, scale=scale)
        if level < last:
            vectors = double_resolution(vectors)
            total = total if total is None else double_resolution(total)
        total = vectors if total is None else operators.compose(total, vectors)
    assert total is not None
    return total


def _check(
    fixed: Sequence[Tensor], moving: Sequence[Tensor], heads: Sequence[Head] | None, units: int | Sequence[int]
) -> None:
    if len(fixed) == 0:
        raise ValueError("fixed: expected the map of at least one level, got none")
    counts = {"moving": len(moving)}
    if heads is not None:
        counts["heads"] = len(heads)
    if not isinstance(units, int):
        counts["units"] = len(units)
    for name, count in counts.items():
        if count != len(fixed):
            raise ValueError(f"{name}: expected one for each of the {len(fixed)} levels of fixed, got {count}")
    for level, (one, other) in enumerate(zip(fixed, moving, strict=True)):
        check_map(f"fixed[{level}]", one)
        check_same_shape(f"moving[{level}]", other, f"fixed[{level}]", one)
        if level and list(one.shape[2:]) != [2 * size for size in fixed[level - 1].shape[2:]]:
            raise ValueError(
                f"fixed[{level}]: expected twice the size of the coarser level, "
                f"{tuple(2 * size for size in fixed[level - 1].shape[2:])}, got {tuple(one.shape[2:])}"
            )
