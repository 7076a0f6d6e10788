import itertools

import numpy as np
import pytest
import torch

from voxtrast.methods.parts import rigid


@pytest.mark.parametrize("sides", [(6, 6), (4, 6, 6)])
def test_each_sample_is_flipped_and_then_turned_by_numpy_s_rot90(sides: tuple[int, ...]) -> None:
    transforms = list(itertools.product(*[(0, 1)] * len(sides), range(4)))
    flips = torch.tensor([each[:-1] for each in transforms])
    turns = torch.tensor([each[-1] for each in transforms])
    image = torch.randn(len(transforms), 1, *sides)
    found = rigid.apply(image, flips, turns)
    for sample, result, (*flipped, turned) in zip(image, found, transforms, strict=True):
        expected = np.flip(sample[0].numpy(), [axis for axis, is_flipped in enumerate(flipped) if is_flipped])
        expected = np.rot90(expected, turned, axes=(len(sides) - 2, len(sides) - 1))
        assert np.array_equal(result[0].numpy(), expected)
    assert torch.equal(rigid.undo(found, flips, turns), image)


def test_codes_tell_all_transforms_apart_with_six_entries_in_2d_and_seven_in_3d() -> None:
    for axes in (2, 3):
        transforms = torch.tensor(list(itertools.product(*[(0, 1)] * axes, range(4))))
        codes = rigid.code(transforms[:, :-1], transforms[:, -1])
        assert codes.shape == (len(transforms), axes + 4)
        assert len(codes.unique(dim=0)) == len(transforms)
        assert (codes[:, axes:].sum(1) == 1).all()


def test_what_no_transform_touches_stays_and_unequal_sides_are_turned_by_halves_alone() -> None:
    image = torch.randn(2, 1, 4, 6)
    assert torch.equal(rigid.apply(image, None, None), image)
    flips = torch.tensor([[1, 0], [0, 1]])
    assert torch.equal(rigid.undo(rigid.apply(image, flips, None), flips, None), image)
    turns = torch.tensor([0, 2])
    assert torch.equal(rigid.apply(image, None, turns), torch.stack((image[0], image[1].rot90(2, (-2, -1)))))
    with pytest.raises(ValueError, match=r"equal last two sides, got \(4, 6\)"):
        rigid.apply(image, flips, torch.tensor([0, 1]))
