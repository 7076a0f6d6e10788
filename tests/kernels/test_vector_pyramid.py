import importlib

import pytest
import torch
from accuracy import FORWARD, assert_as_accurate, assert_operator_accurate
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

from voxtrast.kernels import pyramid_reach, vector_pyramid, vector_pyramid_reference

pyramid_module = importlib.import_module("voxtrast.kernels.vector_pyramid")  # the package's attribute is the function
double_resolution = pyramid_module.double_resolution


def maps_of(sizes: list[tuple[int, ...]], channels: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, channels, *size).to(dtype).requires_grad_() for size in sizes]


SIZES_2D = [(3, 5), (6, 10), (12, 20)]
SIZES_3D = [(2, 3, 2), (4, 6, 4), (8, 12, 8)]


def affine_field(matrix: Tensor, translation: Tensor, size: int, spacing: float) -> Tensor:
    """(1, 3, size^3) displacement, in voxels of a grid of this spacing, of one affine map about the world's origin."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * spacing
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    moved = torch.einsum("ij,jdhw->idhw", matrix, points) + translation[:, None, None, None]
    return ((moved - points) / spacing)[None]


def test_doubling_the_resolution_keeps_an_affine_field_what_it_is() -> None:
    matrix = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(3, 3, dtype=torch.float64)
    translation = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    coarse, fine = (affine_field(matrix, translation, size, 16 / size) for size in (8, 16))
    doubled = double_resolution(coarse)
    inner = (..., slice(1, -1), slice(1, -1), slice(1, -1))  # the border is extrapolated flat
    torch.testing.assert_close(doubled[inner], fine[inner], rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
def test_the_reach_is_what_the_pyramid_says_when_every_level_says_its_most(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    radius = 2

    def saturated(query: Tensor, key: Tensor, **options: object) -> Tensor:
        return torch.full((query.shape[0], 2, *query.shape[2:]), float(radius))

    monkeypatch.setattr(pyramid_module._FUSED, "correlate", saturated)
    base = 16
    maps = [torch.zeros(1, 1, base * 2**level, base * 2**level) for level in range(levels)]
    found = vector_pyramid(maps, maps, radius=radius)
    assert found[0, :, 0, 0].tolist() == [pyramid_reach(radius, levels)] * 2


@pytest.mark.parametrize(
    ("levels", "shift"), [(1, (2, -1, 0)), (2, (4, -2, 0)), (3, (4, 0, -4)), (3, (8, -4, 0)), (3, (-8, 8, 4))]
)
def test_a_shift_between_two_maps_is_recovered(levels: int, shift: tuple[int, int, int]) -> None:
    """fixed(p) = moving(p + shift), with features sharp enough that the softmax picks one offset.

    The shifts are whole voxels of the coarsest level, so that each level can say its part exactly.
    """
    torch.manual_seed(0)
    size, margin = 32, 8
    world = torch.randn(1, 8, *[size + 2 * margin] * 3)

    def pyramid(offset: tuple[int, int, int]) -> list[Tensor]:
        d, h, w = (margin + o for o in offset)
        fine = world[:, :, d : d + size, h : h + size, w : w + size]
        return [functional.avg_pool3d(fine, 2**level) if level else fine for level in reversed(range(levels))]

    def sharpen(maps: Tensor) -> Tensor:
        return 60 * functional.normalize(maps, dim=1)

    found = vector_pyramid(pyramid(shift), pyramid((0, 0, 0)), radius=2, heads=[sharpen] * levels)
    inner = found[:, :, 12:-12, 12:-12, 12:-12]
    error = (inner - torch.tensor(shift, dtype=torch.float32).view(1, 3, 1, 1, 1)).abs().max()
    assert error < 0.01


@pytest.mark.parametrize("sizes", [SIZES_2D, SIZES_3D], ids=["2-D", "3-D"])
def test_value_and_gradients_match_float64_through_all_levels(sizes: list[tuple[int, ...]]) -> None:
    inputs = [*maps_of(sizes), *maps_of(sizes)]
    levels = len(sizes)

    def through(function):
        return lambda *maps: function(maps[:levels], maps[levels:], radius=2, units=[2, 2, 1])

    gradient = torch.randn(2, len(sizes[0]), *sizes[-1])
    assert_operator_accurate(through(vector_pyramid), through(vector_pyramid_reference), inputs, gradient)


def test_heads_learn_from_every_level() -> None:
    heads = nn.ModuleList(nn.Conv2d(8, units * 4, 1) for units in (2, 2, 1))
    found = vector_pyramid(maps_of(SIZES_2D), maps_of(SIZES_2D), radius=1, units=[2, 2, 1], heads=list(heads))
    assert found.shape == (2, 2, 12, 20)
    found.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for head in heads for parameter in [head.weight])


def test_low_precision_maps_give_a_float32_field() -> None:
    fixed, moving = (maps_of(SIZES_2D, dtype=torch.bfloat16) for _ in range(2))
    found = vector_pyramid(fixed, moving, radius=1).detach()
    plain = vector_pyramid_reference(fixed, moving, radius=1).detach()
    exact = vector_pyramid_reference([m.double() for m in fixed], [m.double() for m in moving], radius=1).detach()
    assert found.dtype == torch.float32
    assert_as_accurate(found, plain, exact, factor=FORWARD)  # a warped map is rounded to 16 bits in between


def test_gradcheck_in_float64() -> None:
    inputs = [m.detach()[:1, :2].double().requires_grad_() for m in maps_of([(2, 2), (4, 4)]) * 2]
    assert gradcheck(lambda *maps: vector_pyramid(maps[:2], maps[2:], radius=1), inputs)


def test_compiles_into_one_graph() -> None:
    fixed, moving = maps_of(SIZES_2D), maps_of(SIZES_2D)
    compiled = torch.compile(vector_pyramid, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(fixed, moving, radius=1, units=2), vector_pyramid(fixed, moving, radius=1, units=2)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fixed": [], "moving": []}, "fixed: expected the map of at least one level, got none"),
        ({"moving": [torch.zeros(1, 4, 3, 3)]}, "moving: expected one for each of the 2 levels of fixed, got 1"),
        ({"heads": [nn.Identity()]}, "heads: expected one for each of the 2 levels of fixed, got 1"),
        ({"units": [1, 1, 1]}, "units: expected one for each of the 2 levels of fixed, got 3"),
        ({"units": 3}, "units: expected a divisor of the 4 channels"),
        ({"radius": 0}, "radius: expected at least 1 voxel, got 0"),
        (
            {"fixed": [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 7, 6)]}
            | {"moving": [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 7, 6)]},
            r"fixed\[1\]: expected twice the size of the coarser level, \(6, 6\), got \(7, 6\)",
        ),
        (
            {"moving": [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 6, 7)]},
            r"moving\[1\]: expected the shape of fixed\[1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, words: str) -> None:
    maps = [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 6, 6)]
    with pytest.raises(ValueError, match=words):
        vector_pyramid(**{"fixed": maps, "moving": maps, "radius": 1, **change})
