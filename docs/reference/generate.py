"""Writes the pages of reference that follow from the code: commands, settings and recipes; and tables of results.

python docs/reference/generate.py          # where voxtrast is installed; tests say when the pages are out of date
"""

import argparse
import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from unittest import mock

import typer
from omegaconf import OmegaConf
from setting_fields import Setting, description, settings_of

from voxtrast.benchmarks.label_plan import read_plan
from voxtrast.benchmarks.label_results import of_plan, read, tables
from voxtrast.engine import cli, config
from voxtrast.methods import METHODS, BackboneConfig, recipe_names
from voxtrast.methods.stages import Stage

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS, LONG = (f"benchmarks/results/label-efficiency{name}.jsonl" for name in ("", "-long"))
LONG_PLAN = "benchmarks/label_efficiency_long.yaml"
WRITTEN = "<!-- Written by docs/reference/generate.py from the code: change that, and run it again. -->\n"
PASSED_ON = {"pretrain": "engine.pretrain", "launch": "engine.launch", "views": "engine.views"}
RANGES = (
    (config.POSITIVE, "more than 0"),
    (config.NOT_NEGATIVE, "0 or more"),
    (config.FRACTIONS, "0 up to less than 1"),
)


class _Built(Exception):
    """Carries a parser out of the function that builds it."""


def parser_of(main: Callable[[list[str]], Any]) -> argparse.ArgumentParser:
    """The argparse parser that a front door builds before it does anything."""

    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _Built(self)

    with mock.patch.multiple(argparse.ArgumentParser, parse_args=caught, parse_intermixed_args=caught):
        try:
            main([])
        except _Built as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise TypeError(f"{main}: parses no words")


