"""Forward mode and the transforms of torch.func, for every operator against its reference in float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor
from torch.autograd import forward_ad, gradcheck

from voxtrast import kernels


class Case(NamedTuple):
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: list[Tensor]  # float32; the fields are spread so that no point lies at a kink


def with_options(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda query, key: function(query, key, radius=1, units=2)


def with_mask(function: Callable[..., Tensor], mask: Tensor) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs, mask)


def field(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape) + 0.2 + 0.6 * torch.rand(shape)


@pytest.fixture(
    params=["warp", "compose_displacement", "vector_regression_loss", "warped_cosine_loss", "local_correlation"]
)
def case(request: pytest.FixtureRequest) -> Case:
    name = request.param
    function, reference = getattr(kernels, name), getattr(kernels, f"{name}_reference")
    maps, vectors = [torch.randn(1, 4, 3, 4) for _ in range(2)], [field(1, 2, 3, 4) for _ in range(2)]
    mask = torch.rand(1, 1, 3, 4) * (torch.rand(1, 1, 3, 4) > 0.3)
    if name == "warp":
        return Case(function, reference, [maps[0], vectors[0]])
    if name == "compose_displacement":
        return Case(function, reference, vectors)
    if name == "vector_regression_loss":
        return Case(with_mask(function, mask), with_mask(reference, mask), vectors)
    if name == "warped_cosine_loss":
        return Case(with_mask(function, mask), with_mask(reference, mask), [*maps, vectors[0]])
    return Case(with_options(function), with_options(reference), maps)


def assert_agree(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for tensors in zip(ours, plain, exact, strict=True):
        assert_as_accurate(*tensors, factor=3)
        assert tensors[0].abs().max() > 0


def gradient_by_autograd(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


def gradient_by_transform(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    everything = tuple(range(len(inputs)))
    return torch.func.grad(lambda *tensors: function(*tensors).square().sum(), everything)(*inputs)


def test_forward_mode_matches_finite_differences_in_float64(case: Case) -> None:
    inputs = [tensor.double().requires_grad_() for tensor in case.inputs]
    assert gradcheck(case.function, inputs, check_forward_ad=True, check_batched_grad=True)


def test_jvp_matches_float64(case: Case) -> None:
    tangents = [torch.randn_like(tensor) for tensor in case.inputs]
    primals, directions = tuple(case.inputs), tuple(tangents)
    exact = torch.func.jvp(case.reference, *(tuple(t.double() for t in group) for group in (primals, directions)))
    ours = torch.func.jvp(case.function, primals, directions)
    assert_agree(ours, torch.func.jvp(case.reference, primals, directions), exact)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(case.inputs, tangents, strict=True)]
        by_duals = forward_ad.unpack_dual(case.function(*duals))
    assert torch.equal(by_duals.primal, ours[0])
    assert torch.equal(by_duals.tangent, ours[1])


def test_grad_of_a_transform_matches_float64_and_autograd(case: Case) -> None:
    ours = gradient_by_transform(case.function, case.inputs)
    plain = gradient_by_autograd(case.reference, case.inputs)
    assert_agree(ours, plain, gradient_by_autograd(case.reference, [tensor.double() for tensor in case.inputs]))
    for transformed, compiled in zip(ours, gradient_by_autograd(case.function, case.inputs), strict=True):
        torch.testing.assert_close(transformed, compiled)


def test_vmap_of_grad_equals_grad_of_each(case: Case) -> None:
    batch = [torch.stack([tensor, tensor.flip(-1)]) for tensor in case.inputs]
    found = torch.func.vmap(lambda *tensors: gradient_by_transform(case.function, list(tensors)))(*batch)
    for index in range(2):
        expected = gradient_by_transform(case.reference, [tensor[index] for tensor in batch])
        for ours, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[index], alone)


def test_vmap_over_one_argument_equals_a_loop(case: Case) -> None:
    for position, tensor in enumerate(case.inputs):
        batch = torch.stack([tensor, tensor.flip(-1)])
        dimensions = tuple(0 if position == other else None for other in range(len(case.inputs)))
        arguments = [*case.inputs[:position], batch, *case.inputs[position + 1 :]]
        found = torch.func.vmap(case.function, dimensions)(*arguments)
        for index in range(2):
            arguments[position] = batch[index]
            torch.testing.assert_close(found[index], case.reference(*arguments))


def test_forward_over_reverse_matches_float64(case: Case) -> None:
    def second_order(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        directions = tuple(torch.ones_like(tensor) for tensor in inputs)
        return torch.func.jvp(lambda *t: gradient_by_transform(function, list(t)), tuple(inputs), directions)[1]

    exact = second_order(case.reference, [tensor.double() for tensor in case.inputs])
    ours, plain = (second_order(function, case.inputs) for function in (case.function, case.reference))
    for tensors in zip(ours, plain, exact, strict=True):
        assert_as_accurate(*tensors, factor=3)


def test_a_batch_of_gradients_equals_one_after_the_other(case: Case) -> None:
    leaves = [tensor.requires_grad_() for tensor in case.inputs]
    output = case.function(*leaves)
    batch = torch.randn(2, *output.shape)
    found = torch.autograd.grad(output, leaves, batch, is_grads_batched=True, retain_graph=True)
    for index in range(2):
        expected = torch.autograd.grad(output, leaves, batch[index], retain_graph=True)
        for ours, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[index], alone)


def test_transforms_compile_into_one_graph(case: Case) -> None:
    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        tangents = torch.func.jvp(case.function, inputs, inputs)[1]
        return case.function(*inputs), tangents, *gradient_by_transform(case.function, list(inputs))

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(*case.inputs), function(*case.inputs), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["warp", "compose_displacement", "vector_regression_loss", "warped_cosine_loss"])
def test_without_a_transform_torch_compile_sees_the_operator(name: str) -> None:
    called = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    fields, mask = [field(1, 2, 3, 4).requires_grad_() for _ in range(3)], torch.ones(1, 1, 3, 4)
    inputs = {"vector_regression_loss": [*fields[:2], mask], "warped_cosine_loss": [*fields, mask]}
    torch.compile(getattr(kernels, name), fullgraph=True, backend=record)(*inputs.get(name, fields[:2]))
    assert getattr(torch.ops.voxtrast, name) in called


def test_a_compiled_graph_does_not_lose_tangents(case: Case) -> None:
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.inputs), case.function(*case.inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in case.inputs]
        found, expected = (forward_ad.unpack_dual(form(*duals)).tangent for form in (compiled, case.function))
    torch.testing.assert_close(found, expected)
