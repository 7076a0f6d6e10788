"""An adversary for restored images: a critic of patches and what it and the generator minimise.

    least_squares   critic  1/2 E (D(x) - 1)^2 + 1/2 E D(x')^2          generator  E (D(x') - 1)^2
    log             critic  -E log s(D(x)) - E log(1 - s(D(x')))        generator  -E log s(D(x'))
    wgan_gp         critic  -E D(x) + E D(x') + w E (1 - |grad D(x^)|)^2    generator  -E D(x')

x is an image, x' its restoration, s the sigmoid, E a mean over samples and patches; x^ = e x + (1 - e) x' lies between
the two, e ~ U(0, 1) for each sample, and its D is the mean over the patches.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMS = ("least_squares", "log", "wgan_gp")
_DIVIDED_BY = 8  # strides of the critic


class PatchCritic(nn.Sequential):
    """Four convolutions and one to a score for each patch: (B, 1, *S) -> (B, 1, *S / 8).

    Args:
        dimensions: 2 or 3.
        width: channels of the first convolution; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, dimensions: int, width: int = 64) -> None:
        convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
        norm = nn.InstanceNorm3d if dimensions == 3 else nn.InstanceNorm2d
        layers: list[nn.Module] = [convolution(1, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor, stride in ((1, 2), (2, 2), (4, 1)):
            # No bias: the norm would take it away again.
            layers += [
                convolution(factor * width, 2 * factor * width, 3, stride=stride, padding=1, bias=False),
                norm(2 * factor * width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, convolution(8 * width, 1, 3, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @staticmethod
    def patches(size: tuple[int, ...]) -> int:
        """How many patches an image of this size has; its instance norms need two."""
        count = 1
        for side in size:
            count *= -(-side // _DIVIDED_BY)
        return count


class Adversary(nn.Module):
    """A critic with the losses of one form. The whole of its own step's loss is in `forward`.

    Args:
        critic: images (B, 1, *S) to scores (B, 1, *).
        form: one of `FORMS`.
        gradient_penalty: w.
    """

    def __init__(self, critic: nn.Module, form: str = "least_squares", gradient_penalty: float = 100.0) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form: {form!r} is not one of {', '.join(FORMS)}")
        self.critic = critic
        self.form = form
        self.gradient_penalty = gradient_penalty
        self.monitors: dict[str, Tensor] = {}

    def forward(self, real: Tensor, fake: Tensor, mixing: Tensor | None = None) -> dict[str, Tensor]:
        """What the critic minimises, in named terms.

        Args:
            real: (B, 1, *S).
            fake: (B, 1, *S), without gradients.
            mixing: (B,) e of each sample; needed by wgan_gp.
        """
        of_real, of_fake = self._scores(torch.cat((real, fake))).chunk(2)
        if self.form == "least_squares":
            losses = {"real": 0.5 * (of_real - 1).square().mean(), "fake": 0.5 * of_fake.square().mean()}
        elif self.form == "log":
            losses = {"real": functional.softplus(-of_real).mean(), "fake": functional.softplus(of_fake).mean()}
        else:
            if mixing is None:
                raise ValueError("mixing: wgan_gp needs one number a sample, from 0 to 1")
            losses = {"real": -of_real.mean(), "fake": of_fake.mean()}
            losses["gradient_penalty"] = self.gradient_penalty * self._penalty(real, fake, mixing)
        self._monitor(of_real.detach(), of_fake.detach(), losses)
        return losses

    def generator_loss(self, fake: Tensor) -> Tensor:
        """What whoever made `fake` minimises; the gradient flows to it alone, the critic is frozen meanwhile."""
        with frozen(self.critic):
            scores = self._scores(fake)
        if self.form == "least_squares":
            return (scores - 1).square().mean()
        if self.form == "log":
            return functional.softplus(-scores).mean()
        return -scores.mean()

    def _scores(self, image: Tensor) -> Tensor:
        """float32 at least."""
        scores: Tensor = self.critic(image)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def _penalty(self, real: Tensor, fake: Tensor, mixing: Tensor) -> Tensor:
        share = mixing.to(real).view(-1, *[1] * (real.ndim - 1))
        with torch.enable_grad():
            between = (share * real + (1 - share) * fake).detach().requires_grad_()
            total = self._scores(between).flatten(1).mean(1).sum()
            (gradient,) = torch.autograd.grad(total, between, create_graph=True)
        return (1 - gradient.flatten(1).norm(dim=1)).square().mean()

    @torch.no_grad()
    def _monitor(self, of_real: Tensor, of_fake: Tensor, losses: dict[str, Tensor]) -> None:
        if self.form == "wgan_gp":  # its scores have no middle: two patches of one place are compared
            right = (of_real > of_fake).double().mean()
            sizes = {name: loss.detach().abs().double() for name, loss in losses.items()}
            share = sizes["gradient_penalty"] / sum(sizes.values()).clamp(min=1e-12)  # type: ignore[union-attr]
            self.monitors = {"accuracy": right, "gradient_penalty_share": share}
        else:
            middle = 0.5 if self.form == "least_squares" else 0.0
            self.monitors = {
                "accuracy": 0.5 * ((of_real > middle).double().mean() + (of_fake < middle).double().mean())
            }


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A module whose parameters take no part in the gradients of what is computed meanwhile."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
