"""`voxtrast report`: one HTML page about one or more runs that needs nothing but a browser."""

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from .config import Config, read_config
from .errors import UserError
from .reporting import page
from .reporting.page import Section
from .reporting.story import Phase, Story
from .runs import LoadedRun, build_method, load_run
from .weights import write_whole

__all__ = ["Phase", "Story", "write_report"]

PACKAGES = (
    "voxtrast",
    "torch",
    "deepspeed",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "monai",
    "dynamic-network-architectures",
    "numpy",
    "scipy",
    "SimpleITK",
)
DISPLACEMENT_CAVEAT = (
    "The displacement error is measured on fields drawn as in training, on cases that training never saw; fields of "
    "another kind would give another number."
)
GENERAL_CAVEATS = (
    "A Dice of a few test cases and seeds is uncertain: read the interval, not the mean alone. The from-scratch arm "
    "has the budget of the pretrained one and is not trained to its plateau; pretraining's own time is on top.",
    "The colours of features show what varies most, not what is most useful.",
)


def write_report(runs: Sequence[Path], output: Path, *, story: Story | None = None) -> Path:
    """Writes the page; what a run lacks is said in its place.

    Args:
        runs: folders of runs, finished or not.
        output: the HTML file, replaced as a whole.
        story: what to tell beyond the runs.

    Returns: output.
    Raises: UserError where a folder holds no run, or the page cannot be written.
    """
    started = time.perf_counter()
    story = story or Story()
    if not runs:
        raise UserError("report: no run given; name at least one folder that `voxtrast pretrain` wrote")
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib: not installed, and the report draws with it; pip install 'voxtrast[demo]'")
    configs = [read_config(Path(run) / "config.yaml") for run in runs]
    sections: list[Section] = []
    for run, config in zip(runs, configs, strict=True):
        prefix = f"{Path(run).name}: " if len(runs) > 1 else ""
        sections += [Section(prefix + each.title, each.blocks) for each in _run_sections(Path(run), config, story)]
    if story.exports:
        sections.append(Section("Export", [page.code("\n".join(story.exports))]))
    own = [DISPLACEMENT_CAVEAT] if any(_has_displacement(config) for config in configs) else []
    sections.append(Section("What this does not show", [page.bullets([*story.caveats, *own, *GENERAL_CAVEATS])]))
    sections.insert(0, _overview(runs, configs, story, time.perf_counter() - started))
    subtitle = f"About {', '.join(str(run) for run in runs)}"
    text = page.render(story.title, subtitle, sections)
    write_whole(Path(output), lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    return Path(output)


def _has_displacement(config: Config) -> bool:
    return any(view.displacement for view in build_method(config).views.views.values())


def _overview(runs: Sequence[Path], configs: Sequence[Config], story: Story, drawing_seconds: float) -> Section:
    blocks = [page.note(story.caveats[0])] if story.caveats else []
    if story.commands:
        blocks += [page.heading("Commands"), page.code("\n".join(story.commands))]
    blocks += [page.heading("Runs"), *_results(runs, configs)]
    if story.phases:
        phases = [*story.phases, Phase("report", drawing_seconds, "this page")]
        rows = [
            (phase.name, f"{phase.seconds:.1f}", phase.outcome + (" (by an earlier call)" if phase.earlier else ""))
            for phase in phases
        ]
        rows.append(("sum", f"{sum(phase.seconds for phase in phases):.1f}", ""))
        blocks += [page.heading("Time"), page.table(("phase", "seconds", "outcome"), rows)]
    blocks += [page.heading("Machine and versions that wrote this page"), page.table(("", ""), _machine())]
    return Section("What was run", blocks)


def _results(runs: Sequence[Path], configs: Sequence[Config]) -> list[str]:
    """A line a run; the loss where no run finds a displacement."""
    from .reporting.evidence import read_log
    from .reporting.pretraining import held_aside_error

    displacement = any(_has_displacement(config) for config in configs)
    rows = []
    for run, config in zip(runs, configs, strict=True):
        training, validation = read_log(Path(run))
        errors = [found for line in validation if (found := held_aside_error(line)) is not None]
        shown = ["–", "–", "–"] if displacement else ["–", "–"]
        if displacement and errors:
            shown = [f"{errors[0][0]:.2f}", f"{errors[-1][0]:.2f}", f"{errors[-1][1]:.2f}"]
        elif validation and not displacement:
            shown = [f"{line['loss']:.4g}" for line in (validation[0], validation[-1])]
        steps = f"{training[-1]['step'] if training else 0} of {config.train.steps}"
        rows.append((Path(run).name, config.recipe, steps, *shown))
    if not displacement:
        losses = page.table(("run", "recipe", "steps", "loss, held aside, at first", "at last"), rows)
        return [losses, page.faint("Where stages change what the loss is of, the two are not of the same terms.")]
    columns = ("run", "recipe", "steps", "displacement error at first", "at last", "predicting zero")
    words = "Mean Euclidean distance in voxels, over the valid voxels of the cases held aside."
    return [page.table(columns, rows), page.faint(words)]


def _run_sections(run: Path, config: Config, story: Story) -> list[Section]:
    from .reporting import evidence, pretraining
    from .reporting.finetuning import finetuning

    training, validation = evidence.read_log(run)
    loaded: LoadedRun | None = None
    trouble = ""
    try:
        loaded = load_run(run)
    except UserError as error:
        trouble = str(error)

    def with_run(title: str, build: Callable[[LoadedRun, Story], list[str]]) -> Section:
        if loaded is None:
            return Section(title, [page.note(f"Left out: {trouble}.")])
        try:
            return Section(title, build(loaded, story))
        except UserError as error:
            return Section(title, [page.note(f"Left out: {error}.")])

    return [
        Section("Settings and speed", pretraining.settings(config, training, loaded)),
        with_run("Input", pretraining.inputs),
        with_run("Views and displacement", pretraining.matching)
        if _has_displacement(config)
        else with_run("Views", pretraining.views),
        with_run("Features", pretraining.features),
        Section("Curves", pretraining.course(training, validation)),
        Section("Fine-tuning", finetuning(run, story)),
    ]


def _machine() -> list[tuple[str, str]]:
    processor = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = f"{names[0]} ({processor})" if names else processor
    cores = len(psutil.Process().cpu_affinity() or [])
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return [
        ("processor", f"{processor}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("packages", ", ".join(packages)),
    ]
