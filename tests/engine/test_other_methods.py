"""What a method without a displacement leaves for those who come after training."""

from pathlib import Path

import pytest
import torch
from report_reader import read_page
from stand_in import STAGES, Run, StandIn, recipe

from voxtrast.engine import views
from voxtrast.engine.config import load_config
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.export import export
from voxtrast.engine.report import write_report
from voxtrast.engine.reporting import evidence
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import load_into, load_weights
from voxtrast.methods import BackboneConfig, build_network, recipe_names, transferable_state


def test_a_report_shows_a_methods_own_terms_views_and_features(run: Run, tmp_path: Path) -> None:
    folder = run("run", "method.warn=true", stages=STAGES)
    page = read_page(write_report([folder], tmp_path / "report.html"))
    assert page.titles[1:] == ["What it is", "Configuration", "Curves", "Speed", "Input", "Views", "Features",
                               "Fine-tuning", "Where it ran", "What this does not show"]  # fmt: skip
    said = [image["alt"].partition(":")[0] for image in page.tags("img") if "svg" in image["src"]]
    assert {"total loss", "effective rank", "learning rate", "samples per second"} <= set(said)
    for words in ("loss, held aside", "a loss of", "D: discriminative, 8 samples a step", "three main directions"):
        assert words in page.text
    assert "displacement error" not in page.text


def test_features_of_a_coarser_level_are_shown_at_full_size(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("run", "train.steps=1")
    monkeypatch.setattr(StandIn, "inspect", lambda self, batch: {"features": self.backbone.encode(batch["one"])[-1]})
    page = read_page(write_report([folder], tmp_path / "report.html"))
    assert len([image for image in page.tags("img") if "features, trained" in image["alt"]]) == 3 * 2
    assert "Left out" not in page.text


def test_what_a_method_restores_is_shown_and_that_it_has_no_features_is_said(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("run", "train.steps=1")
    monkeypatch.setattr(
        StandIn, "inspect", lambda self, batch: {"restored": batch["one"] + 0.25, "target": batch["one"]}
    )
    page = read_page(write_report([folder], tmp_path / "report.html"))
    assert "Left out: stand_in has no features to show." in page.text
    assert "Restoration" in page.titles
    assert "Mean absolute difference 0.250;" in page.text
    shown = {image["alt"].split(", ")[2] for image in page.tags("img") if ", restoration, " in image["alt"]}
    assert shown == {"input", "target", "restored", "difference"}


@pytest.mark.parametrize("name", ["dira", "pcrl", "pcrlv2"])
def test_a_method_that_restores_says_towards_what(name: str) -> None:
    off = {"dira": "discriminative", "pcrl": "contrast", "pcrlv2": "similarity"}[name]
    batch = None
    for words, restores in (((), True), ((f"stages=[{{name: only, terms: {{{off}: 1.0}}}}]",), False)):
        method = build_method(load_config(f"{name}-tiny", [*words])).eval()
        batch = batch or evidence.batch_of(torch.randn(1, 1, 16, 32, 24), method.views)
        found = method.inspect(batch)
        assert ("restored" in found) == restores
        for key in ("restored", "target", "input"):
            if key in found:
                assert found[key].shape == batch["x1"].shape
                assert found[key].isfinite().all()


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.endswith("-tiny")])
def test_every_method_shows_features_of_a_volume_with_unequal_sides(recipe: str) -> None:
    method = build_method(load_config(recipe)).eval()
    features = method.inspect(evidence.batch_of(torch.randn(1, 1, 16, 32, 24), method.views))["features"]
    assert features.shape[0] == 1
    assert features.shape[2:] == (16, 32, 24)
    assert features.isfinite().all()


def test_views_are_those_of_the_stages_batch(stand_in: None, tiny_store: Path, tmp_path: Path) -> None:
    config = load_config(str(recipe(tmp_path, STAGES)), [f"data={tiny_store}"])
    spec = build_method(config).views
    found = views.samples(config, spec, 1, 13, "train")
    assert [(plan.step, plan.slot) for plan, _, _ in found] == [
        *((1, slot) for slot in range(8)), *((2, slot) for slot in range(4)), (3, 0)
    ]  # fmt: skip
    views.draw_views(config, tmp_path / "views.png", 0, 1, "train", False)
    assert (tmp_path / "views.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def half_trained(run: Run) -> Path:
    """A run that never ran its decoder."""
    return run("run", "method.decoder=frozen", "method.restorative_weight=0", "train.steps=1", "seed=3")


def initial(config: BackboneConfig, seed: int, classes: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return transferable_state(build_network(config, classes))


def test_weights_say_what_was_not_trained_and_a_network_keeps_its_own_there(half_trained: Path) -> None:
    tensors, description = load_weights(half_trained / "weights.safetensors")
    untrained = description["untrained"]
    assert untrained
    assert all(name.startswith(("decoder.stages.0", "decoder.transpconvs.0")) for name in untrained)
    config = BackboneConfig.from_dict(description["backbone"])
    torch.manual_seed(5)
    network = build_network(config, 2)
    left = load_into(network, tensors, untrained)
    fresh, state = initial(config, 5), transferable_state(network)
    assert set(left) >= set(untrained)
    for name, tensor in state.items():
        assert torch.equal(tensor, fresh[name] if name in untrained else tensors[name]), name
    load_into(network, tensors)  # as a file without the field
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in transferable_state(network).items())


def test_finetuning_says_once_what_was_not_pretrained(
    half_trained: Path, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(half_trained, tiny_store, labels=1, seed=0, steps=1, crop=(16, 16, 16), test_cases=1)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("tensors were not pretrained: decoder.") == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_an_export_fills_what_was_not_pretrained_with_fixed_initial_values(
    seed: int, half_trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    lines = export(half_trained, "nnunet", tmp_path / "weights.pth").lines
    assert torch.equal(torch.get_rng_state(), before)
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    tensors, description = load_weights(half_trained / "weights.safetensors")
    fresh = initial(BackboneConfig.from_dict(description["backbone"]), 0)
    untrained = description["untrained"]
    assert set(content["voxtrast"]["not_pretrained"]) > set(untrained)
    assert untrained[0] in next(line for line in lines if " not pretrained" in line)
    for name, tensor in fresh.items():
        wanted = tensor if name in untrained else tensors[name]
        assert torch.equal(content["network_weights"][name], wanted), name
    assert not torch.equal(fresh[untrained[0]], tensors[untrained[0]])
