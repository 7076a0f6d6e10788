import math

import pytest
import torch

from voxtrast.methods.parts.feature_bank import FeatureBank


def keys(first: int, count: int) -> torch.Tensor:
    """(count, 2), each telling its number."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return torch.stack((number, -number), dim=1)


def numbers(bank: FeatureBank) -> list[float]:
    return bank.vectors[:, 0].tolist()


def test_new_keys_go_over_the_oldest_wherever_the_end_lies() -> None:
    bank = FeatureBank(5, 2)
    initial = numbers(bank)
    bank.collect(keys(10, 3))
    bank.push()
    assert numbers(bank) == [10, 11, 12, *initial[3:]]
    bank.collect(keys(20, 3))
    bank.push()
    assert numbers(bank) == [22, 11, 12, 20, 21]
    assert bank.pushed.tolist() == [6]


def test_of_more_keys_than_rows_the_last_stay() -> None:
    bank = FeatureBank(4, 2)
    bank.collect(keys(0, 11))
    bank.push()
    assert sorted(numbers(bank)) == [7, 8, 9, 10]
    assert bank.pushed.tolist() == [11]
    bank.collect(keys(11, 1))
    bank.push()
    assert sorted(numbers(bank)) == [8, 9, 10, 11]  # it went over the oldest


def test_nothing_is_collected_outside_training() -> None:
    bank = FeatureBank(4, 2)
    before = bank.vectors.clone()
    bank.eval()
    bank.collect(keys(0, 2))
    bank.train()
    bank.push()
    assert torch.equal(bank.vectors, before)
    assert bank.pushed.tolist() == [0]


def test_the_bank_stays_the_same_until_the_push() -> None:
    bank = FeatureBank(4, 2)
    before = bank.vectors.clone()
    bank.collect(keys(0, 2))
    assert torch.equal(bank.vectors, before)
    bank.push()
    bank.push()  # the keys go once
    assert bank.pushed.tolist() == [2]


def test_micro_batches_follow_each_other_and_kinds_go_one_after_the_other() -> None:
    bank = FeatureBank(8, 2)
    for first in (0, 2):
        bank.collect(keys(first, 2), keys(10 + first, 2))
    bank.push()
    assert numbers(bank) == [0, 1, 2, 3, 10, 11, 12, 13]


def test_a_checkpoint_holds_vectors_and_where_the_next_key_goes() -> None:
    bank, other = FeatureBank(5, 2), FeatureBank(5, 2)
    bank.collect(keys(0, 3))
    bank.push()
    other.load_state_dict(bank.state_dict())
    for each in (bank, other):
        each.collect(keys(3, 4))
        each.push()
    assert torch.equal(bank.vectors, other.vectors)
    assert numbers(bank) == [5, 6, 2, 3, 4]


def test_it_says_how_much_of_it_keys_are() -> None:
    bank = FeatureBank(4, 2)
    found = [bank.filled().item()]
    for _ in range(3):
        bank.collect(keys(0, 3))
        bank.push()
        found.append(bank.filled().item())
    assert found == [0, 0.75, 1, 1]


def test_keys_are_float32_without_gradients() -> None:
    bank = FeatureBank(2, 2)
    bank.collect(keys(0, 2).bfloat16().requires_grad_())
    bank.push()
    assert bank.vectors.dtype == torch.float32
    assert not bank.vectors.requires_grad


def test_the_first_vectors_are_on_the_sphere_or_uniform() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(FeatureBank(64, 12).vectors.norm(dim=1), torch.ones(64))
    uniform = FeatureBank(512, 12, "uniform").vectors
    assert 0.49 < uniform.abs().max() <= 0.5  # sqrt(3 / 12)
    assert uniform.var().item() == pytest.approx(0.25 / 3, rel=0.05)
    with pytest.raises(ValueError, match="'zeros' is not one of uniform, sphere"):
        FeatureBank(4, 2, "zeros")


def test_a_bank_that_forgets_is_as_random_as_a_new_one_and_as_reproducible_as_its_generator() -> None:
    first, second = FeatureBank(64, 8, "uniform"), FeatureBank(64, 8, "uniform")
    first.collect(torch.ones(5, 8))
    first.push()
    for bank in (first, second):
        bank.collect(torch.ones(3, 8))
        bank.forget(torch.Generator().manual_seed(3))
        bank.push()
        assert bank.pushed.item() == 0
    assert torch.equal(first.vectors, second.vectors)
    assert not (first.vectors == 1).any()
    assert first.vectors.abs().max() <= math.sqrt(3 / 8)
