"""Settings that cannot work together: a table, looked through before anything is started."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UserError

Values = tuple[Any, ...] | Callable[[Any], bool]
LAYERWISE = ("lamb", "deepspeed_fused_lamb", "apex_fused_lamb")  # scale each layer's step by the layer's own norm
ON_GPUS = ("deepspeed_fused_lamb", "apex_fused_adam", "apex_fused_lamb")
PARTITIONED = (1, 2, 3)


@dataclass(frozen=True)
class Combination:
    """Two settings, each by its dotted key, that must not have these values at once.

    `device` stands for where the run computes, which is known at its start.
    """

    key: str
    values: Values  # these, or whether one of them is meant
    other: str
    others: Values
    reason: str
    remedy: str


TABLE = (
    *(
        Combination(
            f"{group}.name", LAYERWISE, "deepspeed.zero_stage", PARTITIONED,
            "it needs the norm of every layer, and ZeRO cuts the layers into slices",
            f"set deepspeed.zero_stage=0, or {group}.name=adamw",
        )
        for group in ("optimizer", "adversary_optimizer")
    ),
    *(
        Combination(
            f"{group}.name", ("apex_fused_adam",), "deepspeed.zero_stage", PARTITIONED,
            "it counts its steps where ZeRO's checkpoints do not look",
            f"set deepspeed.zero_stage=0, or {group}.name=adam",
        )
        for group in ("optimizer", "adversary_optimizer")
    ),
    *(
        Combination(
            f"{group}.name", ON_GPUS, "device", ("cpu",),
            "its step is a CUDA kernel",
            f"use {group}.name={{instead}}, or a machine with a GPU",
        )
        for group in ("optimizer", "adversary_optimizer")
    ),
    Combination(
        "deepspeed.offload_optimizer", ("cpu",), "deepspeed.zero_stage", (0,),
        "the moments that are offloaded are those of ZeRO's flat partitions",
        "set deepspeed.zero_stage to 1, 2 or 3, also on one rank, or deepspeed.offload_optimizer=none",
    ),
    Combination(
        "method.adversary", ("wgan_gp",), "deepspeed.zero_stage", (2, 3),
        "its penalty needs gradients of gradients, which ZeRO above 1 gives back in parts",
        "set deepspeed.zero_stage to 0 or 1, or another method.adversary",
    ),
    Combination(
        "method.adversary", ("wgan_gp",), "train.autocast", ("float16",),
        "the gradients inside the gradient penalty are not scaled, and vanish",
        "set train.autocast=bfloat16, or another method.adversary",
    ),
    Combination(
        "schedule.batch_rule", ("linear", "sqrt"), "schedule.rule_batch", (0,),
        "the rule needs the batch that the learning rate was made for",
        "set schedule.rule_batch to it, or schedule.batch_rule=none",
    ),
    Combination(
        "backbone.compile", (True,), "backbone.checkpoint_levels", lambda levels: levels > 0,
        "the compiler decides for itself what backward computes again",
        "set one of them: backbone.checkpoint_levels=0, or backbone.compile=false",
    ),
    Combination(
        "backbone.compile", (True,), "deepspeed.zero_stage", (3,),
        "ZeRO 3 gathers the parameters of each layer as it runs, which a compiled network does not wait for",
        "set backbone.compile=false, or deepspeed.zero_stage=2",
    ),
)  # fmt: skip

INSTEAD = {"deepspeed_fused_lamb": "lamb", "apex_fused_lamb": "lamb", "apex_fused_adam": "adam"}


def check_combinations(config: Any, **place: Any) -> None:
    """Looks through the table. A setting that is not there, or not known yet, goes with everything.

    Args:
        config: the configuration, typed or OmegaConf's.
        place: device, cpu or cuda.

    Raises: UserError naming both settings, the reason and the remedy.
    """
    for each in TABLE:
        one, other = (place.get(key, _setting(config, key)) for key in (each.key, each.other))
        if one is None or other is None or not (_meant(one, each.values) and _meant(other, each.others)):
            continue
        remedy = each.remedy.format(instead=INSTEAD.get(one, "adamw"))
        raise UserError(f"{each.key}={_word(one)} with {each.other}={_word(other)}: {each.reason}; {remedy}")


def _setting(config: Any, key: str) -> Any:
    if key == "device":  # `device: auto` says nothing yet
        return None
    return functools.reduce(lambda group, name: getattr(group, name, None), key.split("."), config)


def _meant(value: Any, values: Values) -> bool:
    return values(value) if callable(values) else value in values


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
