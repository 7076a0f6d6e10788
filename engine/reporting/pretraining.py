"""The sections of a report about one pretraining run that hold pictures."""

from collections.abc import Sequence
from typing import Any

import numpy

from ..errors import UserError
from ..runs import LoadedRun
from ..views import sheet
from . import curves, evidence, page, volumes
from .comparison import held_aside_error, title_of
from .planes import Frame, frame_of
from .slices import Tile, leaf_through
from .story import Story

Line = dict[str, Any]

INPUTS = (
    "Prepared volumes, axial, coronal and sagittal planes through the middle; lengths in mm from the corner of the "
    "volume. L R, P A, I S: left and right, back and front, bottom and top of the body. Black to white: 0.5 to 99.7 "
    "percentile of each volume."
)
DISPLACEMENT_NUMBERS = ("displacement_error", "zero_error")
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
FIELD = (
    "Length of the true and of the recovered displacement in every plane, and the distance between the two, on one "
    "scale. Black lies outside the mask. The crop lies in the body as the volume does, but for the true field."
)
RESTORATION = (
    "A view of a held-aside case as the network sees it, what it should restore, what it restores, and their "
    "difference (white: half of the range of the target, or more). Target and restoration share their grey values."
)
FEATURES = (
    "The {count} features of each voxel of unseen volumes: their three main directions of variation ({shares} of the "
    "variance) as red, green and blue. The volumes share directions and range: equal colours are equal features. "
    "Untrained: the same network before the first step, with directions and range of its own, fitted in the same way, "
    "so colours of the one say nothing about those of the other. Fine grids come from the strided upsampling of the "
    "network."
)
LEAF = "The sliders go through the slices; in browsers without scripts the middle ones are shown."
SPEED = ("samples_per_second", "data_wait", "save_seconds", "memory_mb")
COURSE = ("learning_rate", "loss_scale", "skipped")


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
        return [page.figure(picture, INPUTS + " Outlines: the labels, which pretraining never reads.", least_px=560)]
    return [page.figure(picture, INPUTS, least_px=560)]


def views(run: LoadedRun, story: Story) -> list[str]:
    """The views of the first held-aside samples, of methods without a displacement."""
    split = "validation" if run.validation_cases else "train"
    return [page.figure(page.Picture(sheet(run.config, run.method.views, 0, 2, split)), SHEET, least_px=620)]


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
        page.figure(volumes.draw_views(shown[0]), VIEWS, least_px=820),
        page.heading("True and recovered displacement"),
        *_field(shown[0]),
        page.figure(volumes.draw_displacement(shown[0]), DISPLACEMENT, least_px=680),
        page.figure(volumes.draw_arrows(shown), ARROWS, least_px=720),
        page.heading("Numbers of every validation view"),
        _numbers(pairs),
    ]


def _field(pair: evidence.MatchedPair) -> list[str]:
    """Lengths and error in all planes, with the key of their colours."""
    inside = pair.mask > 0
    longest = float(max(pair.magnitude[inside].max(initial=1.0), pair.error[inside].max(initial=0.0)))
    recovered = numpy.sqrt((pair.recovered**2).sum(axis=0))
    lengths = (("true |ψ|", pair.magnitude), ("recovered |ψ'|", recovered), ("error |ψ' − ψ|", pair.error))
    tiles = [Tile("fixed F", pair.fixed)]
    tiles += [Tile(title, volumes.coloured(length / longest, inside)) for title, length in lengths]
    spacings = set(pair.frame.spacing_mm)
    in_mm = f" ({longest * spacings.pop():.1f} mm)" if len(spacings) == 1 else ""
    browser = leaf_through(pair.case, pair.frame, tiles, centre=volumes.centre_of(pair.mask))
    key = page.colour_key("0", f"{longest:.1f} voxels{in_mm}", volumes.scale_of_colours())
    return [browser, key, page.faint(f"{FIELD} {LEAF}")]


def restorations(run: LoadedRun, story: Story) -> list[str]:
    """What the method restores of corrupted views; nothing where it restores nothing."""
    blocks: list[str] = []
    for each in evidence.restorations(run, 2):
        low, high = window = volumes.window_of(each.target)
        difference = numpy.abs(each.restored - each.target)
        error, constant = difference.mean(), numpy.abs(each.target - each.target.mean()).mean()
        tiles = [
            Tile("input", each.seen, window),
            Tile("target", each.target, window),
            Tile("restored", each.restored, window),
            Tile("difference", difference, (0.0, (high - low) / 2)),
        ]
        # A view is turned and mirrored: what is left in it is not the left of the body.
        frame = Frame(each.frame.spacing_mm, (("", ""),) * each.frame.dimensions)
        blocks += [
            page.heading(each.case),
            page.paragraph(
                f"Mean absolute difference {error:.3f}; of a constant image, the target's mean, {constant:.3f}."
            ),
            leaf_through(f"{each.case}, restoration", frame, tiles, volumes.centre_of(each.target)),
        ]
    return [*blocks, page.faint(f"{RESTORATION} {LEAF}")] if blocks else []


