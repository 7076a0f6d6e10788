"""Typed configuration: a recipe, then `key=value` words, checked against structured dataclasses."""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..methods import METHODS, BackboneConfig, recipe_names
from ..methods.stages import Stage
from .combinations import check_combinations
from .data.sampling import Sampling
from .errors import UserError
from .weights import write_whole


@dataclass
class TrainConfig:
    steps: int = 1000  # of the optimizer, over all stages
    global_batch: int = 2  # samples per step over all ranks and micro-batches
    accumulation: int = 1  # micro-batches per step on each rank
    autocast: str = "none"  # none | bfloat16 | float16 (with a dynamic loss scale)
    ema_decay: float = 0.0  # 0 switches the moving average off; with it, the average is what is exported
    threads: int = 0  # torch threads per process; 0 leaves them as they are
    max_minutes: float = 0.0  # after which the run saves and ends with exit code 75, "to be continued"; 0 for no limit
    timeout_minutes: float = 30.0  # for all ranks to come and a slow first step; 5 at most for a silent rank


@dataclass
class OptimizerConfig:
    # adamw | adam | sgd | lamb | deepspeed_fused_lamb | apex_fused_adam | apex_fused_lamb
    name: str = "adamw"
    learning_rate: float = 1e-3  # the highest of the schedule
    weight_decay: float = 1e-4  # not of biases, norms and other vectors
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of Adam and LAMB
    eps: float = 0.0  # beside Adam's and LAMB's denominator; 0 for the optimizer's own (1e-8, LAMB 1e-6)
    momentum: float = 0.9  # of sgd
    gradient_clip: float = 0.0  # global norm; 0 for none


def adversary_optimizer() -> OptimizerConfig:
    """DiRA's for its critic; its rate is constant."""
    return OptimizerConfig(name="adam", learning_rate=2e-4, weight_decay=0.0, betas=[0.5, 0.999])


@dataclass
class ScheduleConfig:
    name: str = "cosine"  # cosine | constant
    warmup_steps: int = 0  # linear, from learning_rate / warmup_steps
    final_fraction: float = 0.0  # of the learning rate, which the cosine falls to
    batch_rule: str = "none"  # none | linear | sqrt: how learning rates follow the global batch
    rule_batch: int = 0  # the global batch that they were made for


@dataclass
class ValidationConfig:
    fraction: float = 0.2  # of the cases, held aside: the ones that `finetune` tests on
    every: int = 200  # steps; 0 for never
    batches: int = 4  # of the global batch's size, always the same views


@dataclass
class CheckpointConfig:
    every: int = 500  # steps; the last step is always saved
    keep: int = 2  # of the newest
    keep_best: bool = True  # besides, the one with the lowest loss of the cases held aside


@dataclass
class GuardsConfig:
    skip_steps: int = 3  # in a row that are not finite, and so not taken, end the run
    spike_factor: float = 20.0  # median absolute deviations above the median at which a loss is warned of; 0 for never
    data_timeout_seconds: float = 600.0  # without a batch end the run; 0 for never


@dataclass
class LoaderConfig:
    threads: int = 2  # of the data pipeline, per rank
    prefetch: int = 2  # batches prepared ahead
    verify: str = "contents"  # contents: checksum of every file of the store before training | sizes
    # A volume that cannot be read: substitute: another takes its place, and a line says so | raise: the run ends
    on_error: str = "substitute"


@dataclass
class DeepSpeedConfig:
    zero_stage: int = 0  # 0 to 3: what the ranks share out: nothing, moments, gradients too, parameters too
    offload_optimizer: str = "none"  # none | cpu: where the moments lie and the optimizer runs; needs zero_stage >= 1
    extra: dict[str, Any] = field(default_factory=dict)  # merged into DeepSpeed's JSON as it is
    config_file: str | None = None  # a JSON file merged likewise, before `extra`


@dataclass
class Config:
    recipe: str = MISSING  # name of a recipe, or the path of a YAML file
    data: str = ""  # the store
    data_sha256: str = ""  # of the store's index; filled in at the start, so that a resumed run meets the same cases
    output: str = ""  # the run's folder
    seed: int = 0  # of everything random
    resume: str = "auto"  # auto: continue what the output folder holds | never: refuse a folder that holds a run
    device: str = "auto"  # auto | cpu | cuda
    method: Any = MISSING  # what is learned; see the method's own settings
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    views: Any = MISSING  # what it is learned from; likewise
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adversary_optimizer: OptimizerConfig = field(default_factory=adversary_optimizer)  # of methods that have one
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)  # of each stage
    stages: list[Stage] = field(default_factory=list)  # one after the other; none for one with the method's own terms
    sampling: Sampling = field(default_factory=Sampling)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)


# A resumed run may differ from its beginning in these alone; anything else would make it another experiment.
CHANGEABLE = (
    "data",
    "output",
    "resume",
    "device",
    "train.steps",
    "train.threads",
    "train.accumulation",
    "train.max_minutes",
    "train.timeout_minutes",
    "validation.every",
    "validation.batches",
    "backbone.checkpoint_levels",
    "backbone.channels_last",
    "backbone.compile",
    "checkpoint",
    "guards",
    "loader",
    "deepspeed",
)

