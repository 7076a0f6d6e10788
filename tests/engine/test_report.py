"""The report: whole, self-contained, true to the logs, and plain about what is missing."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_reader import read_page

from voxtrast.engine import checkpoint
from voxtrast.engine.config import load_config, write_config
from voxtrast.engine.data.store import Store
from voxtrast.engine.downstream.finetune import finetune
from voxtrast.engine.errors import UserError
from voxtrast.engine.report import Phase, Story, write_report
from voxtrast.engine.reporting import evidence
from voxtrast.engine.reporting.evidence import FeatureMap, match_pairs, principal_colours, read_log, segmentations
from voxtrast.engine.reporting.planes import frame_of, planes_through
from voxtrast.engine.runs import build_method, describe, load_run
from voxtrast.engine.weights import load_weights, save_weights

RAS = ((0.0, 0.0, 2.0, 0.0), (0.0, 3.0, 0.0, 0.0), (4.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def make_run(run: Path, store: Path, *, steps: int = 3, trained: bool = True) -> Path:
    """A run's folder as pretraining leaves it, with numbers that are easily found again."""
    words = [
        f"data={store}",
        f"output={run}",
        "views.crop=[16,24,16]",
        "backbone.features=[8,16]",
        "method.units=[1,1]",
        "validation.fraction=0.34",
        "validation.batches=1",
        f"train.steps={steps}",
    ]
    config = load_config("cover-tiny", words)
    run.mkdir(parents=True)
    write_config(config, run / "config.yaml")
    if not trained:
        return run
    training = [
        {
            "step": step,
            "loss": 9.0 / step,
            "loss/vector": 8.0 / step,
            "loss/consistency": 1.0 / step,
            "monitor/displacement_error": 5.0 / step,
            "monitor/zero_error": 6.0,
            "learning_rate": 0.001,
            "samples_per_second": 4.0,
            "data_wait": 0.125,
            "memory_mb": 789.0,
        }
        for step in range(1, steps + 1)
    ]
    validation = [
        {
            "step": step,
            "loss": 7.654 - step,
            "vector": 7.0 - step,
            "consistency": 0.654,
            "displacement_error": 6.54 - step,
            "zero_error": 6.78,
        }
        for step in (0, steps)
    ]
    for name, lines in (("log", training), ("validation", validation)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / f"{name}.jsonl").write_text(text + '{"step": 99, "loss": 1')
    method = build_method(config)
    checkpoint.save_checkpoint(run / "checkpoints", checkpoint.State(steps, method.state_dict(), {}, {}), keep=1)
    save_weights(
        run / "weights.safetensors", method.transferable(), {**describe(config, Store(store).cases), "step": steps}
    )
    return run


def without_store(run: Path) -> Path:
    """Of such a run the report has little to draw."""
    config = run / "config.yaml"
    lines = (
        f"data: {run / 'nowhere'}" if line.startswith("data:") else line
        for line in config.read_text(encoding="utf-8").split("\n")
    )
    config.write_text("\n".join(lines))
    return run


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report") / "first", tiny_store)
    for from_scratch in (False, True):
        finetune(
            folder,
            tiny_store,
            labels=1,
            seed=0,
            from_scratch=from_scratch,
            steps=2,
            crop=(16, 16, 16),
            test_cases=2,
            progress=False,
        )
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    story = Story(
        title="A <title> & more",
        commands=["voxtrast pretrain cover-tiny"],
        caveats=["made from blobs"],
        phases=[Phase("prepare", 12.3, "six volumes"), Phase("pretrain", 45.6, "three steps", earlier=True)],
        class_names={1: "bright parts"},
        exports=["nnunet.pth"],
    )
    return write_report([run], run.parent / "report.html", story=story)


