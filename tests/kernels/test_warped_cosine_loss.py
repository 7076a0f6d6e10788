import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate, assert_operator_accurate, assert_second_order_accurate, gradients
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from voxtrast.kernels import warp, warped_cosine_loss, warped_cosine_loss_reference

SIZES = [(7, 5), (2, 9), (6, 7, 5), (13, 2, 8), (21, 17, 19)]
ONE = torch.tensor(1.0)


def inside(displacement: Tensor) -> Tensor:
    """Where p + displacement(p) lies within the outermost voxels, as in the masks of pretraining: (B, 1, *S).

    Beyond them only some corners count, perhaps one, with any small weight; the length of the warped vector goes to
    zero with it while its direction stays, and the gradient of the displacement is the rounding error over that length.
    """
    sizes = displacement.shape[2:]
    points = torch.stack(torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")) + displacement
    last = torch.tensor(sizes).view(-1, *[1] * len(sizes)) - 1
    return ((points >= 0) & (points <= last)).all(1, keepdim=True)


def make(sizes: tuple[int, ...], channels: int = 5, dtype: torch.dtype = torch.float32, batch: int = 2):
    fixed, moving = (torch.randn(batch, channels, *sizes).to(dtype).requires_grad_() for _ in range(2))
    displacement = (2 * torch.randn(batch, len(sizes), *sizes)).requires_grad_()
    with torch.no_grad():
        displacement.flatten(2)[..., 0] = 0
        mask = torch.rand(batch, 1, *sizes) * inside(displacement)
    return fixed, moving, displacement, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients_match_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(sizes, dtype=dtype)
    assert_operator_accurate(warped_cosine_loss, warped_cosine_loss_reference, inputs, torch.tensor(1.7))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1)], ids=str)
def test_a_single_voxel(sizes: tuple[int, ...]) -> None:
    fixed, moving, displacement, _ = make(sizes, batch=1)
    for offset in (0.0, 0.25):  # scales the one vector, so that neither the loss nor any gradient depends on it
        inputs = fixed, moving, displacement.detach().fill_(offset).requires_grad_(), torch.ones(1, 1, *sizes)
        found = gradients(warped_cosine_loss, inputs, ONE)
        exact = gradients(warped_cosine_loss_reference, [tensor.double() for tensor in inputs], ONE.double())
        for position, (ours, expected) in enumerate(zip(found, exact, strict=True)):
            assert torch.allclose(ours.double(), expected, rtol=1e-6, atol=1e-6), position
        assert found[3].abs().max() < 1e-6


def test_beyond_the_border_values_and_most_gradients_match_float64() -> None:
    fixed, moving, displacement, mask = make((21, 17, 19))
    inputs = fixed, moving, displacement, torch.ones_like(mask)
    ours = gradients(warped_cosine_loss, inputs, ONE)
    plain = gradients(warped_cosine_loss_reference, inputs, ONE)
    exact = gradients(warped_cosine_loss_reference, [tensor.double() for tensor in inputs], ONE.double())
    for tensors in zip(ours[:3], plain[:3], exact[:3], strict=True):
        assert_as_accurate(*tensors, factor=3)
    errors = [(found[3].double() - exact[3]).abs().flatten() for found in (ours, plain)]
    for share in (0.5, 0.9, 0.99):
        assert errors[0].quantile(share) <= 3 * errors[1].quantile(share)


def test_is_the_masked_mean_of_the_cosine_with_the_warped_map() -> None:
    fixed, moving, displacement, mask = make((6, 7, 5))
    cosine = functional.cosine_similarity(fixed, warp(moving, displacement), dim=1)[:, None]
    torch.testing.assert_close(
        warped_cosine_loss(fixed, moving, displacement, mask), 1 - (mask * cosine).sum() / mask.sum()
    )