OPTIMIZERS = ("adamw", "adam", "sgd", "lamb", "deepspeed_fused_lamb", "apex_fused_adam", "apex_fused_lamb")
CHOICES = {
    "train.autocast": ("none", "bfloat16", "float16"),
    "optimizer.name": OPTIMIZERS,
    "adversary_optimizer.name": OPTIMIZERS,
    "schedule.name": ("cosine", "constant"),
    "schedule.batch_rule": ("none", "linear", "sqrt"),
    "loader.verify": ("contents", "sizes"),
    "loader.on_error": ("substitute", "raise"),
    "resume": ("auto", "never"),
    "device": ("auto", "cpu", "cuda"),
    "deepspeed.zero_stage": (0, 1, 2, 3),
    "deepspeed.offload_optimizer": ("none", "cpu"),
}
POSITIVE = (
    "train.steps",
    "train.global_batch",
    "train.accumulation",
    "train.timeout_minutes",
    "optimizer.learning_rate",
    "adversary_optimizer.learning_rate",
    "loader.threads",
    "loader.prefetch",
    "sampling.crops_per_visit",
    "checkpoint.every",
    "checkpoint.keep",
    "guards.skip_steps",
    "validation.batches",
)
NOT_NEGATIVE = (
    "train.threads",
    "train.max_minutes",
    "guards.spike_factor",
    "guards.data_timeout_seconds",
    "optimizer.weight_decay",
    "optimizer.eps",
    "optimizer.gradient_clip",
    "adversary_optimizer.weight_decay",
    "adversary_optimizer.eps",
    "adversary_optimizer.gradient_clip",
    "seed",
    "schedule.warmup_steps",
    "schedule.rule_batch",
    "backbone.checkpoint_levels",
    "validation.every",
)
FRACTIONS = (
    "train.ema_decay",
    "optimizer.momentum",
    "adversary_optimizer.momentum",
    "schedule.final_fraction",
    "validation.fraction",
)
STAGE_KEYS = tuple(item.name for item in fields(Stage))


def load_config(recipe: str, words: Sequence[str] = ()) -> Config:
    """The typed configuration of one run.

    Args:
        recipe: name of a recipe of the package, or the path of a YAML file.
        words: `key=value` settings, dotted keys, later ones win; an item of a list by its number, as in
            `stages.0.learning_rate=0.1`.

    Raises: UserError for an unknown recipe, key or value, naming the nearest right one.
    """
    return _typed(_with_words(OmegaConf.merge({"recipe": recipe}, _read_recipe(recipe)), words))


def read_config(path: Path) -> Config:
    """The configuration that a run wrote into its folder."""
    try:
        return _typed(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{path}: not a run's config.yaml ({error.strerror}); give the folder of a run") from None
    except (UserError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0]}); write it again, or move the run away"
        ) from None


def write_config(config: Config, path: Path) -> None:
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def settings_of(config: Config) -> dict[str, Any]:
    """All settings by dotted key, as plain values that JSON can hold."""
    return _flatten(OmegaConf.structured(config))


def differences(old: Config, new: Config) -> list[str]:
    """Settings that a resumed run must not change, as `key: old -> new`."""
    before, after = _flatten(OmegaConf.structured(old)), _flatten(OmegaConf.structured(new))
    found = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(set(before) | set(after))
        if before.get(key) != after.get(key) and not any(key == c or key.startswith(c + ".") for c in CHANGEABLE)
    ]
    if old.stages and old.train.steps != new.train.steps:
        found.append(
            f"train.steps: {old.train.steps} -> {new.train.steps}, which would move the boundaries of the stages"
        )
    return found


def _read_recipe(recipe: str) -> Any:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"recipe {recipe}: no such file; the package has {', '.join(recipe_names())}")
        text = path.read_text(encoding="utf-8")
    elif recipe in recipe_names():
        text = (resources.files("voxtrast.methods") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(
            f"recipe {recipe!r} is unknown;{_nearest(recipe, recipe_names())} "
            f"the package has {', '.join(recipe_names())}, or give the path of a .yaml file"
        )
    try:
        return OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"recipe {recipe}: not readable as YAML: {str(error).splitlines()[0]}") from None


def _with_words(raw: Any, words: Sequence[str]) -> Any:
    """One after the other: merged at once they could not reach into the lists of the recipe."""
    for word in words:
        if "=" not in word or word.startswith(("-", "=")):
            raise UserError(f"{word!r} is not a setting; expected key=value, for example train.steps=1000")
        key, text = word.split("=", 1)
        try:
            value = OmegaConf.from_dotlist([f"value={text}"]).value
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{word!r} is not readable as key=value: {str(error).splitlines()[0]}") from None
        try:
            OmegaConf.update(raw, key, value, merge=True)
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{key}: the recipe has no such place ({str(error).splitlines()[0]})") from None
    return raw


