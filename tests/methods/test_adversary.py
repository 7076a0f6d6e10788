import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from voxtrast.methods.parts.adversary import FORMS, Adversary, PatchCritic

Numbers = Sequence[Sequence[Tensor]]  # scores or voxels of each sample
Pair = tuple[Tensor, Tensor]  # a and b of `Scores`


class Scores(nn.Module):
    """A critic whose score of a voxel v is a v^2 + b: its gradient is 2 a v."""

    def __init__(self, a: float = 0.7, b: float = -0.2) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([a])), nn.Parameter(torch.tensor([b]))

    def forward(self, image: Tensor) -> Tensor:
        return self.a * image.square() + self.b


def mean(numbers: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for number in numbers:
        total = total + number
    return total / len(numbers)


def every(values: Numbers) -> list[Tensor]:
    return [each for sample in values for each in sample]


def critic_formula(
    form: str, real: Numbers, fake: Numbers, critic: Pair, mixing: Sequence[float], weight: float
) -> Tensor:
    """The formulas as they are written, voxel by voxel."""
    a, b = critic
    of_real = [a * v * v + b for v in every(real)]
    of_fake = [a * v * v + b for v in every(fake)]
    if form == "least_squares":
        return 0.5 * (mean([(d - 1) ** 2 for d in of_real]) + mean([d**2 for d in of_fake]))
    if form == "log":
        sigmoid = [1 / (1 + torch.exp(-d)) for d in of_real], [1 / (1 + torch.exp(-d)) for d in of_fake]
        return -mean([torch.log(s) for s in sigmoid[0]]) - mean([torch.log(1 - s) for s in sigmoid[1]])
    penalties = []
    for x, x_restored, e in zip(real, fake, mixing, strict=True):
        between = [e * v + (1 - e) * w for v, w in zip(x, x_restored, strict=True)]
        squares = [(2 * a * v / len(between)) ** 2 for v in between]
        penalties.append((1 - torch.sqrt(mean(squares) * len(squares))) ** 2)
    return -mean(of_real) + mean(of_fake) + weight * mean(penalties)


def generator_formula(form: str, fake: Numbers, a: Tensor, b: Tensor) -> Tensor:
    scores = [a * v * v + b for v in every(fake)]
    if form == "least_squares":
        return mean([(d - 1) ** 2 for d in scores])
    if form == "log":
        return -mean([torch.log(1 / (1 + torch.exp(-d))) for d in scores])
    return -mean(scores)


def images(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1 if case == "one_sample" else 3, 1, 2, 3, 2, generator=generator)
    fake = real.clone() if case == "restored_exactly" else torch.randn(real.shape, generator=generator)
    return real, fake


def voxels(image: Tensor) -> list[list[Tensor]]:
    return [[v.clone() for v in sample.flatten().double()] for sample in image]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["random", "one_sample", "restored_exactly"])
def test_the_critic_s_loss_is_the_formula(form: str, case: str) -> None:
    real, fake = images(case)
    mixing = torch.rand(len(real), generator=torch.Generator().manual_seed(1))
    adversary = Adversary(Scores(), form, gradient_penalty=3.0)
    total = torch.stack(list(adversary(real, fake, mixing).values())).sum()
    total.backward()

    a, b = (p.detach().double().requires_grad_() for p in adversary.critic.parameters())
    expected = critic_formula(form, voxels(real), voxels(fake), (a, b), mixing.tolist(), 3.0)
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    scale = max(a.grad.abs().item(), b.grad.abs().item(), 1.0)  # type: ignore[union-attr]
    for parameter, wanted in zip(adversary.critic.parameters(), (a, b), strict=True):
        assert parameter.grad.item() == pytest.approx(wanted.grad.item(), rel=1e-6, abs=1e-6 * scale)  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["random", "one_sample"])
def test_the_generator_s_loss_is_the_formula(form: str, case: str) -> None:
    _, fake = images(case)
    fake.requires_grad_()
    adversary = Adversary(Scores(), form)
    loss = adversary.generator_loss(fake)
    loss.backward()

    wide = fake.detach().double().requires_grad_()
    a, b = (p.detach().double() for p in adversary.critic.parameters())
    expected = generator_formula(form, [list(sample.flatten()) for sample in wide], a, b)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    difference = (fake.grad.double() - wide.grad).norm()  # type: ignore[union-attr,operator]
    assert difference <= 1e-6 * wide.grad.norm()  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_critic_is_frozen_in_the_generator_s_step_and_moves_in_its_own(form: str, dimensions: int) -> None:
    torch.manual_seed(0)
    adversary = Adversary(PatchCritic(dimensions, width=2), form)
    real, fake = torch.randn(2, 2, 1, *[16] * dimensions)
    fake.requires_grad_()
    adversary.generator_loss(fake).backward()
    assert fake.grad is not None
    assert fake.grad.any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in adversary.parameters())

    before = [parameter.clone() for parameter in adversary.parameters()]
    optimizer = torch.optim.Adam(adversary.parameters(), lr=2e-4, betas=(0.5, 0.999))
    torch.stack(list(adversary(real, fake.detach(), torch.rand(2)).values())).sum().backward()
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, adversary.parameters(), strict=True)]
    # The last bias moves all scores alike: Wasserstein's difference does not see it.
    assert all(moved[:-1])
    assert moved[-1] == (form != "wgan_gp")