def test_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    reader = read_page(page)
    assert "Left out" not in reader.text
    assert reader.titles == ["What was run", "What it is", "Configuration", "Curves", "Speed", "Input",
                             "Views and displacement", "Features", "Fine-tuning", "Where it ran", "Export",
                             "What this does not show"]  # fmt: skip
    kinds = [image["src"].partition(";")[0] for image in reader.tags("img")]
    assert kinds.count("data:image/png") == 5  # volumes, views, displacement, arrows, segmentations
    assert kinds.count("data:image/svg+xml") == 11  # 3 losses, displacement error, rate, 3 of speed, 3 of Dice
    assert kinds.count("data:image/jpeg") == 3 * (4 + 2 * 3)  # planes of a field, and of the features of two volumes
    assert page.stat().st_size < 5e6


def test_without_scripts_the_middle_slices_are_shown_and_no_slider(page: Path) -> None:
    reader = read_page(page)
    sliders = [each for each in reader.tags("label") if each["class"] == "slider"]
    assert len(sliders) == len(reader.tags("input")) == 9
    assert all("hidden" in each for each in sliders)
    strips = iter(each for each in reader.tags("img") if "jpeg" in each["src"])
    for slider, tiles in zip(reader.tags("input"), [4] * 3 + [3] * 6, strict=True):
        places = slider["data-places"].split(" ")
        for strip in itertools.islice(strips, tiles):
            height, top = (int(part.split(":")[1].rstrip("%")) for part in strip["style"].split(";"))
            assert height == 100 * len(places) == 100 * (int(slider["max"]) + 1)
            assert top == -100 * int(slider["value"])
            assert 0.2 * height < -top < 0.8 * height
            assert strip["alt"].endswith(f"slice {places[int(slider['value'])]}")
    assert next(strips, None) is None


def test_page_holds_the_numbers_of_the_logs(page: Path, run: Path) -> None:
    text = read_page(page).text
    for number in ("7.654", "6.54", "6.78", "3.54", "4.654"):  # validation at the first and the last step
        assert number in text
    for words in ("3 of 3", "12.5%", "789 MB", "2 s for 3 steps, median 0.50 s a step, 4.00 samples/s", "checkpoint"):
        assert words in text
    for line in map(json.loads, (run / "finetune" / "finetune.jsonl").read_text(encoding="utf-8").splitlines()):
        assert f"{line['dice']['mean']:.3f}" in text
        assert f"{line['dice']['classes']['1']:.3f}" in text
        for name in ("hd95", "surface_distance"):
            assert line[name]["mean"] is None or f"{line[name]['mean']:.2f}" in text
    assert "HD95 mm" in text


def test_models_are_those_of_the_run_that_most_arms_have_and_must_fit(run: Path, tmp_path: Path) -> None:
    lines = list(map(json.loads, (run / "finetune" / "finetune.jsonl").read_text(encoding="utf-8").splitlines()))
    alone = {**lines[0], "seed": -1}  # an earlier seed, of one arm
    found = segmentations([alone, *lines])
    assert set(found.predictions) == {line["arm"] for line in lines} == {"pretrained", "scratch"}
    by_arm = {line["arm"]: line for line in lines}
    broken_model = str(tmp_path / "of another budget")  # no pair of scratch's
    longer = {**by_arm["pretrained"], "steps": 3, "model": broken_model}
    assert set(segmentations([*lines, longer]).predictions) == set(by_arm)
    tensors, description = load_weights(Path(lines[0]["model"]))
    broken = tmp_path / "broken.safetensors"
    save_weights(broken, {name: each for name, each in tensors.items() if "seg_layers" not in name}, description)
    with pytest.raises(UserError, match=r"broken.safetensors: .*seg_layers"):
        segmentations([{**lines[0], "model": str(broken)}])


def test_a_segmentation_is_looked_at_as_it_was_scored(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run / "finetune" / "finetune.jsonl").read_text(encoding="utf-8")
    lines = [{**json.loads(line), "overlap": 0.75, "mirror": [0, 2]} for line in text.splitlines()]
    asked: list[dict[str, Any]] = []
    real = evidence.predict_logits
    monkeypatch.setattr(evidence, "predict_logits", lambda *args, **kept: (asked.append(kept), real(*args, **kept))[1])
    segmentations(lines)
    assert asked == [{"overlap": 0.75, "mirror": (0, 2)}] * 2


