"""What a run notes of each start."""

from pathlib import Path

import pytest
import torch
from stand_in import Run

from voxtrast.engine.errors import UserError
from voxtrast.engine.starts import FILE, note_start, read_starts


def test_every_start_of_a_run_is_noted(run: Run) -> None:
    run("run", "train.steps=2", "device=cpu")
    folder = run("run", "train.steps=3", "device=cpu")
    starts = read_starts(folder)
    assert [start["step"] for start in starts] == [0, 2]
    for start in starts:
        assert start["ranks"] == 1
        assert start["device"]
        assert start["versions"]["torch"] == torch.__version__


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    note_start(tmp_path, step=0, ranks=1, device=torch.device("cpu"))
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write('{"date": "2026-01-0')
    assert [start["step"] for start in read_starts(tmp_path)] == [0]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        note_start(tmp_path, step=0, ranks=1, device=torch.device("cpu"))