def test_equal_maps_without_displacement_have_no_loss() -> None:
    fixed, _, displacement, mask = make((6, 7, 5))
    assert abs(warped_cosine_loss(fixed, fixed, 0 * displacement, mask).item()) < 1e-6
    assert abs(warped_cosine_loss(fixed, -fixed, 0 * displacement, mask).item() - 2) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_mask_gives_zero_with_zero_gradients(dtype: torch.dtype) -> None:
    *inputs, mask = make((4, 5, 6))
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    loss, *found = gradients(warped_cosine_loss, (*inputs, mask * 0), ONE)
    assert loss.item() == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_vectors_have_cosine_zero_and_zero_gradient(dtype: torch.dtype) -> None:
    fixed, moving, displacement, mask = (tensor.detach().to(dtype) for tensor in make((4, 5, 6)))
    inputs = [(0 * fixed).requires_grad_(), moving.requires_grad_(), displacement.requires_grad_(), mask]
    for order in (inputs, [inputs[1], inputs[0], *inputs[2:]]):
        loss, *found = gradients(warped_cosine_loss, order, ONE)
        assert loss.item() == 1
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -3e38, 1e10])
def test_unusable_displacements_count_as_outside(bad: float) -> None:
    fixed, moving, displacement, mask = make((4, 5, 6))
    with torch.no_grad():
        displacement[0, 1, 2] = bad
    found = gradients(warped_cosine_loss, (fixed, moving, displacement, mask), ONE)
    with torch.no_grad():
        displacement[0, 1, 2] = 1000.0
    for ours, expected in zip(
        found, gradients(warped_cosine_loss, (fixed, moving, displacement, mask), ONE), strict=True
    ):
        assert torch.equal(ours, expected)
    assert torch.equal(found[3][0, :, 2], torch.zeros(3, 5, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_voxels_without_weight_are_not_looked_at(dtype: torch.dtype) -> None:
    fixed, moving, displacement, mask = (tensor.detach().to(dtype) for tensor in make((4, 5, 6)))
    for spoil in (False, True):
        spoiled = [torch.where(mask == 0, math.nan, tensor) if spoil else tensor for tensor in (fixed, displacement)]
        inputs = [spoiled[0].requires_grad_(), moving.requires_grad_(), spoiled[1].requires_grad_(), mask]
        found = gradients(warped_cosine_loss, inputs, ONE)
        if not spoil:
            clean = found
    assert all(torch.equal(first, second) for first, second in zip(clean, found, strict=True))


BOTH = pytest.mark.parametrize("function", [warped_cosine_loss, warped_cosine_loss_reference])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["fixed", "moving"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_bad_features_with_weight_show_in_the_loss(
    function: Callable[..., Tensor], dtype: torch.dtype, bad: float, which: str, everywhere: bool
) -> None:
    maps = {name: torch.randn(2, 3, 4, 5, 6).to(dtype) for name in ("fixed", "moving")}
    place = (slice(None),) if everywhere else (1, 2, 3, 2, 1)
    maps[which][place] = bad
    displacement, mask = 0.3 * torch.ones(2, 3, 4, 5, 6), torch.ones(2, 1, 4, 5, 6)
    assert function(**maps, displacement=displacement, mask=mask).isnan()
    if not everywhere:  # without the points that see the bad voxel there is nothing to show
        mask[1, 0, 2:, 1:, :2] = 0
        leaves = [tensor.requires_grad_() for tensor in (*maps.values(), displacement)]
        assert all(found.isfinite().all() for found in gradients(function, (*leaves, mask), ONE))


@BOTH
def test_bad_features_without_a_partner_do_not_count(function: Callable[..., Tensor]) -> None:
    fixed, moving, displacement, mask = (tensor.detach() for tensor in make((4, 5, 6)))
    assert function(fixed * math.nan, 0 * moving, displacement, mask).item() == 1
    assert function(0 * fixed, moving * math.nan, displacement, mask).item() == 1


@BOTH
def test_bad_features_that_nothing_reads_leave_no_trace(function: Callable[..., Tensor]) -> None:
    fixed, moving, displacement, mask = make((4, 5, 6))
    with torch.no_grad():
        displacement[:, 0] = displacement[:, 0].abs() + 1  # nothing reads the first slice
        mask *= inside(displacement)
    clean = gradients(function, (fixed, moving, displacement, mask), ONE)
    spoiled = moving.detach().clone()
    spoiled[:, :, 0] = math.nan
    found = gradients(function, (fixed, spoiled.requires_grad_(), displacement, mask), ONE)
    assert all(torch.equal(first, second) for first, second in zip(clean, found, strict=True))


def test_the_sum_of_the_mask_asks_for_no_gradient() -> None:
    loss, mask_sum = torch.ops.voxtrast.warped_cosine_loss(*make((4, 5)))
    assert (loss.requires_grad, mask_sum.requires_grad) == (True, False)


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_only_the_gradients_that_are_asked_for(asking: int) -> None:
    inputs = make((6, 7))
    everything = gradients(warped_cosine_loss, inputs, ONE)
    alone = [tensor.detach().requires_grad_(position == asking) for position, tensor in enumerate(inputs)]
    assert torch.equal(gradients(warped_cosine_loss, alone, ONE)[1], everything[1 + asking])


def test_mask_gets_no_gradient() -> None:
    fixed, moving, displacement, mask = make((4, 5))
    mask.requires_grad_()
    warped_cosine_loss(fixed, moving, displacement, mask).backward()
    warped_cosine_loss(fixed.double(), moving, displacement, mask).backward()
    assert mask.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    inputs = make((24, 25, 26), dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(warped_cosine_loss, inputs, ONE))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sizes", [(3, 2), (2, 2, 2)], ids=str)
def test_gradcheck_and_gradgradcheck_in_float64(sizes: tuple[int, ...]) -> None:
    fixed, moving, displacement, mask = make(sizes, channels=2, batch=1)
    inputs = [tensor.detach().double().requires_grad_() for tensor in (fixed, moving, displacement / 4 + 0.03)]
    assert gradcheck(warped_cosine_loss, (*inputs, mask))
    assert gradgradcheck(warped_cosine_loss, (*inputs, mask))


def test_double_backward_matches_float64() -> None:
    assert_second_order_accurate(warped_cosine_loss, warped_cosine_loss_reference, make((5, 6, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    *inputs, mask = make((5, 4, 3), dtype=dtype)
    torch.library.opcheck(torch.ops.voxtrast.warped_cosine_loss.default, (*inputs, mask))
    tensors = [tensor.detach().transpose(2, 4).contiguous().transpose(2, 4) for tensor in (*inputs, mask)]
    torch.library.opcheck(torch.ops.voxtrast.warped_cosine_loss.default, tensors)
    torch.library.opcheck(torch.ops.voxtrast.warped_cosine_loss.default, (*tensors, False))
    for needed in [(True, True, True), (False, True, False), (True, True, True, False)]:
        arguments = torch.tensor(1.5), *tensors, mask.sum(), *needed
        torch.library.opcheck(torch.ops.voxtrast.warped_cosine_loss_backward.default, arguments)


def test_any_layout_of_inputs() -> None:
    inputs = make((6, 7, 5))
    expected = gradients(warped_cosine_loss, inputs, ONE)
    strided = [t.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_(t.requires_grad) for t in inputs]
    found = gradients(warped_cosine_loss, strided, torch.ones(3)[::2][1])
    assert all(torch.equal(first, second) for first, second in zip(expected, found, strict=True))
    shared = inputs[0][:1].detach().expand(2, -1, -1, -1, -1)
    expanded = warped_cosine_loss(shared, *inputs[1:])
    assert torch.equal(expanded, warped_cosine_loss(shared.contiguous(), *inputs[1:]))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(warped_cosine_loss, fullgraph=True, backend="aot_eager")
    inputs = make((5, 4, 6))
    found = gradients(compiled, inputs, ONE)
    for ours, expected in zip(found, gradients(warped_cosine_loss, inputs, ONE), strict=True):
        assert torch.equal(ours, expected)


def test_on_the_cpu_the_option_of_speed_changes_nothing() -> None:
    inputs = make((5, 4, 6))
    found = gradients(lambda *tensors: warped_cosine_loss(*tensors, deterministic=False), inputs, ONE)
    for ours, expected in zip(found, gradients(warped_cosine_loss, inputs, ONE), strict=True):
        assert torch.equal(ours, expected)


def test_autocast_takes_low_precision_features_and_keeps_the_rest_in_float32() -> None:
    fixed, moving, displacement, mask = make((6, 7, 5), dtype=torch.bfloat16)
    expected = warped_cosine_loss(fixed, moving, displacement, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = warped_cosine_loss(fixed, moving, displacement, mask)
        operator, _ = torch.ops.voxtrast.warped_cosine_loss(fixed, moving, displacement, mask.bfloat16())
        mixed = warped_cosine_loss(fixed, moving.float(), displacement, mask)
    assert torch.equal(loss, expected)
    assert loss.dtype == operator.dtype == mixed.dtype == torch.float32
    assert torch.equal(operator, warped_cosine_loss(fixed, moving, displacement, mask.bfloat16()))
    loss.backward()
    assert [tensor.grad.dtype for tensor in (fixed, moving)] == [torch.bfloat16, torch.bfloat16]


def test_the_warped_map_is_not_kept_for_backward() -> None:
    fixed, moving, displacement, mask = make((6, 7, 5))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        warped_cosine_loss(fixed, moving, displacement, mask)
    inputs = {tensor.data_ptr() for tensor in (fixed, moving, displacement, mask)}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs) == 1  # the sum of the mask


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fixed": torch.zeros(1, 2, 4)}, ValueError, "fixed: expected"),
        ({"fixed": torch.zeros(1, 0, 4, 4)}, ValueError, "fixed: is empty"),
        ({"moving": torch.zeros(1, 3, 4, 4)}, ValueError, "moving: expected the shape of fixed"),
        ({"displacement": torch.zeros(1, 3, 4, 4)}, ValueError, "displacement: expected shape .*2 components"),
        ({"displacement": torch.zeros(1, 2, 4, 4).int()}, TypeError, "displacement: .*torch.int32"),
        ({"mask": torch.zeros(1, 4, 4)}, ValueError, r"mask: expected shape \(1, 1, 4, 4\)"),
        ({"mask": torch.zeros(1, 1, 4, 4, device="meta")}, ValueError, "mask: is on meta"),
        ({"mask": [1.0]}, TypeError, "mask: expected a tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(change, error: type[Exception], words: str) -> None:
    good = {
        "fixed": torch.zeros(1, 5, 4, 4),
        "moving": torch.zeros(1, 5, 4, 4),
        "displacement": torch.zeros(1, 2, 4, 4),
        "mask": torch.zeros(1, 1, 4, 4),
    }
    with pytest.raises(error, match=words):
        warped_cosine_loss(**{**good, **change})