def test_page_tells_the_story(page: Path) -> None:
    text = read_page(page).text
    for words in (
        "A <title> & more",
        "voxtrast pretrain cover-tiny",
        "made from blobs",
        "12.3",
        "this page",
        "bright parts",
        "three steps (by an earlier call)",
        "nnunet.pth",
    ):
        assert words in text


def test_numbers_of_the_pictures_are_those_of_validation(run: Path, tiny_store: Path) -> None:
    loaded = load_run(run)
    pairs = match_pairs(loaded)
    assert {pair.case for pair in pairs} <= {case.id for case in loaded.validation_cases}
    for pair in pairs:
        valid = pair.mask > 0
        assert pair.frame.letters == (("I", "S"), ("P", "A"), ("L", "R"))
        assert pair.error[valid].mean() > 0
        # Appearance aside, the moving view warped by the true field is the fixed view.
        assert np.corrcoef(pair.warped_true[valid], pair.fixed[valid])[0, 1] > 0.8


def test_what_is_missing_is_said_and_the_rest_is_there(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", tiny_store, trained=False)
    text = read_page(write_report([bare], tmp_path / "bare.html")).text
    assert "holds no checkpoint yet" in text
    assert "No step is in log.jsonl yet" in text
    assert "No fine-tuning yet" in text
    assert "cover-tiny" in text


def test_a_store_that_is_gone_leaves_the_curves(tiny_store: Path, tmp_path: Path) -> None:
    lost = without_store(make_run(tmp_path / "lost", tiny_store))
    reader = read_page(write_report([lost], tmp_path / "lost.html"))
    assert "is not a store" in reader.text
    assert len(reader.tags("img")) == 8


def test_settings_that_differ_from_the_recipe_come_first(page: Path) -> None:
    text = read_page(page).text
    start = text.index("in cover-tiny")
    changed = text[start : text.index("settings", start)]
    assert "views.crop[40, 48, 40][16, 24, 16]" in changed
    assert "method.radius" not in changed
    assert "method.radius" in text


def test_several_runs_share_a_page(tiny_store: Path, tmp_path: Path) -> None:
    first = without_store(make_run(tmp_path / "first", tiny_store))
    second = without_store(make_run(tmp_path / "one" / "second", tiny_store, steps=2))
    third = make_run(tmp_path / "two" / "second", tiny_store, trained=False)
    said: list[str] = []
    reader = read_page(write_report([first, second, third], tmp_path / "all.html", say=said.append))
    for name in ("first", str(second), str(third)):
        assert f"{name}: Curves" in reader.titles
    assert reader.titles[:2] == ["What was run", "Comparison of the runs"]
    overlaid = [image["alt"] for image in reader.tags("img") if "over steps of" in image["alt"]]
    assert f"total loss over steps of first, {second}" in overlaid
    assert [line.split(": ")[1:3] for line in said] == [
        [name, "trained network"] for name in ("first", str(second), str(third))
    ]
    assert "holds no checkpoint yet" in said[-1]


def test_given_results_are_compared_with_those_of_the_run(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    lines = [
        json.loads(line) for line in (run / "finetune" / "finetune.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    other = without_store(make_run(tmp_path / "other", tiny_store, trained=False))
    (other / "finetune").mkdir()
    (other / "finetune" / "finetune.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = tmp_path / "label-efficiency.jsonl"
    others = [{**line, "labels": 2, "weights_sha256": "f" * 64, "recipe": "mae-tiny"} for line in lines]
    given.write_text("".join(json.dumps(line) + "\n" for line in others))
    reader = read_page(write_report([other], tmp_path / "given.html", results=[given]))
    assert "Label efficiency" in reader.titles
    text = reader.text[reader.text.rindex("Label efficiency") :]
    for words in ("pretrained, mae-tiny ffffffff", "pretrained, cover-tiny", "from scratch"):
        assert words in text
    assert any("2 labels" in image["alt"] and "mae-tiny" in image["alt"] for image in reader.tags("img"))
    with pytest.raises(UserError, match="no such file"):
        write_report([run], tmp_path / "given.html", results=[tmp_path / "nothing.jsonl"])


def test_only_a_report_is_replaced(tiny_store: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", tiny_store, trained=False)
    output = tmp_path / "thesis.html"
    output.write_text("<html>three years of work</html>")
    with pytest.raises(UserError, match=r"was not written by `voxtrast report`.*--force"):
        write_report([bare], output)
    assert "three years" in output.read_text(encoding="utf-8")
    write_report([bare], output, force=True)
    write_report([bare], output)  # its own page, without force
    with pytest.raises(UserError, match="a folder; name a file"):
        write_report([bare], tmp_path)
    with pytest.raises(UserError, match="given twice"):
        write_report([bare, bare], output)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run given"):
        write_report([], tmp_path / "report.html")


def test_log_leaves_out_the_line_that_a_kill_cut_off(run: Path) -> None:
    training, validation = read_log(run)
    assert [line["step"] for line in training] == [1, 2, 3]
    assert [line["step"] for line in validation] == [0, 3]


def test_letters_follow_the_affine() -> None:
    frame = frame_of(RAS, (4.0, 3.0, 2.0))
    assert frame.letters == (("I", "S"), ("P", "A"), ("L", "R"))
    assert [plane.name for plane in planes_through((1, 2, 3), frame)] == ["axial", "coronal", "sagittal"]
    turned = frame_of(((-2.0, 0.0, 0.0, 0.0), (0.0, 0.0, 3.0, 0.0), (0.0, -4.0, 0.0, 0.0), RAS[3]), (2.0, 4.0, 3.0))
    assert turned.letters == (("R", "L"), ("S", "I"), ("P", "A"))
    assert [plane.name for plane in planes_through((1, 2, 3), turned)] == ["sagittal", "axial", "coronal"]


def test_planes_cut_where_they_say() -> None:
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    axial, coronal, sagittal = planes_through((1, 2, 3), frame_of(RAS, (4.0, 3.0, 2.0)))
    assert np.array_equal(axial.cut(volume), volume[1])
    assert np.array_equal(coronal.cut(volume), volume[:, 2])
    assert np.array_equal(sagittal.cut(volume), volume[:, :, 3])
    slice_frame = frame_of(RAS, (4.0, 3.0, 2.0), dimensions=2)
    assert slice_frame.spacing_mm == (3.0, 2.0)
    [only] = planes_through((0, 0), slice_frame)
    assert np.array_equal(only.cut(volume[0]), volume[0])


def test_equal_features_have_equal_colours() -> None:
    generator = np.random.default_rng(0)
    image = generator.standard_normal((6, 6, 6)).astype(np.float32)
    features = generator.standard_normal((5, 6, 6, 6)).astype(np.float32) * np.arange(5, 0, -1).reshape(-1, 1, 1, 1)
    frame = frame_of(RAS, (1.0, 1.0, 1.0))
    maps = [FeatureMap("a", frame, image, features), FeatureMap("b", frame, image[::-1], features[:, ::-1])]
    colours, shares = principal_colours(maps)
    assert np.allclose(colours[0], colours[1][::-1])
    assert colours[0].min() >= 0
    assert colours[0].max() <= 1
    assert shares == sorted(shares, reverse=True)
    negated, _ = principal_colours([FeatureMap("a", frame, image, -features)])
    again, _ = principal_colours(maps[:1])
    assert np.array_equal(again[0], colours[0])
    assert negated[0].shape == (6, 6, 6, 3)