def test_the_critic_is_thawed_also_after_an_error() -> None:
    adversary = Adversary(PatchCritic(2, width=2))
    with pytest.raises(RuntimeError):
        adversary.generator_loss(torch.zeros(1, 3, 16, 16))
    assert all(parameter.requires_grad for parameter in adversary.parameters())


def test_the_gradient_penalty_lies_between_real_and_fake() -> None:
    """The 3-D reference code takes it between an image and itself."""
    seen: list[Tensor] = []

    class Watching(Scores):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image.detach())
            return super().forward(image)

    real, fake = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
    Adversary(Watching(), "wgan_gp")(real, fake, torch.tensor([0.0, 0.25, 1.0]))
    assert [sample.unique().tolist() for sample in seen[-1]] == [[1.0], [0.75], [0.0]]


def test_without_mixing_there_is_no_gradient_penalty_and_so_an_error() -> None:
    with pytest.raises(ValueError, match="mixing"):
        Adversary(Scores(), "wgan_gp")(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("form", "good", "bad"), [("least_squares", 0.9, 0.1), ("log", 2.0, -2.0), ("wgan_gp", 3.0, 2.0)]
)
def test_accuracy_is_the_share_of_patches_told_apart(form: str, good: float, bad: float) -> None:
    real = torch.tensor([good, good, good, bad]).view(1, 1, 2, 2)
    fake = torch.tensor([bad, bad, good, good]).view(1, 1, 2, 2)

    class Plain(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return 1.0 * image

    adversary = Adversary(Plain(), form, gradient_penalty=1.0)
    losses = adversary(real, fake, torch.rand(1))
    right = {"least_squares": 5 / 8, "log": 5 / 8, "wgan_gp": 2 / 4}  # wgan_gp: equal scores are not told apart
    assert adversary.monitors["accuracy"].item() == pytest.approx(right[form])
    if form == "wgan_gp":
        penalty = losses["gradient_penalty"].item()
        assert penalty == pytest.approx((1 - 0.25 * math.sqrt(4)) ** 2)
        share = penalty / (penalty + abs(losses["real"].item()) + abs(losses["fake"].item()))
        assert adversary.monitors["gradient_penalty_share"].item() == pytest.approx(share)


def test_the_critic_is_the_published_one() -> None:
    critic = PatchCritic(2)
    assert critic(torch.zeros(1, 1, 224, 224)).shape == (1, 1, 28, 28)
    convolutions = [layer for layer in critic if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (1, 64, (3, 3), (2, 2)),
        (64, 128, (3, 3), (2, 2)),
        (128, 256, (3, 3), (2, 2)),
        (256, 512, (3, 3), (1, 1)),
        (512, 1, (3, 3), (1, 1)),
    ]
    assert convolutions[3].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert [layer.negative_slope for layer in critic if isinstance(layer, nn.LeakyReLU)] == [0.2] * 4


@pytest.mark.parametrize("size", [(8, 9), (24, 32, 24), (5, 16, 7)])
def test_patches_are_counted_as_the_critic_has_them(size: tuple[int, ...]) -> None:
    critic = PatchCritic(len(size), width=1)
    assert critic(torch.randn(1, 1, *size)).numel() == PatchCritic.patches(size) > 1


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_batch_give_the_critic_the_gradient_of_the_whole(form: str) -> None:
    torch.manual_seed(0)
    adversary = Adversary(PatchCritic(2, width=2), form).double()
    real, fake = torch.randn(2, 4, 1, 16, 16, dtype=torch.float64)
    mixing = torch.rand(4, dtype=torch.float64)

    def gradients(parts: int) -> list[Tensor]:
        adversary.zero_grad()
        for first in range(0, 4, 4 // parts):
            part = slice(first, first + 4 // parts)
            (sum(adversary(real[part], fake[part], mixing[part]).values()) / parts).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in adversary.parameters() if p.grad is not None]

    for whole, parts in itertools.zip_longest(gradients(1), gradients(4)):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
