"""The sections of a report about one pretraining run."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy

from ...methods.stages import Stage
from ..config import Config
from ..data.store import Case
from ..errors import UserError
from ..runs import LoadedRun
from ..views import sheet
from . import curves, evidence, page, volumes
from .planes import frame_of
from .story import Story

Line = dict[str, Any]

INPUTS = (
    "Prepared volumes, axial, coronal and sagittal planes through the middle; lengths in mm from the corner of the "
    "volume. L R, P A, I S: left and right, back and front, bottom and top of the body. Black to white: 0.5 to 99.7 "
    "percentile of each volume."
)
DISPLACEMENT_MONITORS = ("monitor/displacement_error", "monitor/zero_error")
VIEWS = (
    "Views of one pair. Warped by the true field, M lies on F: what is left of the difference (after matching mean and "
    "deviation) is the change of appearance, not a shift. The loss counts the voxels of the mask alone: those whose "
    "p + ψ(p) lies inside the crop and the volume."
)
DISPLACEMENT = (
    "True and recovered displacement of the same pair in one axial plane, by component and length, in voxels. Dark "
    "grey lies outside the mask. Differences and errors are on the scale of the displacement itself."
)
ARROWS = (
    "Arrows from p to p + ψ(p) within the plane, true (wide, blue) and recovered (thin, yellow); M warped by the "
    "recovered field; the difference from F before and after. The changed appearance of M is in both differences."
)
SHEET = (
    "Views as the network sees them, two samples: of cases held aside where there are any. Numbered points lie in the "
    "same place of the volume."
)
FEATURES = (
    "The {count} features of each voxel of unseen volumes: their three main directions of variation ({shares} of the "
    "variance) as red, green and blue. The volumes share directions and range: equal colours are equal features. "
    "Untrained: the same network before the first step, with directions of its own. Fine grids come from the strided "
    "upsampling of the network."
)


def settings(config: Config, training: Sequence[Line], run: LoadedRun | None) -> list[str]:
    """What the run was asked to do, on what, and how fast it went."""
    optimizer, backbone, batch = config.optimizer, config.backbone, config.train.global_batch
    batches = {stage.name: stage.global_batch or batch for stage in config.stages}
    rows = [
        ("recipe, method", f"{config.recipe}, {config.method.name}"),
        ("crop", f"{_times(config.views.crop)} voxels"),
        (
            "network",
            f"{backbone.architecture}, {backbone.norm} norm, channels {', '.join(map(str, backbone.features))}",
        ),
        (
            "optimizer",
            f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {config.schedule.name} schedule, "
            f"{config.schedule.warmup_steps} warm-up steps",
        ),
        ("batch, seed", f"{batch} samples a step, seed {config.seed}"),
    ]
    if config.stages:
        rows.append(("stages", "; ".join(_stage(stage, batches[stage.name]) for stage in config.stages)))
    if run is not None:
        parameters = sum(parameter.numel() for parameter in run.method.parameters())
        rows.append(("parameters", f"{parameters / 1e6:.2f} million"))
        rows.append(
            (
                "volumes",
                f"{len(run.cases)} to train on, {len(run.validation_cases)} held aside; {_sizes(run.store.cases)}",
            )
        )
    timed = [line for line in training if line.get("samples_per_second")]
    seconds = [batches.get(line.get("stage", ""), batch) / line["samples_per_second"] for line in timed]
    if seconds:
        middle, rate = median(seconds), median(line["samples_per_second"] for line in timed)
        rows.append(
            (
                "time of the steps",
                f"{sum(seconds):.0f} s for {len(seconds)} steps, median {middle:.2f} s a step, {rate:.2f} samples/s",
            )
        )
    waits = [line["data_wait"] for line in training if "data_wait" in line]
    if waits:
        rows.append(("waiting for data", f"{sum(waits) / len(waits):.1%} of the time"))
    memory = [line["memory_mb"] for line in training if "memory_mb" in line]
    if memory:
        rows.append(("memory, at most", f"{max(memory):.0f} MB"))
    return [page.table(("", ""), rows)]


def _stage(stage: Stage, batch: int) -> str:
    terms = ", ".join(stage.terms) or "all terms"
    return f"{stage.name}: {terms}, {batch} samples a step, from {stage.start}"


def inputs(run: LoadedRun, story: Story) -> list[str]:
    """Some prepared volumes, with their labels where there are any."""
    pictures = []
    for case in [*run.cases[:3], *run.validation_cases[:2]]:
        name = case.id + ("\n(held aside)" if case in run.validation_cases else "")
        image = numpy.asarray(run.store.volume(case), dtype=numpy.float32)
        label = None if case.label_dtype is None else numpy.asarray(run.store.label(case))
        pictures.append((name, frame_of(case.affine, case.spacing_mm), image, label))
    picture = volumes.draw_cases(pictures, story.class_names)
    if any(label is not None for *_, label in pictures):
        return [page.figure(picture, INPUTS + " Outlines: the labels, which pretraining never reads.")]
    return [page.figure(picture, INPUTS)]


def views(run: LoadedRun, story: Story) -> list[str]:
    """The views of the first held-aside samples, of methods without a displacement."""
    split = "validation" if run.validation_cases else "train"
    return [page.figure(page.Picture(sheet(run.config, run.method.views, 0, 2, split)), SHEET)]


def matching(run: LoadedRun, story: Story) -> list[str]:
    """Views of held-aside cases and the displacement that the method finds between them."""
    pairs = evidence.match_pairs(run)
    shown = evidence.differing_cases(pairs, 3)
    return [
        page.paragraph(
            "One image gives two views: F is the image under a random field ψ, M is the image with another appearance. "
            "From F and M the network has to find ψ. Every picture here is of a case held aside from training, seen by "
            f"the network after step {run.step}."
        ),
        page.figure(volumes.draw_views(shown[0]), VIEWS),
        page.figure(volumes.draw_displacement(shown[0]), DISPLACEMENT),
        page.figure(volumes.draw_arrows(shown), ARROWS),
        page.heading("Numbers of every validation view"),
        _numbers(pairs),
    ]


def _numbers(pairs: Sequence[volumes.MatchedPair]) -> str:
    rows = []
    for pair in pairs:
        valid = pair.mask > 0
        if not valid.any():
            continue
        error, zero = pair.error[valid], pair.magnitude[valid]
        rows.append(
            (
                pair.case,
                f"{valid.mean():.0%}",
                f"{zero.mean():.2f}",
                f"{error.mean():.2f}",
                f"{error.mean() / max(float(zero.mean()), 1e-9):.0%}",
                f"{numpy.percentile(error, 95):.2f}",
                f"{(error < 1).mean():.0%}",
            )
        )
    return page.table(
        (
            "held-aside case",
            "valid voxels",
            "predicting zero (voxels)",
            "mean error (voxels)",
            "share of zero's",
            "95th percentile (voxels)",
            "error below 1 voxel",
        ),
        rows,
    )


def features(run: LoadedRun, story: Story) -> list[str]:
    """Voxel features of unseen volumes as colours."""
    if not run.validation_cases:
        raise UserError("no case is held aside (validation.fraction=0), so there is no unseen volume to show")
    trained = [evidence.features_of(run, case) for case in run.validation_cases[:2]]
    untrained = evidence.features_of(run, run.validation_cases[0], untrained=True)
    colours, shares = evidence.principal_colours(trained)
    [before], _ = evidence.principal_colours([untrained])
    columns = []
    for each, picture in zip(trained, colours, strict=True):
        columns += [(f"{each.name}\nimage", each.frame, each.image), (f"{each.name}\nfeatures", each.frame, picture)]
    columns.insert(1, (f"{untrained.name}\nfeatures, untrained", untrained.frame, before))
    caption = FEATURES.format(count=len(trained[0].features), shares=", ".join(f"{share:.0%}" for share in shares))
    return [page.figure(volumes.draw_columns(columns), caption)]


def course(training: Sequence[Line], validation: Sequence[Line]) -> list[str]:
    """Losses and displacement error over the steps."""
    if not training:
        return [page.note("No step is in log.jsonl yet.")]
    window = max(1, len(training) // 20)
    lines = f"Thin: each step; thick: mean of the last {window} steps" if window > 1 else "Lines: each step"
    blocks = [page.note(f"Step {line['step']}: {line['warning']}.") for line in training if "warning" in line][:5]
    blocks.append(
        page.figure(
            curves.draw_losses(training, validation),
            (f"Losses. {lines}; circles: cases held aside, always the same views."),
            1000,
        )
    )
    others = sorted({key for line in training for key in line if key.startswith(("monitor/", "adversary/"))})
    if others := [key for key in others if key not in DISPLACEMENT_MONITORS]:
        words = f"Numbers beside the losses. {lines}; circles: cases held aside."
        blocks.append(page.figure(curves.draw_numbers(others, training, validation), words, 1000))
    if any("monitor/displacement_error" in line for line in training):
        blocks.append(
            page.figure(
                curves.draw_displacement_error(training, validation),
                ("Distance of the recovered from the true displacement, beside a method that always says zero."),
                720,
            )
        )
    chosen = [validation[0], validation[len(validation) // 2], validation[-1]] if len(validation) > 2 else validation
    rows = []
    for line in chosen:
        found = held_aside_error(line)
        if found is not None:
            error, zero = found
            rows.append(
                (
                    line["step"],
                    f"{line['loss']:.3f}",
                    f"{error:.2f}",
                    f"{zero:.2f}",
                    f"{error / max(zero, 1e-9):.0%}",
                )
            )
    if rows:
        blocks.append(
            page.table(
                (
                    "step",
                    "loss, held aside",
                    "displacement error (voxels)",
                    "predicting zero (voxels)",
                    "share of zero's",
                ),
                rows,
            )
        )
    if not validation:
        blocks.append(page.note("No validation yet: validation.every is 0, or no case is held aside."))
    return blocks


def held_aside_error(line: Line) -> tuple[float, float] | None:
    """(error, error of predicting zero) in voxels, of a validation line that has them."""
    if "displacement_error" not in line:
        return None
    return line["displacement_error"], line["zero_error"]


def _sizes(cases: Sequence[Case]) -> str:
    shapes = sorted({case.shape for case in cases})
    spacings = sorted({f"{size:g}" for case in cases for size in case.spacing_mm})
    sizes = ", ".join(_times(shape) for shape in shapes)
    if len(shapes) > 3:
        low, high = (_times(bound(axis) for axis in zip(*shapes, strict=True)) for bound in (min, max))
        sizes = f"between {low} and {high}"
    return f"{sizes} voxels of {', '.join(spacings)} mm"


def _times(sides: Any) -> str:
    return " × ".join(map(str, sides))
