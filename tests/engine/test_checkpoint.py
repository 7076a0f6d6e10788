from pathlib import Path

import pytest
import torch

from voxtrast.engine.checkpoint import State, finished_checkpoints, load_checkpoint, load_latest, save_checkpoint
from voxtrast.engine.errors import UserError


def state(step: int) -> State:
    tensor = torch.full((3, 4), float(step))
    return State(step, {"a": tensor, "b": tensor}, {"a": {"exp_avg": tensor, "step": torch.tensor(float(step))}}, {})


def test_a_state_reads_back_equal_and_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(7), keep=2)
    back = load_checkpoint(path)
    assert back.step == 7
    assert torch.equal(back.model["a"], state(7).model["a"])
    assert torch.equal(back.optimizer["a"]["step"], torch.tensor(7.0))
    assert back.model["a"].data_ptr() == back.model["b"].data_ptr()


def test_the_oldest_go_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [step for step, _ in finished_checkpoints(tmp_path)] == [3, 10]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".pt", ".pt"]
    newest, damaged = load_latest(tmp_path)
    assert newest is not None
    assert newest.step == 10
    assert not damaged


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") == (None, [])


def test_a_checkpoint_cut_off_before_its_description_does_not_count(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=3)
    save_checkpoint(tmp_path, state(2), keep=3).with_suffix(".json").unlink()
    newest, _ = load_latest(tmp_path)
    assert newest is not None
    assert newest.step == 1


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, state(1), keep=3)
    path = save_checkpoint(tmp_path, state(2), keep=3)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    newest, damaged = load_latest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert "step-00000002" in damaged[0]
    assert "checksum" in damaged[0]


def test_a_save_after_a_damaged_checkpoint_removes_it_and_keeps_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), keep=1)
    content = (tmp_path / "step-00000001.pt").read_bytes()
    damaged = save_checkpoint(tmp_path, state(3), keep=2)
    damaged.write_bytes(content)
    (tmp_path / ".step-00000009.pt.123.partial").write_bytes(b"left by a kill")
    save_checkpoint(tmp_path, state(2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002.json", "step-00000002.pt"]
    assert load_latest(tmp_path)[0] is not None


def test_nothing_whole_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state(1), keep=3)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        load_latest(tmp_path)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "checkpoints", state(1), keep=1)
