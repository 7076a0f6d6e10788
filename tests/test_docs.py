"""The documentation against the program: commands parse, scripts run, links lead somewhere, reference is current."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import torch
import yaml
from documents import PAGES, ROOT, anchors, commands, inline, links, pretraining_words, scripts, words_of

PLACEHOLDERS = {"RECIPE": "cover-tiny", "NAME": "cover-tiny", "N": "4", "B": "8", "S": "0"}
PASSED_ON = ("pretrain", "launch", "views")
SCRIPTS = list({script.text: script for script in scripts()}.values())  # the same one on two pages runs once
START = ROOT / "docs" / "start.md"
TUTORIAL = ROOT / "docs" / "how-to" / "write-a-method.md"


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@cache
def reference() -> ModuleType:
    return load(ROOT / "docs" / "reference" / "generate.py")


@cache
def typer_commands() -> dict[str, Any]:
    import typer

    from voxtrast.engine.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined,no-any-return]


@cache
def check_pretraining(*words: str) -> None:
    from voxtrast.engine.config import load_config

    recipe, *settings = words
    filled = [re.sub(r"=([A-Z])$", lambda value: f"={PLACEHOLDERS.get(value[1], value[1])}", each) for each in settings]
    load_config(recipe, filled)


def options_of(name: str) -> set[str]:
    if name in PASSED_ON:
        return set(reference().front_door(name)._option_string_actions)
    return {option for each in typer_commands()[name].params for option in each.opts}


def check(command: list[str]) -> None:
    """Raises or exits where the program would refuse the words, before it looks at any file."""
    name, *words = [PLACEHOLDERS.get(word, word) for word in command[1:]]
    if name in PASSED_ON:
        parser: argparse.ArgumentParser = reference().front_door(name)
        parsed = parser.parse_args(words) if name == "launch" else parser.parse_intermixed_args(words)
        check_pretraining(parsed.recipe, *parsed.settings)
    else:
        typer_commands()[name].make_context(name, words)


def of_program(page: Path) -> list[list[str]]:
    return [words_of(line) for line in commands(page) if line.startswith("voxtrast ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    for words in of_program(page):
        if words[1] != "bench" and "[OPTIONS]" not in words and "OPTIONS" not in words:
            try:
                check(words)
            except (Exception, SystemExit) as refused:
                pytest.fail(f"{' '.join(words)}: {refused!r}")
    for line in commands(page):
        words = pretraining_words(line) if "voxtrast.engine.pretrain" in line else None
        if words:
            check_pretraining(*[PLACEHOLDERS.get(word, word) for word in words])


@pytest.mark.slow
def test_every_benchmark_is_one_that_the_program_takes() -> None:
    found = 0
    for page in PAGES:
        for _, bench, *words in of_program(page):
            if bench != "bench" or "[OPTIONS]" in words or "OPTIONS" in words:
                continue
            name, *rest = [PLACEHOLDERS.get(word, word) for word in words]
            parser = reference().front_door(f"bench {name}")
            rest = [word for word in rest if word != "RESULTS.jsonl"]
            parser.parse_args(rest) if name in ("kernels", "prepare") else parser.parse_intermixed_args(rest)
            found += 1
    assert found > 5


def test_commands_within_sentences_exist_with_their_options() -> None:
    wrong = []
    for page in PAGES:
        for _, name, *words in inline(page):
            if name not in typer_commands():
                wrong.append(f"{page.name}: voxtrast {name}")
            elif name != "bench":
                given = {word.split("=")[0].rstrip(",;.") for word in words if word.startswith("--")}
                wrong += [f"{page.name}: voxtrast {name} {each}" for each in given - options_of(name) - {"--help"}]
    assert not wrong


@pytest.mark.parametrize(
    "words",
    ["prepare RAW STORE --spacing 1", "pretrain cover-tiny train.stpes=3", "pretrain cover-tinny", "finetune RUN",
     "launch --hosts H cover-3d", "predicate RUN"],
)  # fmt: skip
def test_the_check_of_commands_finds_what_is_wrong(words: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(["voxtrast", *words.split()])


def test_targets_of_make_and_extras_of_pip_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        made = set(re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE))
        assert made <= targets, page
        for extras in re.findall(r"(?:voxtrast|\.)\[([a-z0-9,-]+)\]", text):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), (page, extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in pages(each)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents
    )


@pytest.mark.parametrize(
    "name",
    [
        "cli.md",
        "configuration.md",
        "recipes.md",
        "label-efficiency.md",
        pytest.param("bench.md", marks=pytest.mark.slow),
    ],
)
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == reference().PAGES[name](), "out of date: run python docs/reference/generate.py"


def test_every_setting_says_what_it_means() -> None:
    from dataclasses import is_dataclass

    from voxtrast.engine.config import Config
    from voxtrast.methods import METHODS

    generate, silent = reference(), []
    groups = [Config, *(group for method in METHODS.values() for group in (method.Config, method.Views))]
    for group in {*groups, *(kind for each in groups for kind in generate.nested(each))}:
        for setting in generate.settings_of(group):
            if not setting.comment and not is_dataclass(setting.kind):
                silent.append(f"{group.__name__}.{setting.name}")
    assert not silent, "write a comment behind the field"


def test_drawings_are_those_of_the_diagrams() -> None:
    folder = ROOT / "docs" / "methods"
    draw = load(folder / "drawings" / "draw.py")
    wanted = {name for page in folder.glob("*.md") for name in draw.drawings(page.read_text(encoding="utf-8"))}
    assert wanted == {drawn.stem for drawn in (folder / "drawings").glob("*.svg")}, "run docs/methods/drawings/draw.sh"


def plain(script: Any) -> bool:
    return not (script.title or script.needs or "STORE" in script.text)


@pytest.mark.parametrize("script", [each for each in SCRIPTS if plain(each)], ids=str)
def test_a_script_runs(script: Any) -> None:
    torch.manual_seed(0)
    exec(compile(script.text, str(script), "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("script", [each for each in SCRIPTS if "STORE" in each.text and not each.title], ids=str)
def test_a_script_on_a_store_runs(script: Any, tiny_store: Path) -> None:
    shorter = script.text.replace('"STORE"', repr(str(tiny_store))).replace("range(100)", "range(1)")
    exec(compile(shorter, str(script), "exec"), {})


def tutorial(folder: Path) -> dict[str, str]:
    """The files of the page on writing a method, in a folder."""
    files = dict(re.findall(r'^```\w+ title="([\w.]+)"\n(.*?)^```', TUTORIAL.read_text(encoding="utf-8"), re.M | re.S))
    for name, text in files.items():
        (folder / name).write_text(text)
    return files


def run(*words: str | Path, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_the_method_of_the_tutorial_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from voxtrast.methods import METHODS, BackboneConfig

    monkeypatch.setattr("voxtrast.methods.METHODS", dict(METHODS))
    files = tutorial(tmp_path)
    assert set(files) == {"restore.py", "loop.py", "restore.yaml"}
    restore = load(tmp_path / "restore.py")
    torch.manual_seed(0)
    method = restore.Restore(
        restore.RestoreConfig(), BackboneConfig(features=[4, 8], encoder_blocks=[1]), restore.RestoreViews()
    )
    clean = torch.nn.functional.avg_pool3d(torch.randn(2, 1, 16, 16, 16), 3, 1, 1) * 4
    batch = {"image": clean * (torch.rand_like(clean) > 0.2), "image_clean": clean}
    optimizer = torch.optim.AdamW(method.parameter_groups(weight_decay=1e-4), lr=1e-2)
    losses = []
    for step in range(20):
        loss = torch.stack(list(method(batch, step).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        name in dict(method.backbone.network.named_parameters(remove_duplicate=False)) for name in method.transferable()
    )


@pytest.mark.slow
def test_the_tutorial_runs_in_a_plain_loop_and_in_the_engine(tmp_path: Path, tiny_store: Path) -> None:
    files = tutorial(tmp_path)
    (tmp_path / "loop.py").write_text(
        files["loop.py"].replace('"STORE"', repr(str(tiny_store))) + "\nprint(losses[0], losses[-1])\n"
    )
    first, last = map(float, run("loop.py", folder=tmp_path).split())
    assert last < first
    run(
        "restore.py", "restore.yaml", f"data={tiny_store}", "output=RUN", "train.steps=2", "device=cpu", folder=tmp_path
    )
    assert (tmp_path / "RUN" / "weights.safetensors").is_file()


@pytest.mark.slow
def test_the_page_start_works_as_it_stands(tmp_path: Path, tiny_store: Path) -> None:
    lines = [line for line in commands(START) if line.startswith("voxtrast ") and "doctor" not in line]
    assert [words_of(line)[1] for line in lines][:5] == ["prepare", "views", "pretrain", "finetune", "finetune"]
    (tmp_path / "RAW").symlink_to(tiny_store.parent / "raw")
    for line in lines:
        shorter = line.replace("train.steps=200", "train.steps=2 validation.batches=1").replace(
            "--steps 300", "--steps 2"
        )
        run("-c", "from voxtrast.engine.cli import main; main()", *words_of(shorter)[1:], folder=tmp_path)
    for file in ("views.png", "RUN/weights.safetensors", "RUN/finetune/finetune.jsonl", "pretrained.pth"):
        assert (tmp_path / file).stat().st_size > 0
    for script in SCRIPTS:
        if script.needs == "RUN":
            exec(compile(script.text.replace("RUN/", f"{tmp_path}/RUN/"), str(script), "exec"), {})


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    run(
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        tmp_path,
        "--config-file",
        ROOT / "mkdocs.yml",
        folder=ROOT,
    )
    fetched = [
        page
        for page in tmp_path.rglob("*.html")
        if re.search(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', page.read_text(encoding="utf-8"))
    ]
    assert not fetched
