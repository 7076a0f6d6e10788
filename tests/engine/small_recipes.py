"""Small forms of three recipes whose runs are compared: over ranks, stages of ZeRO, nodes."""

from pathlib import Path

import torch
from run_results import lines_of, state_of
from torch import Tensor

from voxtrast.engine.checkpoint import State
from voxtrast.engine.config import read_config
from voxtrast.engine.runs import build_method

# DeepSpeed keeps small parameters whole on every rank under ZeRO 3: in a test these are all of them.
CUT = "deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0"
STAGE = {stage: (f"deepspeed.zero_stage={stage}", *((CUT,) if stage == 3 else ())) for stage in range(4)}

COMMON = ("train.steps=10", "train.global_batch=4", "train.threads=1", "loader.threads=1", "validation.every=0",
          "validation.fraction=0.34", "schedule.warmup_steps=0", "schedule.name=constant", "device=cpu",
          "checkpoint.every=100", "backbone.norm=instance")  # fmt: skip
METHOD = {
    "jcl": ("jcl-tiny", "backbone.features=[8,16,16]", "backbone.encoder_blocks=[1]", "backbone.decoder_blocks=[1]",
            "method.channels=16", "views.crop=[8,16,16]"),
    "cover": ("cover-tiny", "backbone.features=[8,16,16]", "backbone.encoder_blocks=[1]", "backbone.decoder_blocks=[1]",
              "method.units=[2,1,1]", "method.radius=1", "views.crop=[16,16,16]", "views.affine.translation_voxels=1",
              "views.affine.rotation_degrees=5", "method.max_unreachable=1"),
    "dira": ("dira-tiny", "backbone.features=[8,16,16]", "backbone.encoder_blocks=[1]", "backbone.decoder_blocks=[1]",
             "method.hidden=16", "method.outputs=8", "method.bank=24", "method.critic_width=4",
             "views.crop=[16,16,16]"),
}  # fmt: skip
# JCL's first steps without clipping are so wide that the rounding of a sum decides where they lead.
OPTIMIZER = {
    "sgd": ("optimizer.name=sgd", "optimizer.learning_rate=0.005", "optimizer.gradient_clip=1",
            "adversary_optimizer.name=sgd", "adversary_optimizer.learning_rate=0.005"),
    "adamw": ("optimizer.name=adamw", "optimizer.learning_rate=0.001"),
    # Gradients that are rounding alone stay below it.
    "eps": ("optimizer.name=adamw", "optimizer.learning_rate=0.001", "optimizer.eps=1e-4",
            "adversary_optimizer.eps=1e-4"),
}  # fmt: skip


def apart(one: Tensor, other: Tensor) -> float:
    """|a - b| / |b|; windows that are not full yet hold nan."""
    one, other = one.double().nan_to_num(9.9), other.double().nan_to_num(9.9)
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def differences(run: Path, reference: Path) -> tuple[float, float, float, float, str]:
    pairs = zip(lines_of(run), lines_of(reference), strict=True)
    losses = max(abs(one["loss"] - other["loss"]) / abs(other["loss"]) for one, other in pairs)
    steps = len(lines_of(run))
    first, second = (parameters_of(state_of(each, steps), reference) for each in (run, reference))
    start = parameters_of(None, reference)
    furthest = max((apart(tensor, second[name]), name) for name, tensor in first.items())
    distance, length, way = (
        torch.stack([each.double().norm() for each in tensors]).norm().item()
        for tensors in (
            [first[name] - second[name] for name in start],
            [second[name] for name in start],
            [second[name] - start[name] for name in start],
        )
    )
    return losses, distance / length, distance / way, *furthest


def parameters_of(state: State | None, run: Path) -> dict[str, Tensor]:
    """Of the method and its adversary, in a state or as they began."""
    method = build_method(read_config(run / "config.yaml"))
    modules = {"": method} | ({"adversary.": method.adversary} if method.adversary is not None else {})
    found = {}
    for prefix, module in modules.items():
        tensors = dict(module.named_parameters())
        if state is not None:
            tensors = {name: (state.adversary if prefix else state.model)[name] for name in tensors}
        found |= {prefix + name: tensor.detach() for name, tensor in tensors.items()}
    return found
