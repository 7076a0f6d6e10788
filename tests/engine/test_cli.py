"""The words of `voxtrast prepare`: what each form asks for, and what is said where they do not fit together."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from voxtrast.engine.cli import app
from voxtrast.engine.data import prepare as front
from voxtrast.engine.errors import UserError


def say(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, ["prepare", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the front door was asked for: (raw, store, settings)."""
    calls: list[tuple] = []
    summary = front.PrepareSummary(1, 0, 0, 0, 0.1, 10)

    def prepare(raw: Path, store: Path, **settings: object) -> front.PrepareSummary:
        calls.append((str(raw), str(store), settings))
        return summary

    monkeypatch.setattr(front, "prepare", prepare)
    monkeypatch.setattr(front, "merge", lambda store: calls.append(("merge", str(store))) or summary)
    return calls


def test_options_reach_prepare(asked: list[tuple]) -> None:
    words = ["--shard", "2/8", "--order", "1", "--timeout-s", "60", "--memory-limit-gb", "4", "--device", "cuda"]
    assert say("raw", "store", *words, "--scheduler", "tcp://host:1").exit_code == 0
    raw, store, settings = asked[0]
    assert (raw, store) == ("raw", "store")
    expected = {"shard": "2/8", "order": 1, "timeout_s": 60.0, "memory_limit_gb": 4.0, "device": "cuda"}
    assert settings.items() >= (expected | {"scheduler": "tcp://host:1", "spacing_mm": 1.5}).items()


def test_merge_and_lists_take_the_store_alone(asked: list[tuple]) -> None:
    say("--merge", "store")
    say("--from-nnssl", "list.json", "store")
    assert asked[0] == ("merge", "store")
    assert asked[1][:2] == ("list.json", "store")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["raw"], "prepare raw: expected RAW STORE"),
        (["a", "b", "c"], "prepare a b c: expected RAW STORE"),
        (["--merge", "raw", "store"], "expected STORE;"),
        (["--check", "raw", "store"], "expected STORE;"),
        (["--check", "--merge", "store"], "--merge goes with STORE alone"),
        (["--check", "--from-nnssl", "a.json", "store"], "--check goes with STORE alone"),
        (["--from-nnssl", "a.json", "raw", "store"], "expected STORE, the list being RAW"),
        (["--from-nnssl", "a.csv", "store"], "--from-nnssl a.csv: expected a .json file"),
    ],
)
def test_words_that_do_not_fit_are_an_error(words: list[str], said: str, asked: list[tuple]) -> None:
    with pytest.raises(UserError, match=said):
        say(*words)
    assert asked == []


def test_check_tells_by_its_exit_code(tiny_store: Path, tmp_path: Path) -> None:
    result = say("--check", tiny_store)
    assert result.exit_code == 0
    assert "every file is as the index says" in result.output
    broken = tmp_path / "broken"
    shutil.copytree(tiny_store, broken)
    (broken / "volumes/case_3.npy").write_bytes(b"")
    result = say("--check", broken)
    assert result.exit_code == 1
    assert "case_3.npy" in result.output
    assert "case_2" not in result.output
    with pytest.raises(UserError, match="is not a store"):
        say("--check", tmp_path)
