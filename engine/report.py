"""`voxtrast report`: one HTML page about one or more runs that needs nothing but a browser."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import Config, read_config
from .downstream.table import read_lines
from .errors import UserError
from .reporting import comparison, evidence, facts, page
from .reporting.finetuning import finetuning, label_efficiency
from .reporting.page import Section
from .reporting.story import Phase, Story
from .runs import LoadedRun, build_method, load_run
from .starts import device_name
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
    "matplotlib",
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


def write_report(
    runs: Sequence[Path],
    output: Path,
    *,
    story: Story | None = None,
    results: Sequence[Path] = (),
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the page; what a run lacks is said in its place.

    Args:
        runs: folders of runs, finished or not.
        output: the HTML file, replaced as a whole where it is a report already.
        story: what to tell beyond the runs.
        results: files of the form of `finetune.jsonl`, or folders that hold one, to compare beside the runs' own.
        force: replaces whatever the output is.
        say: gets a line for each part that was left out.

    Returns: output.
    Raises: UserError where a folder holds no run, results cannot be read, or the page cannot be written.
    """
    started = time.perf_counter()
    story = story or Story()
    runs, output = [Path(run) for run in runs], Path(output)
    if not runs:
        raise UserError("report: no run given; name at least one folder that `voxtrast pretrain` wrote")
    check_output(output, force)
    configs = [read_config(run / "config.yaml") for run in runs]
    given = read_lines(results)
    names = _names(runs)
    logs = {name: evidence.read_log(run) for name, run in zip(names, runs, strict=True)}
    left_out: list[str] = []
    sections: list[Section] = []
    for name, run, config in zip(names, runs, configs, strict=True):
        group = name if len(runs) > 1 else ""
        sections += _run_sections(run, config, logs[name], story, group, left_out)
    if given:
        sections.append(_label_efficiency(given, runs, story, left_out))
    if story.exports:
        sections.append(Section("Export", [page.code("\n".join(story.exports))]))
    own = [DISPLACEMENT_CAVEAT] if any(_has_displacement(config) for config in configs) else []
    caveats = [*story.caveats, *own, *GENERAL_CAVEATS]
    sections.append(Section("What this does not show", [page.bullets(caveats)]))
    if len(runs) > 1:
        drawn = page.guarded(lambda: comparison.overlaid(logs), "comparison", left_out)
        sections.insert(0, Section("Comparison of the runs", drawn))
    by_name = {name: (config, logs[name]) for name, config in zip(names, configs, strict=True)}
    sections.insert(0, _overview(by_name, story, time.perf_counter() - started))
    text = page.render(story.title, f"About {', '.join(str(run) for run in runs)}", sections)
    write_whole(output, lambda partial: Path(partial).write_text(text, encoding="utf-8"))
    for line in left_out:
        say(f"left out: {line}")
    return output


def check_output(output: Path, force: bool) -> None:
    """Raises: UserError where the page would replace what is not a report."""
    if output.is_dir():
        raise UserError(f"--output {output}: a folder; name a file, for example {output / 'report.html'}")
    if force or not output.exists():
        return
    try:
        with open(output, "rb") as file:
            ours = page.MARK.encode() in file.read(2000)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be read ({error.strerror}); name another file") from None
    if not ours:
        raise UserError(
            f"--output {output}: exists and was not written by `voxtrast report`; name another file, or give --force "
            f"to replace it"
        )


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, and their whole paths where two have one name."""
    names = [run.resolve().name for run in runs]
    unlike = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    if len(set(unlike)) < len(unlike):
        again = next(name for name in unlike if unlike.count(name) > 1)
        raise UserError(f"report: {again} is given twice; name each run once")
    return unlike


def _has_displacement(config: Config) -> bool:
    return any(view.displacement for view in build_method(config).views.views.values())


def _overview(runs: Mapping[str, tuple[Config, comparison.Logs]], story: Story, drawing_seconds: float) -> Section:
    blocks = [page.note(story.caveats[0])] if story.caveats else []
    if story.commands:
        blocks += [page.heading("Commands"), page.code("\n".join(story.commands))]
    blocks += [page.heading("Runs"), *comparison.results(runs)]
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


def _run_sections(
    run: Path, config: Config, logs: comparison.Logs, story: Story, group: str, left_out: list[str]
) -> list[Section]:
    training, validation = logs
    loaded: list[LoadedRun] = []
    prefix = f"{group}: " if group else ""

    def load() -> list[str]:
        loaded.append(load_run(run))
        return []

    no_run = page.guarded(load, f"{prefix}trained network", left_out)
    about = loaded[0] if loaded else None

    def section(title: str, *builders: Callable[[], list[str]]) -> Section:
        parts = [page.guarded(build, f"{prefix}{title.lower()}", left_out) for build in builders]
        return Section(title, [block for part in parts for block in part], group)

    def with_pictures(name: str, *arguments: Any) -> Callable[[], list[str]]:
        def build() -> list[str]:
            from .reporting import pretraining  # needs matplotlib, which the words do without

            blocks: list[str] = getattr(pretraining, name)(*arguments)
            return blocks

        return build

    def of_network(name: str) -> Callable[[], list[str]]:
        return (lambda: no_run) if about is None else with_pictures(name, about, story)

    displacement = _has_displacement(config)
    sections = [
        section(
            "What it is", lambda: facts.what_it_is(run, config, training, about), with_pictures("warnings", training)
        ),
        section("Configuration", lambda: facts.configuration(config)),
        section("Curves", with_pictures("course", training, validation)),
        section("Speed", lambda: facts.speed(config, training), with_pictures("speed", training)),
        section("Input", of_network("inputs")),
        section("Views and displacement", of_network("matching"))
        if displacement
        else section("Views", of_network("views")),
        *([section("Restoration", of_network("restorations"))] if about and not displacement else []),
        section("Features", of_network("features")),
        section("Fine-tuning", lambda: finetuning(run, story, left_out)),
        section("Where it ran", lambda: facts.where_it_ran(run)),
    ]
    return [each for each in sections if each.blocks]  # a method that restores nothing has no such section


def _label_efficiency(given: list[dict[str, Any]], runs: Sequence[Path], story: Story, left_out: list[str]) -> Section:
    """The given results beside those of the runs."""
    lines = list(given)
    own = [run / "finetune" / "finetune.jsonl" for run in runs]

    def build() -> list[str]:
        lines.extend(line for line in read_lines([path for path in own if path.is_file()]) if line not in given)
        return label_efficiency(lines, story, left_out)

    return Section("Label efficiency", page.guarded(build, "label efficiency", left_out))


def _machine() -> list[tuple[str, str]]:
    cores = len(psutil.Process().cpu_affinity() or [])
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    memory = psutil.virtual_memory().total / 2**30
    return [
        ("processor", f"{device_name('cpu')}, {cores} cores, {memory:.0f} GiB of memory"),
        ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("packages", ", ".join(packages)),
    ]
