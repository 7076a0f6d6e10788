"""How the tests of the kernels judge an error: against that of the plain torch form in the same precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD, BACKWARD = 2.0, 3.0  # an operator may be this many times less accurate than the plain form


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, factor: float) -> None:
    """`ours` may miss the float64 result `exact` by `factor` times what the plain low-precision form misses it by.

    The unit roundoff of the largest value is granted, for cases in which the plain form happens to be exact.
    """
    assert ours.shape == plain.shape == exact.shape
    assert ours.dtype == plain.dtype
    assert exact.dtype == torch.float64
    roundoff = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    for measure in (lambda error: error.abs().max().item(), lambda error: error.norm().item() / error.numel() ** 0.5):
        allowed = factor * measure(plain.double() - exact) + roundoff / 2
        assert measure(ours.double() - exact) <= allowed
    # No drift to one side, and no wrong direction hidden in small numbers.
    bias = (ours.double() - exact).mean().abs().item()
    assert bias <= factor * (plain.double() - exact).abs().mean().item() + roundoff / 2
    largest = exact.abs().max()
    if largest > 0:  # torch takes norms below 1e-8 for 1e-8
        ours_off, plain_off = (
            1 - torch.cosine_similarity((tensor.double() / largest).flatten(), (exact / largest).flatten(), dim=0)
            for tensor in (ours, plain)
        )
        assert ours_off < max(1e-4, factor * plain_off)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The output and its gradients for fresh leaves; inputs that are not floating or do not ask get none."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    output = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, gradient.to(output.dtype), materialize_grads=True)]


def assert_operator_accurate(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor
) -> None:
    """Value and gradients of an operator against its reference in float64, beside that in its own precision."""
    ours = gradients(function, inputs, gradient)
    plain = gradients(reference, inputs, gradient)
    exact = gradients(reference, [tensor.double() for tensor in inputs], gradient.double())
    for position, tensors in enumerate(zip(ours, plain, exact, strict=True)):
        assert_as_accurate(*tensors, factor=FORWARD if position == 0 else BACKWARD)


def assert_accurate_over_draws(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    draw: Callable[[], Sequence[Tensor]],
    gradient: Tensor,
    draws: int = 8,
) -> None:
    """The same over several draws of the inputs, taken together: of a loss, or the gradient of a temperature, there is
    one number a draw, which the plain form may happen to hit."""
    found: list[list[list[Tensor]]] = []
    for _ in range(draws):
        inputs = draw()
        wide = [tensor.double() for tensor in inputs]
        triple = (gradients(function, inputs, gradient), gradients(reference, inputs, gradient))
        found.append([*triple, gradients(reference, wide, gradient.double())])
    for position in range(len(found[0][0])):
        tensors = [torch.cat([form[position].flatten() for form in each]) for each in zip(*found, strict=True)]
        assert_as_accurate(*tensors, factor=FORWARD if position == 0 else BACKWARD)


def assert_second_order_accurate(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> None:
    """Gradients of the squared norm of the gradients, judged like those of the first order."""

    def second_order(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(function(*leaves).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), wanted)

    exact = second_order(reference, [tensor.double() for tensor in inputs])
    for tensors in zip(second_order(function, inputs), second_order(reference, inputs), exact, strict=True):
        assert_as_accurate(*tensors, factor=BACKWARD)