def _typed(raw: Any) -> Config:
    name = OmegaConf.select(raw, "method.name")
    if name not in METHODS:
        raise UserError(
            f"method.name: {name!r} is unknown;{_nearest(str(name), METHODS)} "
            f"this version has {', '.join(sorted(METHODS))}"
        )
    method = METHODS[name]
    schema = OmegaConf.structured(Config)
    OmegaConf.set_struct(schema, False)
    schema.method, schema.views = OmegaConf.structured(method.Config), OmegaConf.structured(method.Views)
    schema.backbone = OmegaConf.structured(BackboneConfig)  # the class: an instance has the values of one architecture
    OmegaConf.set_struct(schema.deepspeed.extra, False)
    try:
        _refuse_unknown(set(_settings(Config)) | set(_settings(method.Config, "method."))
                        | set(_settings(method.Views, "views.")), raw)  # fmt: skip
        _refuse_unknown_in_stages(raw)
        merged = OmegaConf.merge(schema, raw)
        _check(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {first}" if error.full_key else first) from None
    assert isinstance(config, Config)
    return config


def _settings(group: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all settings of a dataclass, those of groups that are off by default among them."""
    hints = get_type_hints(group)
    for item in fields(group):
        kinds = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(kind)]
        if kinds and get_origin(hints[item.name]) is not list:
            yield from _settings(kinds[0], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def _refuse_unknown(known: set[str], raw: Any) -> None:
    groups = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    for key in _flatten(raw):
        if key in known or key.startswith(("deepspeed.extra.", "sampling.weights.", "stages.")) or key in groups:
            continue
        tail = key.rsplit(".", 1)[-1]
        same_tail = [name for name in sorted(known) if name.rsplit(".", 1)[-1] == tail]
        raise UserError(
            f"setting {key!r} is unknown;{_nearest(key, same_tail or known | groups)} "
            f"`voxtrast recipes NAME` lists all settings of a recipe"
        )


def _refuse_unknown_in_stages(raw: Any) -> None:
    stages = OmegaConf.select(raw, "stages")
    if stages is None and "stages" not in raw:
        return
    if not OmegaConf.is_list(stages) or not all(OmegaConf.is_dict(stage) for stage in stages):
        raise UserError(
            "stages: expected a list of groups; write it into a recipe's file, or whole as "
            "stages=[{name: first, terms: {TERM: 1}}, ...]"
        )
    for index, stage in enumerate(stages):
        for key in stage:
            if key not in STAGE_KEYS:
                raise UserError(
                    f"setting 'stages[{index}].{key}' is unknown;{_nearest(str(key), STAGE_KEYS)} "
                    f"a stage has {', '.join(STAGE_KEYS)}"
                )


def _check_stages(merged: Any) -> None:
    for index, stage in enumerate(merged.stages):
        for key in ("share", "global_batch", "learning_rate"):
            value = stage[key]
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"stages[{index}].{key}: expected a finite number, more than 0, got {value}")
        if not stage.start:
            raise UserError(f"stages[{index}].start: expected previous, initial, or the path of a weights file or run")
    names = [stage.name for stage in merged.stages]
    if len(set(names)) < len(names):
        raise UserError(f"stages: two have the same name, and the log tells them apart by it: {', '.join(names)}")


def _check(merged: Any) -> None:
    for group in ("method", "backbone", "views", "train", "optimizer", "adversary_optimizer", "schedule", "stages",
                  "sampling", "validation", "checkpoint", "guards", "loader", "deepspeed"):  # fmt: skip
        if OmegaConf.select(merged, group) is None:
            raise UserError(f"{group}: expected a group of settings, got null; leave it out to take the defaults")
    for key, choices in CHOICES.items():
        value = OmegaConf.select(merged, key)
        if value not in choices:
            nearest = _nearest(str(value), [str(choice) for choice in choices])
            raise UserError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))};{nearest}")
    for keys, lowest in ((POSITIVE, "more than 0"), (NOT_NEGATIVE, "0 or more")):
        for key in keys:
            value = OmegaConf.select(merged, key)
            if not (value > 0 or (value == 0 and keys is NOT_NEGATIVE)) or value == math.inf:
                raise UserError(f"{key}: expected a finite number, {lowest}, got {value}")
    for key in FRACTIONS:
        value = OmegaConf.select(merged, key)
        if not 0 <= value < 1:
            raise UserError(f"{key}: expected 0 up to less than 1, got {value}")
    if not 0 <= merged.sampling.foreground <= 1:
        raise UserError(f"sampling.foreground: expected a share from 0 to 1, got {merged.sampling.foreground}")
    for folder, weight in merged.sampling.weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"sampling.weights.{folder}: expected a finite number, more than 0, got {weight}")
    for group in ("optimizer", "adversary_optimizer"):
        betas = list(merged[group].betas)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"{group}.betas: expected two numbers from 0 up to less than 1, got {betas}")
    _check_stages(merged)
    check_combinations(merged)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys and their values; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key in node:
        missing = OmegaConf.is_missing(node, key)
        value = None if missing else node[key]
        if isinstance(value, DictConfig) and len(value):
            leaves.update(_flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return leaves


def _nearest(word: str, names: Any) -> str:
    close = difflib.get_close_matches(word, sorted(names), n=1, cutoff=0.5)
    return f" did you mean {close[0]!r}?" if close else ""
