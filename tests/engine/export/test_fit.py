"""The report of how tensors fit a network, and names that wrappers changed."""

from pathlib import Path

import pytest
import torch
from torch import nn

from voxtrast.engine.errors import UserError
from voxtrast.engine.export import export
from voxtrast.engine.export.fit import examine, unwrapped
from voxtrast.engine.weights import load_weights, save_weights
from voxtrast.methods.backbone import Backbone, BackboneConfig

CONFIG = BackboneConfig(features=[4, 8])


class Twice(nn.Module):
    """Names one tensor twice, as nnU-Net's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.second = self.first


def test_each_tensor_is_counted_once_under_its_first_name() -> None:
    state = Twice().state_dict()
    given = {"second.weight": torch.zeros(3, 2), "first.bias": torch.zeros(3)}
    fit = examine("a.Twice", state, given, task_layers=("head.",), filled=["second.weight"])
    assert fit.filled == ("first.weight",)
    assert fit.loaded == ("first.bias",)
    assert fit.missing == ("head.weight", "head.bias")
    assert fit.lines()[0] == "fit to Twice:"
    assert "   1 pretrained" in fit.lines()[1]
    assert any("2 not in the file, the task's own layers: head.weight, head.bias" in line for line in fit.lines())
    assert fit.as_dict()["loaded"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("first.weight"), "missing: first.weight"),
        (lambda given: given.update({"third.weight": torch.zeros(1)}), "unexpected: third.weight"),
        (
            lambda given: given.update({"first.weight": torch.zeros(3, 4)}),
            r"of another shape: first.weight \(3, 4\) for \(3, 2\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_what_does_not_fit_is_refused_by_name(change, message: str) -> None:
    given = {name: torch.zeros_like(tensor) for name, tensor in Twice().state_dict().items() if "second" not in name}
    examine("Twice", Twice().state_dict(), given, task_layers=("head.",))
    change(given)
    with pytest.raises(UserError, match=message):
        examine("Twice", Twice().state_dict(), given, task_layers=("head.",))


def test_without_task_layers_nothing_may_be_missing() -> None:
    with pytest.raises(UserError, match=r"missing: first.weight, first.bias"):
        examine("Twice", Twice().state_dict(), {"head.weight": torch.zeros(1, 3), "head.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.encoder.stages.0.weight", "encoder.stages.0.weight"),
        ("_orig_mod.module.encoder.weight", "encoder.weight"),
        ("encoder._orig_mod.stages.0.weight", "encoder.stages.0.weight"),
        ("decoder.my_module.weight", "decoder.my_module.weight"),
    ],
)
def test_wrappers_leave_the_names(name: str, bare: str) -> None:
    assert unwrapped(name) == bare


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_module_are_exported_under_bare_names(prefix: str, tmp_path: Path) -> None:
    saved = Backbone(CONFIG).transferable()
    left = "decoder.transpconvs.0.weight"
    description = {"format": 1, "backbone": CONFIG.to_dict(), "version": "0", "untrained": [prefix + left]}
    save_weights(tmp_path / "w.safetensors", {prefix + name: saved[name] for name in saved}, description)
    done = export(tmp_path / "w.safetensors", "safetensors", tmp_path / "out.safetensors")
    assert done.lines[0].startswith(f"names freed of wrappers: {prefix}decoder.")
    assert done.fit.filled == (left,)
    tensors, _ = load_weights(tmp_path / "out.safetensors")
    assert set(tensors) == set(saved)
    assert all(torch.equal(tensors[name], saved[name]) for name in saved if name != left)


def test_one_tensor_under_a_bare_and_a_wrapped_name_is_refused(tmp_path: Path) -> None:
    saved = Backbone(CONFIG).transferable()
    both = saved | {f"module.{name}": tensor + 1 for name, tensor in saved.items()}
    save_weights(tmp_path / "w.safetensors", both, {"format": 1, "backbone": CONFIG.to_dict()})
    with pytest.raises(UserError, match="both bare and wrapped, such as module"):
        export(tmp_path / "w.safetensors", "nnunet", tmp_path / "out.pth")