def benchmarks() -> list[str]:
    """The names that `voxtrast bench` knows."""
    for node in ast.walk(ast.parse(inspect.getsource(cli.bench))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "known":
            return list(ast.literal_eval(node.value))
    raise TypeError("voxtrast.engine.cli.bench: no tuple of known benchmarks")


def front_door(name: str) -> argparse.ArgumentParser:
    """Of a command that passes its words on: "pretrain", or "bench kernels"."""
    module = PASSED_ON.get(name) or f"benchmarks.{name.removeprefix('bench ')}"
    package = importlib.import_module(f"voxtrast.{module.replace('-', '_')}")
    if not hasattr(package, "main"):
        package = importlib.import_module(f"voxtrast.{module}.__main__")
    return parser_of(package.main)


def cell(text: str) -> str:
    """Plain text as a cell of a table."""
    return " ".join(text.replace(" | ", "; ").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").split())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def cli_page() -> str:
    page = f"{WRITTEN}# Commands\n\nEvery command answers to `--help`. "
    page += "Exit code 2 is a mistake in what was asked for; one line on standard error says which.\n\n"
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__.replace("_", "-")
        if name in PASSED_ON:
            page += _argparse_section(name, front_door(name))
            continue
        words = list(words_of(command.callback))
        shown = " ".join(word.shown for word in words if not word.option)
        page += f"## {name}\n\n{inspect.getdoc(command.callback)}\n\n    voxtrast {name} {shown} [OPTIONS]\n\n"
        page += table(("word", "type", "default", "meaning"), [word.row() for word in words])
        page += "The options of each stand in [benchmarks](bench.md).\n\n" if name == "bench" else ""
    return page.replace("  [OPTIONS]", " [OPTIONS]").rstrip() + "\n"


def bench_page() -> str:
    page = f"{WRITTEN}# Benchmarks\n\nOptions of `voxtrast bench`.\n\n"
    return page + "".join(_argparse_section(f"bench {name}", front_door(f"bench {name}")) for name in benchmarks())


@dataclass(frozen=True)
class Word:
    """An argument or option of a command of typer."""

    shown: str
    kind: Any
    default: Any  # inspect.Parameter.empty where it is needed
    help: str
    option: bool

    def row(self) -> tuple[str, ...]:
        needed, flag = self.default is inspect.Parameter.empty, self.kind is bool
        silent = self.default is None or self.default is False or self.default == ""
        default = "needed" if needed else "" if silent else "`on`" if flag else f"`{self.default}`"
        kind = "flag" if flag else f"{type_name(self.kind).replace('pathlib.', '').replace(' or null', '')}"
        return (
            f"`{self.shown}`",
            kind.replace("list[Path]", "paths").replace("Path", "path").replace("str", "text"),
            default,
            cell(self.help),
        )


def words_of(callback: Callable[..., Any]) -> Iterator[Word]:
    signature = inspect.signature(callback)
    for name, annotation in get_type_hints(callback, include_extras=True).items():
        if get_origin(annotation) is not Annotated:
            continue
        kind, about = get_args(annotation)[:2]
        default, option = signature.parameters[name].default, isinstance(about, typer.models.OptionInfo)
        if option:
            # typer takes the first name for the default, as it stands there outside of Annotated
            named = [each for each in (about.default, *(about.param_decls or ())) if str(each).startswith("-")]
            own = name.replace("_", "-")
            shown = ", ".join(named or [f"--{own} / --no-{own}" if kind is bool and default is True else f"--{own}"])
        else:
            shown = about.metavar or name.upper() + ("..." if get_origin(kind) is list else "")
            shown = shown if default is inspect.Parameter.empty or about.metavar else f"[{shown}]"
        yield Word(shown, kind, default, about.help or "", option)


def _argparse_section(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [each for each in parser._actions if each.help != argparse.SUPPRESS and each.dest != "help"]
    positional = [each for each in actions if not each.option_strings]
    shown = " ".join(str(each.metavar or each.dest.upper()) + (" ..." if each.nargs else "") for each in positional)
    text = f"## {name}\n\n{cell(parser.description or '')}\n\n    voxtrast {name} [OPTIONS] {shown}\n\n"
    return text + table(("word", "default", "meaning"), [_action_row(each) for each in actions])


def _action_row(action: argparse.Action) -> tuple[str, ...]:
    word = ", ".join(action.option_strings) or str(action.metavar or action.dest.upper())
    if action.option_strings and action.nargs != 0:
        word += f" {action.metavar or (action.type.__name__.upper() if isinstance(action.type, type) else 'TEXT')}"
    default = "" if action.default in (None, False, "", [], argparse.SUPPRESS) else f"`{action.default}`"
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    return f"`{word.replace('|', '/')}`", default, cell(f"{action.help or ''}{choices}")


def configuration_page() -> str:
    page = f"""{WRITTEN}# Settings

A recipe gives some of them, `key=value` behind the recipe any. A list is written `[1,2,3]`, nothing `null`; an item of
a list is reached by its number (`stages.0.share=2`). An unknown key or a value out of range is refused before anything
is read, with the nearest right one. `voxtrast recipes NAME` prints what a recipe comes to. What a recipe leaves out has
the default below.

## Every run

"""
    plain, groups = [], []
    hints = get_type_hints(config.Config)
    for setting in settings_of(config.Config):
        kind = hints[setting.name]
        (groups if is_dataclass(kind) else plain).append((setting, kind))
    page += _settings_table([setting for setting, _ in plain], "")
    for setting, kind in groups:
        page += f"### {setting.name}\n\n{_sentence(setting.comment)}{_sentence(description(kind))}"
        default = None if kind is BackboneConfig else setting.default
        page += _settings_table(settings_of(kind, default), f"{setting.name}.")
    page += "### A stage\n\nAn item of `stages`; [what stages do](../pretrain.md#stages).\n\n"
    page += _settings_table(settings_of(Stage), "stages.N.")
    page += "## Methods\n\n`method.name` says which; `views` are then those of that method.\n\n"
    shared: dict[str, Any] = {}
    for name, method in METHODS.items():
        page += f"### {name}\n\n[What it does](../methods/{name}.md).\n\n{_sentence(description(method.Config))}"
        page += _settings_table(settings_of(method.Config), "method.")
        page += _sentence(description(method.Views)) + _settings_table(settings_of(method.Views), "views.")
        shared |= {kind.__name__: kind for kind in nested(method.Views)}
    page += "## Groups of views\n\nWhat stands under the keys of `views` above; [what each draws](../views.md).\n\n"
    for name, kind in shared.items():
        page += f"### {name}\n\n{_paragraphs(description(kind))}" + _settings_table(settings_of(kind), "")
    page += (
        "## What may change on resume\n\nA run is continued with the settings that it was started with, but for:\n\n"
    )
    return page + "".join(f"- `{key}{'.*' if key in _group_names() else ''}`\n" for key in config.CHANGEABLE)


def nested(group: type) -> Iterator[type]:
    """The dataclasses below one, outer before inner."""
    for hint in get_type_hints(group).values():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind) and isinstance(kind, type):
                yield kind
                yield from nested(kind)


def _group_names() -> set[str]:
    return {name for name, kind in get_type_hints(config.Config).items() if is_dataclass(kind)}


def _settings_table(settings: list[Setting], prefix: str) -> str:
    return table(("key", "type", "default", "meaning"), [_setting_row(each, prefix) for each in settings])


def _setting_row(setting: Setting, prefix: str) -> tuple[str, ...]:
    key, meaning = f"{prefix}{setting.name}", cell(setting.comment)
    choices = [str(choice) for choice in config.CHOICES.get(key, ())]
    if choices and not all(choice in meaning for choice in choices):
        meaning = _join(meaning, f"one of {', '.join(choices)}")
    for keys, words in RANGES:
        if key in keys and words not in meaning:
            meaning = _join(meaning, words)
    kinds = [kind for kind in (setting.kind, *get_args(setting.kind)) if is_dataclass(kind)]
    link = f"[{kinds[0].__name__}](#{kinds[0].__name__.lower()})" if kinds else f"`{type_name(setting.kind)}`"
    if kinds and get_origin(setting.kind) is list:
        link = "list of [stages](#a-stage)"
    return f"`{key}`", link, _default(setting, bool(kinds)), meaning


def type_name(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return name.replace("typing.", "").replace(" | None", " or null")


def _default(setting: Setting, nested: bool) -> str:
    if setting.default is MISSING or setting.default == "???":
        return "needed" if setting.name == "recipe" else "from the recipe"
    if not nested or not is_dataclass(setting.default):
        return f"`{_plain(setting.default)}`"
    kind, value = type(setting.default), setting.default
    usual = kind()
    other = {
        item.name: getattr(value, item.name)
        for item in fields(kind)
        if getattr(value, item.name) != getattr(usual, item.name)
    }
    return ", ".join(f"`{name}: {_plain(item)}`" for name, item in other.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if is_dataclass(value) and not isinstance(value, type):
        return "{" + ", ".join(f"{item.name}: {_plain(getattr(value, item.name))}" for item in fields(value)) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value) if not isinstance(value, str) else value or "''"


def _join(meaning: str, more: str) -> str:
    return f"{meaning}; {more}" if meaning else more


def _sentence(text: str) -> str:
    text = cell(text)
    return f"{text[0].upper()}{text[1:].rstrip('.')}.\n\n" if text else ""


def _paragraphs(text: str) -> str:
    return "".join(f"{cell(each)}\n\n" for each in text.split("\n\n") if each)


def recipes_page() -> str:
    page = f"""{WRITTEN}# Recipes

`voxtrast pretrain NAME` takes one by its name; a copy with changes is given by its path.
[Which one?](../methods/README.md) `-tiny` is small enough for a laptop and for tests, `-3d` is for CT and MR volumes,
`-2d-paper` is the published setting on slices. Sources of the numbers stand beside them.

"""
    rows, sections = [], ""
    for name in recipe_names():
        text = (resources.files("voxtrast.methods") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        given = OmegaConf.create(text)
        usual = {"backbone": BackboneConfig(), "train": config.TrainConfig(), "optimizer": config.OptimizerConfig()}
        whole: Any = OmegaConf.merge({"views": {"crop": METHODS[given.method.name].Views().crop}}, usual, given)
        crop = " x ".join(map(str, whole.views.crop))
        network = f"`{whole.backbone.architecture}`, {whole.backbone.dimensions}-D"
        optimizer = f"{whole.optimizer.name}, {whole.optimizer.learning_rate:g}"
        numbers = (crop, str(whole.train.global_batch), str(whole.train.steps), optimizer)
        rows.append((f"[`{name}`](#{name})", network, *numbers))
        sections += f"## {name}\n\n```yaml\n{text.strip()}\n```\n\n"
    return (
        page
        + table(("recipe", "network", "crop", "batch", "steps", "optimizer, rate"), rows)
        + sections.rstrip()
        + "\n"
    )


def label_efficiency_page() -> str:
    """The tables of the committed lines, as the command prints them."""
    lines = of_plan(read([ROOT / RESULTS]), read_plan())
    long_lines = of_plan(read([ROOT / RESULTS, ROOT / LONG]), read_plan(ROOT / LONG_PLAN))
    return f"""<!-- Written by docs/reference/generate.py from benchmarks/results: run it again where these change. -->
# Results: Dice with few labels

    voxtrast bench label-efficiency --table {RESULTS}

[What is compared](../label-efficiency.md), what was found, and what the intervals leave out, comes first.
Differences are in Dice, mean and 95 % interval; each is of equal seeds and equal test cases.

{tables(lines).replace("### ", "## ").rstrip()}

## Pretraining five times as long

    voxtrast bench label-efficiency --plan {LONG_PLAN} --table {RESULTS} {LONG}

{tables(long_lines).rstrip()}
"""


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "bench.md": bench_page,
    "configuration.md": configuration_page,
    "recipes.md": recipes_page,
    "label-efficiency.md": label_efficiency_page,
}

if __name__ == "__main__":
    for file, write in PAGES.items():
        (FOLDER / file).write_text(write(), encoding="utf-8")
        print(f"wrote {FOLDER / file}")