def _numbers(pairs: Sequence[evidence.MatchedPair]) -> str:
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
    cases = run.validation_cases[:2]
    trained = [evidence.features_of(run, case) for case in cases]
    untrained = [evidence.features_of(run, case, untrained=True) for case in cases]
    colours, shares = evidence.principal_colours(trained)
    before, _ = evidence.principal_colours(untrained)
    blocks = []
    for each, first, last in zip(trained, before, colours, strict=True):
        tiles = [Tile("image", each.image), Tile("features, untrained", first), Tile("features, trained", last)]
        blocks += [page.heading(each.name), leaf_through(each.name, each.frame, tiles)]
    words = FEATURES.format(count=len(trained[0].features), shares=", ".join(f"{share:.0%}" for share in shares))
    return [*blocks, page.faint(f"{words} {LEAF}")]


def warnings(training: Sequence[Line]) -> list[str]:
    """What the run said of itself."""
    said = [f"Step {line['step']}: {line['warning']}." for line in training if "warning" in line]
    more = [f"{len(said) - 5} more warnings are in log.jsonl."] if len(said) > 5 else []
    return [page.note(*said[:5], *more)] if said else []


def course(training: Sequence[Line], validation: Sequence[Line]) -> list[str]:
    """Losses, what else the method watches, and displacement error over the steps."""
    if not training:
        return [page.note("No step is in log.jsonl yet.")]
    known = list(dict.fromkeys(key for line in training for key in line))
    terms = [key for key in known if key.startswith("loss/")]
    losses = terms if len(terms) == 1 else ["loss", *terms]
    watched = [
        key
        for key in known
        if key.startswith(("monitor/", "adversary/"))
        and key not in (f"monitor/{name}" for name in DISPLACEMENT_NUMBERS)
    ]
    blocks = [page.heading("Losses"), page.grid(_figures(losses, training, validation))]
    if any("monitor/displacement_error" in line for line in training):
        words = "Distance of the recovered from the true displacement, beside a method that always says zero."
        picture = curves.draw_displacement_error(training, validation)
        blocks += [page.heading("Displacement error"), page.figure(picture, words, width_px=620)]
    blocks += _held_aside(validation)
    if watched:
        blocks += [page.heading("Monitors"), page.grid(_figures(watched, training, validation))]
    rates = [name for name in COURSE if name != "skipped" or any(line.get(name) for line in training)]
    blocks += [page.heading("Schedule"), page.grid(_figures(rates, training, validation))]
    window = max(1, len(training) // 20)
    steps = "Thin: each step" if len(training) <= curves.MOST_POINTS else "Pale: range of neighbouring steps"
    lines = f"{steps}; thick: mean of the last {window} steps" if window > 1 else "Lines: each step"
    staged = "; dotted: a later stage begins" if len({line.get("stage") for line in training}) > 1 else ""
    blocks.append(page.faint(f"{lines}; circles: cases held aside, always the same views{staged}."))
    if not validation:
        blocks.append(page.note("No validation yet: validation.every is 0, or no case is held aside."))
    return blocks


def speed(training: Sequence[Line]) -> list[str]:
    """The numbers of speed and memory over the steps."""
    return [page.grid(_figures(SPEED, training, []))]


def _figures(names: Sequence[str], training: Sequence[Line], validation: Sequence[Line]) -> list[str]:
    made = []
    for number, name in enumerate(names):
        picture = curves.draw_number(name, training, validation, colour=curves.COLOURS[number % 4])
        if picture is not None:
            made.append(page.figure(picture, title_of(name), alt=_said(name, training, validation)))
    return made


def _said(name: str, training: Sequence[Line], validation: Sequence[Line]) -> str:
    """A curve in words."""
    parts = []
    for kind, lines, key in (("training", training, name), ("held aside", validation, curves.held_name(name))):
        steps, values = curves.series(lines, key)
        if len(values):
            span = f"{values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
            parts.append(f"{kind} from {span}, lowest {values.min():.4g}, highest {values.max():.4g}")
    return f"{title_of(name)}: {'; '.join(parts)}"


def _held_aside(validation: Sequence[Line]) -> list[str]:
    """First, middle and last validation of a method with a displacement, as a table."""
    chosen = [validation[0], validation[len(validation) // 2], validation[-1]] if len(validation) > 2 else validation
    rows = []
    for line in chosen:
        found = held_aside_error(line)
        if found is not None:
            error, zero = found
            loss = f"{line['loss']:.3f}" if isinstance(line.get("loss"), int | float) else "–"
            rows.append((line["step"], loss, f"{error:.2f}", f"{zero:.2f}", f"{error / max(zero, 1e-9):.0%}"))
    header = ("step", "loss, held aside", "displacement error (voxels)", "predicting zero (voxels)", "share of zero's")
    return [page.table(header, rows)] if rows else []
