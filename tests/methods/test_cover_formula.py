"""COVER's losses against the paper's formulas, transcribed with loops in float64, and guards of the official bugs."""

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from voxtrast.methods import BackboneConfig
from voxtrast.methods.cover import Cover, CoverConfig, CoverViews

Place = tuple[int, ...]
SIZES = {2: [8, 12], 3: [4, 8, 4]}
UNITS = [2, 1, 2]
UNIT_CHANNELS = 3


class MapsOf(nn.Module):
    """In place of a backbone: an image that holds the number i gets the i-th of the given maps."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = nn.ParameterList(maps)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        numbers = images.flatten(1)[:, 0].long()
        return [], [maps[numbers] for maps in self.maps]


def cover_of(maps: list[Tensor], **config: object) -> Cover:
    """A method whose backbone gives these maps (B, C, *S_l), coarse to fine."""
    dimensions, size = maps[0].ndim - 2, list(maps[-1].shape[2:])
    backbone = BackboneConfig(
        dimensions=dimensions, features=[each.shape[1] for each in reversed(maps)], norm="group",
        encoder_blocks=[1], decoder_blocks=[1],
    )  # fmt: skip
    torch.manual_seed(0)
    method = Cover(CoverConfig(**config), backbone, CoverViews(crop=size))  # type: ignore[arg-type]
    method.backbone = MapsOf(maps)  # type: ignore[assignment]
    return method


def batch_of(displacement: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The maps of the fixed views come first."""
    count = len(mask)
    numbers = torch.arange(2 * count, dtype=torch.float32).view(-1, *[1] * (mask.ndim - 1)).expand(-1, *mask.shape[1:])
    return {"fixed": numbers[:count], "moving": numbers[count:], "displacement": displacement, "mask": mask}


# The formulas. A field is a dict of voxel -> vector, so that every sum is written out.


def voxels(size: tuple[int, ...]) -> list[Place]:
    return list(itertools.product(*map(range, size)))


def as_map(field: dict[Place, Tensor], size: tuple[int, ...]) -> Tensor:
    return torch.stack([field[p] for p in voxels(size)], dim=1).unflatten(1, size)


def sampled(values: Tensor, point: list[Tensor]) -> Tensor:
    """values (C, *S) at a point in voxels: linear between voxel centres, zeros outside."""
    total = torch.zeros(len(values), dtype=torch.float64)
    low = [math.floor(each.item()) for each in point]
    for corner in itertools.product((0, 1), repeat=len(point)):
        place = tuple(x + side for x, side in zip(low, corner, strict=True))
        if all(0 <= each < n for each, n in zip(place, values.shape[1:], strict=True)):
            weight = torch.ones((), dtype=torch.float64)
            for x, whole, side in zip(point, low, corner, strict=True):
                weight = weight * ((x - whole) if side else (1 - (x - whole)))
            total = total + weight * values[(slice(None), *place)]
    return total


def warped(values: Tensor, field: Tensor) -> Tensor:
    """W(f, psi)(p) = f(p + psi(p))."""
    size = tuple(values.shape[1:])
    found = {p: sampled(values, [x + field[(a, *p)] for a, x in enumerate(p)]) for p in voxels(size)}
    return as_map(found, size)


def up2(field: Tensor) -> Tensor:
    """On a grid twice as fine, cells aligned: voxel i of the fine grid lies at (i + 1/2) / 2 - 1/2, held at the rim."""
    coarse = field.shape[1:]
    fine = tuple(2 * n for n in coarse)
    found = {}
    for p in voxels(fine):
        point = [min(max((i + 0.5) / 2 - 0.5, 0.0), n - 1.0) for i, n in zip(p, coarse, strict=True)]
        found[p] = sampled(field, [torch.tensor(x, dtype=torch.float64) for x in point])
    return as_map(found, fine)


