"""The gradients of a whole step inside a DeepSpeed engine: scaled, looked at, dropped; for every ZeRO stage.

To be called between the last backward of a step and the step itself, when they have been summed over the ranks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def backward(engine: Any, loss: Tensor, scale: float) -> None:
    """Gradients of `scale` times the loss; float32, which the scaled loss may need."""
    loss = loss.float()
    if zero_of(engine) is None:
        engine.backward(loss * scale if scale != 1 else loss)
        return
    engine.optimizer.override_loss_scale(scale)
    engine.backward(loss)


def unscale(engine: Any, scale: float) -> None:
    """Takes the scale out of the gradients again; ZeRO does so for itself, together with clipping."""
    if zero_of(engine) is None and scale != 1:
        found = [each.grad for each in engine.module.parameters() if each.grad is not None]
        torch._foreach_mul_(found, 1 / scale)


def are_finite(engine: Any) -> Tensor:
    """1 where all gradients are that this rank holds, else 0; (), on the device, nobody waits for it."""
    found = [each for each in _held(engine) if each.numel() > 0]
    if not found:
        return torch.ones((), device=engine.device)
    # Gradients whose squares overflow are none to step by: nobody could clip them. Other norms take ten times as long.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(found)])
    return norms.isfinite().all().float().to(engine.device)


def _held(engine: Any) -> list[Tensor]:
    """Those of the whole step: summed over the ranks and, under ZeRO, of this rank's partition alone."""
    zero = zero_of(engine)
    if zero is None:
        return [each.grad for each in engine.module.parameters() if each.grad is not None]
    if engine.zero_optimization_stage() == 3:
        return [zero.grad_partitions_flat_buffer]
    if zero.cpu_offload:
        zero._wait_for_offload_copies()  # into pinned memory, under way since the backward
        return [flat.grad for flat in zero.single_partition_of_fp32_groups if flat.grad is not None]
    return [each for group in zero.averaged_gradients.values() for each in group or () if each is not None]


def drop(engine: Any) -> None:
    """Ends the step without taking it: gradients are forgotten; parameters and moments stay as they are."""
    zero = zero_of(engine)
    with contextlib.ExitStack() as refusing:
        if zero is None:
            engine.zero_grad()
            # Clipping would ask for a norm, and some optimizers count a step without gradients, too.
            refusing.enter_context(_replaced(engine, clip_fp32_gradients=lambda: None))
            refusing.enter_context(_replaced(engine.optimizer, step=lambda *_, **__: None))
        # ZeRO takes its own way out for gradients that are not finite.
        elif engine.zero_optimization_stage() == 3:
            refusing.enter_context(_replaced(zero, _get_norm_groups=lambda: [torch.tensor(-1.0, device=zero.device)]))
        else:
            refusing.enter_context(_replaced(zero, check_grad_overflow=True, has_overflow=lambda *_, **__: True))
        engine.step()


def zero_of(engine: Any) -> Any:
    """ZeRO's optimizer, or None at stage 0."""
    return engine.optimizer if engine.zero_optimization() else None


@contextlib.contextmanager
def _replaced(holder: Any, **attributes: Any) -> Iterator[None]:
    """While this lasts, the holder itself has these attributes."""
    before = {name: vars(holder)[name] for name in attributes if name in vars(holder)}
    vars(holder).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(holder).pop(name)
        vars(holder).update(before)