@dataclass
class Head:
    """A 1x1 convolution, then a group norm of one group."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def __call__(self, maps: Tensor) -> Tensor:
        hidden = torch.einsum("oc,c...->o...", self.weight, maps) + self.bias.view(-1, *[1] * (maps.ndim - 1))
        centred = hidden - hidden.mean()
        normed = centred / torch.sqrt(centred.square().mean() + 1e-5)
        return normed * self.scale.view(-1, *[1] * (maps.ndim - 1)) + self.shift.view(-1, *[1] * (maps.ndim - 1))


def vectors(q: Tensor, k: Tensor, units: int, radius: int) -> Tensor:
    """u_i = 1/J sum_j sum_delta p_{i,j,delta} delta."""
    size, width = tuple(q.shape[1:]), len(q) // units
    found = {}
    for p in voxels(size):
        total = torch.zeros(len(size), dtype=torch.float64)
        for j in range(units):
            own = slice(j * width, (j + 1) * width)
            deltas, scores = [], []
            for delta in itertools.product(range(-radius, radius + 1), repeat=len(size)):
                there = tuple(x + d for x, d in zip(p, delta, strict=True))
                if all(0 <= x < n for x, n in zip(there, size, strict=True)):
                    deltas.append(delta)
                    scores.append((q[(own, *p)] * k[(own, *there)]).sum() / math.sqrt(width))
            exponentials = torch.exp(torch.stack(scores))
            total = total + exponentials @ torch.tensor(deltas, dtype=torch.float64) / exponentials.sum()
        found[p] = total / units
    return as_map(found, size)


def pyramid(fixed: list[Tensor], moving: list[Tensor], heads: list[Head], radius: int) -> Tensor:
    phi: Tensor | None = None
    last = len(fixed) - 1
    for level, (f, m, head) in enumerate(zip(fixed, moving, heads, strict=True)):
        u = vectors(head(f), head(m if phi is None else warped(m, phi)), UNITS[level], radius)
        w = u if level == last else up2(2 * u)
        if phi is not None and level < last:
            phi = up2(2 * phi)
        phi = w if phi is None else warped(phi, w) + w
    assert phi is not None
    return phi


def formula(
    maps: list[Tensor], heads: list[Head], displacement: Tensor, mask: Tensor, radius: int
) -> tuple[Tensor, Tensor]:
    """L_vec and L_con."""
    count = len(mask)
    distances, agreements = [], []
    for sample in range(count):
        fixed, moving = ([each[sample + shift] for each in maps] for shift in (0, count))
        predicted = pyramid(fixed, moving, heads, radius)
        psi, there = displacement[sample], warped(moving[-1], displacement[sample])
        for p in voxels(tuple(psi.shape[1:])):
            if mask[(sample, 0, *p)]:
                distances.append(sum((predicted[(a, *p)] - psi[(a, *p)]).abs() for a in range(len(psi))))
                one, other = fixed[-1][(slice(None), *p)], there[(slice(None), *p)]
                agreements.append((one * other).sum() / torch.sqrt((one * one).sum() * (other * other).sum()))
    valid = mask.sum()
    return torch.stack(distances).sum() / valid, 1 - torch.stack(agreements).sum() / valid  # type: ignore[arg-type]


def case(dimensions: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Maps of two samples, a field of a voxel and more, and eps, with other voxels left out as outside the volume."""
    size, generator = SIZES[dimensions], torch.Generator().manual_seed(1)
    maps = [
        torch.randn(4, channels, *(n // stride for n in size), generator=generator)
        for channels, stride in ((4, 4), (3, 2), (2, 1))
    ]
    displacement = 0.3 + 1.2 * torch.randn(2, dimensions, *size, generator=generator)
    point = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")) + displacement
    limit = torch.tensor(size).view(-1, *[1] * dimensions) - 1
    inside = ((point >= 0) & (point <= limit)).all(1, keepdim=True)
    mask = (inside & (torch.rand(inside.shape, generator=generator) > 0.2)).float()
    assert 0.1 < mask.mean() < 0.7
    return maps, displacement, mask


@pytest.mark.parametrize(("dimensions", "radius"), [(2, 1), (2, 2), (2, 3), (3, 1)])
def test_both_losses_and_their_gradients_are_the_formulas(dimensions: int, radius: int) -> None:
    maps, displacement, mask = case(dimensions)
    method = cover_of(maps, radius=radius, units=UNITS, unit_channels=UNIT_CHANNELS)
    for head in method.heads:
        nn.init.normal_(head.norm.weight, 0.5, 0.2)  # type: ignore[union-attr, arg-type]
        nn.init.normal_(head.norm.bias, 0.0, 0.2)  # type: ignore[union-attr, arg-type]
    narrow = dict(method.named_parameters())
    losses = method(batch_of(displacement, mask), 0)
    wide_method = copy.deepcopy(method).double()
    wide = dict(wide_method.named_parameters())
    wide_losses = wide_method({name: each.double() for name, each in batch_of(displacement, mask).items()}, 0)

    leaves = {name: p.detach().double().requires_grad_() for name, p in narrow.items()}
    heads = [
        Head(leaves[f"projections.{level}.weight"],
             *(leaves[f"heads.{level}.{name}"] for name in ("bias", "norm.weight", "norm.bias")))
        for level in range(3)
    ]  # fmt: skip
    double_maps = [leaves[f"backbone.maps.{level}"] for level in range(3)]
    expected = formula(double_maps, heads, displacement.double(), mask, radius)
    for name, wanted in zip(("vector", "consistency"), expected, strict=True):
        assert losses[name].item() == pytest.approx(wanted.item(), rel=1e-6), name
        assert wide_losses[name].item() == pytest.approx(wanted.item(), rel=1e-12), name
        correct = gradients(wanted, leaves)
        whole = math.sqrt(sum(each.square().sum().item() for each in correct.values()))
        found, wide_found = gradients(losses[name], narrow), gradients(wide_losses[name], wide)
        assert set(found) == set(wide_found) == set(correct)
        for leaf, each in correct.items():
            assert (found[leaf].double() - each).norm() <= 1e-6 * whole, f"{name}: {leaf}"
            assert (wide_found[leaf] - each).norm() <= 1e-10 * each.norm(), f"{name}: {leaf}"


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("radius", [1, 3])
def test_the_recipes_radius_is_the_window_of_the_search(radius: int) -> None:
    """Official bug: the radius given is not passed on, and the window is always 2."""

    def found(shift: int) -> Tensor:
        """In the middle, where the coarse maps of `moving` are those of `fixed`, `shift` voxels on."""
        codes = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
        codes = nn.functional.normalize(codes, dim=1)
        maps = [torch.cat((codes, codes.roll((shift, shift), (2, 3)))), torch.zeros(2, 16, 24, 24)]
        method = cover_of(maps, radius=radius, units=[1, 1], unit_channels=16)
        with torch.no_grad():
            method.projections[0].weight.copy_(torch.eye(16))  # type: ignore[operator, union-attr]
            method.heads[0].bias.zero_()  # type: ignore[operator, union-attr]
            method.heads[0].norm.weight.fill_(10.0)  # type: ignore[operator, union-attr]
            empty = torch.zeros(1, 1, 24, 24)
            return method.inspect(batch_of(empty, empty))["displacement"][..., 10:14, 10:14]

    middle = found(radius)
    torch.testing.assert_close(middle, torch.full_like(middle, 2.0 * radius), rtol=0, atol=0.01)
    beyond = found(radius + 1)
    assert ((beyond - 2 * (radius + 1)).abs().amax(1) > 0.5).all()


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_field_of_zeros_is_the_identity_and_one_of_whole_voxels_reads_whole_voxels(dimensions: int) -> None:
    """Official bug: two grid conventions, so that a field of zeros moves by up to half a voxel."""
    size, axes = SIZES[dimensions], tuple(range(2, dimensions + 2))
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.randn(2, 4, *(n // stride for n in size), generator=generator) for stride in (4, 2)]
    moving = torch.randn(1, 5, *size, generator=generator)
    for shift in ([0] * dimensions, [1, -2, 1][:dimensions]):
        field = torch.tensor(shift, dtype=torch.float32).view(1, -1, *[1] * dimensions).expand(1, -1, *size)
        fixed = moving.roll([-each for each in shift], axes)  # fixed(p) = moving(p + shift)
        mask = torch.zeros(1, 1, *size)
        mask[(..., *(slice(max(0, -each), n - max(0, each)) for each, n in zip(shift, size, strict=True)))] = 1
        method = cover_of([*coarse, torch.cat((fixed, moving))], units=[1, 1, 1])
        assert method(batch_of(field, mask), 0)["consistency"].item() == pytest.approx(0, abs=1e-6)
