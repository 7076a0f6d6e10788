"""The label-efficiency benchmark: its plan, the order of its runs, going on where it was, its tables, its probes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from voxtrast.benchmarks import label_efficiency, label_results
from voxtrast.benchmarks.harness import append
from voxtrast.benchmarks.label_efficiency import Bench, check_task, run
from voxtrast.benchmarks.label_job import untrained
from voxtrast.benchmarks.label_plan import (
    INITIAL,
    PLAN,
    PLATEAU,
    SCRATCH,
    Job,
    Plan,
    Task,
    pretraining,
    read_plan,
    setting,
)
from voxtrast.benchmarks.voxel_probes import at_every_voxel, match
from voxtrast.engine.config import load_config
from voxtrast.engine.data.splits import held_aside
from voxtrast.engine.data.store import Store
from voxtrast.engine.errors import UserError
from voxtrast.engine.runs import build_method
from voxtrast.engine.weights import load_weights, save_weights

SMALL = {
    "backbone": ["backbone.features=[4,8]", "backbone.norm=instance"],
    "labels": [2, 1],
    "seeds": [0],
    "plateau_labels": [1],
    "pretrain": ["train.steps=2", "train.global_batch=2", "schedule.warmup_steps=1", "validation.every=0"],
    "tasks": {
        "made": {
            "data": "raw",
            "classes": {1: "bright"},
            "spacing_mm": 1.0,
            "test_cases": 2,
            "finetune": {"steps": 2, "batch": 1, "learning_rate": 0.003, "crop": [16, 16, 16], "autocast": "none"},
            "plateau_steps": 3,
            "pretrain": {"mae": ["views.crop=[16,16,16]"], "pcl": ["views.crop=[8,16,16]"]},
        }
    },
}


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return file


@pytest.fixture
def bench(plan_file: Path, tmp_path: Path) -> Bench:
    return Bench(read_plan(plan_file), plan_file, tmp_path / "into", tmp_path / "lines.jsonl", False, "cpu", 2)


def line(arm: str, labels: int, seed: int, dice: list[float], **others: Any) -> dict[str, Any]:
    cases = [{"case": f"case{index}", "dice": {"1": each}, "mean": each} for index, each in enumerate(dice)]
    mean = sum(dice) / len(dice)
    about = {"kind": "finetune", "task": "made", "setting": "x", "transductive": False, "device": "a machine"}
    about |= {"steps": 2, "batch": 1, "crop": [16, 16, 16], "learning_rate": 0.003, "seconds": 36.0, "cases": cases}
    return about | {"arm": arm, "labels": labels, "seed": seed, "dice": {"mean": mean, "classes": {"1": mean}}} | others


def test_the_plan_of_the_package_can_be_carried_out_and_names_every_method() -> None:
    plan = read_plan()
    for task in plan.tasks.values():
        assert set(task.pretrain) == {"cover", "dira", "jcl", "mae", "pcl", "pcrl", "pcrlv2"}
    assert len(plan.seeds) >= 3
    assert sorted(plan.labels) == [2, 4, 8, 16]


def test_arms_and_tasks_stay_in_balance_whenever_it_is_stopped() -> None:
    plan = read_plan()
    counts: dict[tuple[str, str], int] = {}
    for job in plan.jobs():
        if job.kind == "finetune" and job.arm != PLATEAU:
            counts[job.task, job.arm] = counts.get((job.task, job.arm), 0) + 1
            assert max(counts.values()) - min(counts.values()) <= 1 or len(counts) < 2 * 9
    assert set(counts.values()) == {len(plan.labels) * len(plan.seeds)}
    jobs = list(plan.jobs())
    assert len(set(jobs)) == len(jobs)
    for index, job in enumerate(jobs):
        assert job.needs is None or job.needs in jobs[:index]


def test_all_pretraining_begins_with_the_network_that_is_the_initial_one(tmp_path: Path) -> None:
    plan = read_plan()
    task = plan.tasks["lumbar"]
    initial, _ = load_weights(untrained(plan, task, tmp_path))
    for method in task.pretrain:
        begins = build_method(load_config(f"{method}-tiny", plan.words(task, method))).transferable()
        assert begins.keys() == initial.keys()
        assert all(torch.equal(initial[name], tensor) for name, tensor in begins.items())


def test_a_result_counts_for_what_was_set_when_it_was_made(bench: Bench) -> None:
    plan, task = bench.plan, bench.plan.tasks["made"]
    tuned, scratch, long = (Job("finetune", "made", arm, 1, 0) for arm in ("mae", SCRATCH, PLATEAU))

    def changed(**values: Any) -> Plan:
        return replace(plan, tasks={"made": replace(task, **values)})

    longer = changed(pretrain={**task.pretrain, "mae": ["train.steps=9"]})
    assert setting(longer, tuned, False) != setting(plan, tuned, False)
    assert setting(longer, scratch, False) == setting(plan, scratch, False)
    plateau = changed(plateau_steps=99)
    assert setting(plateau, long, False) != setting(plan, long, False)
    assert setting(plateau, tuned, False) == setting(plan, tuned, False)
    rate = changed(finetune={**task.finetune, "learning_rate": 0.1})
    assert setting(rate, tuned, False) != setting(plan, tuned, False)
    assert pretraining(rate, tuned, False) == pretraining(plan, tuned, False)  # the same weights
    assert setting(plan, tuned, True) != setting(plan, tuned, False)
    assert setting(plan, scratch, True) == setting(plan, scratch, False)


def test_the_initial_network_is_of_the_seed_that_pretraining_has(bench: Bench) -> None:
    initial, scratch = (Job("finetune", "made", arm, 1, 0) for arm in (INITIAL, SCRATCH))
    assert setting(bench.plan, initial, False) == setting(bench.plan, scratch, False)
    other = replace(bench.plan, pretrain=[*bench.plan.pretrain, "seed=1"])
    assert setting(other, initial, False) != setting(bench.plan, initial, False)
    assert setting(other, scratch, False) == setting(bench.plan, scratch, False)


def test_what_has_its_line_is_not_run_again_and_what_fails_takes_what_needs_it_along(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun.txt"

    def command(bench: Bench, job: Job, result: Path) -> list[str]:
        begun.open("a").write(f"{job}\n")
        if job.kind == "pretrain":
            if job.arm == "pcl":
                return [sys.executable, "-c", "print('no volume can be read'); raise SystemExit(3)"]
            save_weights(bench.weights(job), {}, {"format": 1, "backbone": {}, "step": 2})
            return [sys.executable, "-c", ""]
        text = json.dumps({**vars(job), "dice": {"mean": 0.5}})
        return [sys.executable, "-c", f"open({str(result)!r}, 'w').write({text!r})"]

    monkeypatch.setattr(Bench, "command", command)
    jobs = list(bench.plan.jobs())
    failed = run(bench, jobs[:6], hours=1)
    assert [str(job) for job in failed] == ["made: pretrain pcl"]
    assert "made: pretrain pcl: failed with exit code 3: no volume can be read" in capsys.readouterr().err
    first = begun.read_text(encoding="utf-8").splitlines()
    assert not any("finetune pcl" in each for each in first)
    assert sum("finetune" in each for each in first) == 3  # scratch, the initial network, mae
    run(bench, jobs, hours=1)
    second = begun.read_text(encoding="utf-8").splitlines()[len(first) :]
    assert not set(second) & set(first) - {"made: pretrain pcl"}
    assert {tuple(each[key] for key in ("kind", "arm", "labels")) for each in label_results.read([bench.file])} == {
        ("finetune", SCRATCH, 2), ("finetune", INITIAL, 2), ("finetune", "mae", 2),
        ("finetune", SCRATCH, 1), ("finetune", INITIAL, 1), ("finetune", "mae", 1),
        ("probe", SCRATCH, 0), ("probe", "mae", 0), ("finetune", PLATEAU, 1),
    }  # fmt: skip


def test_a_pretraining_that_was_cut_off_is_not_done(bench: Bench) -> None:
    job = Job("pretrain", "made", "mae")
    assert not bench.is_done(job, set())
    for step in (1, 2):
        save_weights(bench.weights(job), {}, {"format": 1, "backbone": {}, "step": step})
        assert bench.is_done(job, set()) == (step == 2)


def test_nothing_begins_after_the_time_and_nothing_beside_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "command", lambda *_: pytest.fail("a run began"))
    assert run(bench, list(bench.plan.jobs()), hours=-1) == []
    with label_efficiency._alone(bench.into), pytest.raises(UserError, match="in use by another run"):
        run(bench, list(bench.plan.jobs()), hours=1)


def test_the_same_image_on_both_sides_of_the_split_is_refused(tiny_store: Path, bench: Bench) -> None:
    store, task = Store(tiny_store), bench.plan.tasks["made"]
    check_task(task, store)
    kept, aside = held_aside(store.cases, count=2)
    store.cases = [replace(case, sha256=kept[0].sha256) if case.id == aside[0].id else case for case in store.cases]
    with pytest.raises(UserError, match=f"the test case {aside[0].id} holds the same image as {kept[0].id}"):
        check_task(task, store)


def test_labels_that_are_not_the_plans_are_refused(tiny_store: Path, bench: Bench) -> None:
    task: Task = replace(bench.plan.tasks["made"], classes={1: "bright", 2: "dark"})
    with pytest.raises(UserError, match=r"the plan names the classes \[1, 2\], the labels hold \[1\]"):
        check_task(task, Store(tiny_store))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "expected the keys"),
        ({"tasks": {"made": {"data": "raw"}}}, "tasks.made: expected the keys"),
        ({"tasks": {"made": {**SMALL["tasks"]["made"], "pretrain": {}}}}, "tasks.made.pretrain: names no method"),
        ({"backbone": ["backbone.featurs=[4]"]}, "featurs"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_before_anything_runs(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {key: value for key, value in {**SMALL, **change}.items() if value is not None}
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        read_plan(file)


def test_tables_compare_seed_by_seed_and_case_by_case(tmp_path: Path) -> None:
    lines = [line(SCRATCH, 2, seed, [0.5, 0.6]) for seed in range(3)]
    lines += [line("cover", 2, seed, [0.6 - 0.3 * (seed == 1), 0.7]) for seed in range(2)]
    lines += [line("mae", 2, 0, [0.5, 0.5])]
    lines += [line("mae", 2, seed, [0.55, 0.65]) for seed in range(2)]  # repeated: the last counts
    lines += [line(PLATEAU, 2, 0, [0.7, 0.7])]
    lines += [line(INITIAL, 2, seed, [0.5, 0.7]) for seed in range(2)]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [{"op": "another benchmark"}, *lines]))
    text = label_results.tables(label_results.read([file]))
    rows = {row.split(" | ")[1]: row for row in text.splitlines() if row.startswith("| 2 ")}
    assert list(rows) == [SCRATCH, PLATEAU, INITIAL, "mae", "cover"]
    # The third seed is scratch's alone, and counts for none.
    assert rows[SCRATCH].startswith("| 2 | scratch | 2 | 0.550 ± 0.000 |  |  | -0.150 (-0.200 to -0.100) |")
    to_scratch, to_plateau = "+0.025 (-0.200 to +0.100) | 1 of 2, 1 of 2", "-0.050 (-0.100 to +0.000)"
    assert f"| 2 | 0.575 ± 0.106 | {to_scratch} | {to_plateau} | -0.025 (-0.200 to +0.100) |" in rows["cover"]
    to_plateau, to_initial = "-0.100 (-0.150 to -0.050)", "+0.000 (-0.050 to +0.050)"
    assert rows["mae"].endswith(f"(+0.050 to +0.050) | 2 of 2, 2 of 2 | {to_plateau} | {to_initial} |  | 1: 0.60 |")
    assert "| 1 | 0.700 | +0.150 (+0.100 to +0.200) | 2 of 2, 1 of 1 |" in rows[PLATEAU]
    assert "all classes as one" not in text
    for each in lines:
        if each["arm"] != "cover" or each["seed"]:  # one run has none
            for case in each["cases"]:
                case["foreground"] = 0.9 if each["arm"] == "mae" else 0.7 + 0.1 * each["seed"]
    rows = [row.split(" | ") for row in label_results.tables(lines).splitlines() if row.startswith("| 2 ")]
    same = "+0.000 (+0.000 to +0.000)"
    assert [row[-3:] for row in rows] == [
        ["0.750 ± 0.071", "", f"{same} |"],
        ["0.700", same, f"{same} |"],
        ["0.750 ± 0.071", same, " |"],
        ["0.900 ± 0.000", "+0.150 (+0.100 to +0.200)", "+0.150 (+0.100 to +0.200) |"],
        ["", "", " |"],
    ]
    label_results.plot(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_lines_of_several_pretrainings_of_an_arm_are_told() -> None:
    lines = [line("mae", 2, seed, [0.5], weights_sha256=f"{seed}", commit="a") for seed in range(2)]
    lines += [line(SCRATCH, 2, seed, [0.5], weights_sha256=f"{seed}", commit="a") for seed in range(2)]
    assert "a machine, WEIGHTS OF SEVERAL PRETRAININGS: mae;" in label_results.tables(lines)
    for each in lines:
        each |= {"weights_sha256": "0", "commit": each["arm"]}
    assert "a machine, commits mae, scratch;" in label_results.tables(lines)


def test_few_labels_together_are_of_the_seeds_that_have_all_of_them() -> None:
    lines = [line(SCRATCH, labels, seed, [0.5, 0.6]) for labels in (2, 8, 16) for seed in range(3)]
    lines += [line("cover", 2, seed, [0.6, 0.6]) for seed in range(3)]
    lines += [line("cover", 8, seed, [0.5 + 0.1 * seed, 0.8]) for seed in range(2)]
    lines += [line("cover", 16, seed, [0.0, 0.0]) for seed in range(3)]  # many: not of this table
    lines += [line("mae", 2, 0, [0.9, 0.9])]
    rows = [row for row in label_results.tables(lines).splitlines() if row.startswith("| 2 + 8 |")]
    # (0.1 + 0)/2 and (0 + 0.2)/2 of the first seed, (0.1 + 0.1)/2 and (0 + 0.2)/2 of the second
    # and no empty columns.
    assert rows == ["| 2 + 8 | cover | 2 | +0.087 (+0.050 to +0.100) | 2 of 2, 2 of 2 |"]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(line(SCRATCH, 2, 0, [0.5])) + "\n" + '{"kind": "finet')
    assert len(label_results.read([file])) == 1
    assert "line 2: cut off, passed over" in capsys.readouterr().err
    append([line(SCRATCH, 2, 1, [0.5])], file)
    assert [each["seed"] for each in label_results.read([file])] == [0, 1]


def test_lines_of_another_plan_and_other_views_of_the_test_cases_are_not_mixed(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job("finetune", "made", "mae", 2, 0)
    mine = line("mae", 2, 0, [0.5, 0.7], setting=setting(bench.plan, job, False))
    seen = line("mae", 2, 0, [0.9, 0.9], setting=setting(bench.plan, job, True), transductive=True)
    scratch = line(SCRATCH, 2, 0, [0.4, 0.6], setting=setting(bench.plan, Job("finetune", "made", SCRATCH, 2, 0), True))
    lines = label_results.of_plan([mine, seen, scratch, line("mae", 1, 0, [0.1, 0.1])], bench.plan)
    assert "1 lines of other settings than the plan's are left out" in capsys.readouterr().err
    first, second = label_results.tables(lines).split("### made")[1:]
    assert "held aside" in first
    assert "+0.100" in first
    assert "their images were pretrained on" in second
    assert "+0.400" in second  # beside the same scratch


def test_a_coarse_map_is_read_where_its_convolutions_are_centred() -> None:
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
    whole = at_every_voxel(ramp, 2)
    assert whole.shape == (1, 1, 8, 4, 4)
    assert whole[0, 0, :, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


def test_the_nearest_features_are_found_whatever_their_scale_and_offset() -> None:
    moving = torch.randn(12, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    moving = moving * torch.logspace(-3, 3, 12)[:, None, None, None] + 100
    fixed = moving.roll((1, 2), dims=(1, 3))
    places = torch.tensor([[1.0, 0.0, 2.0], [3.0, 4.0, 5.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 3.0]])
    assert torch.equal(match(fixed, moving, places), expected)


@pytest.mark.slow
def test_a_small_plan_runs_from_raw_volumes_to_its_tables(tiny_store: Path, plan_file: Path, tmp_path: Path) -> None:
    words = ["--data", str(tiny_store.parent), "--into", str(tmp_path / "into"), "--plan", str(plan_file)]
    command = [sys.executable, "-m", "voxtrast.benchmarks.label_efficiency", *words, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    lines = label_results.read([tmp_path / "into" / "results.jsonl"])
    assert len(lines) == 2 * 4 + 3 + 1
    found = {(each["kind"], each["arm"], each["labels"]): each for each in lines}
    tests = {tuple(case["case"] for case in each["cases"]) for each in lines if each["kind"] == "finetune"}
    assert len(tests) == 1
    assert found["finetune", PLATEAU, 1]["steps"] == 3
    assert found["finetune", "mae", 1]["pretraining"]["steps"] == 2
    assert found["finetune", "pcl", 1]["pretraining"]["untrained"] > 0
    assert "pretraining" not in found["finetune", SCRATCH, 1]
    assert str(tmp_path) not in (tmp_path / "into" / "results.jsonl").read_text(encoding="utf-8")
    assert 0 <= found["probe", "mae", 0]["correspondence"]["encoder"]["right"] <= 1
    assert found["probe", "mae", 0]["linear"]["encoder"]["dice"]["mean"] > 0
    assert "### made" in done.stdout
    again = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    assert "14 of 14 runs are done" in again.stderr
    assert label_results.read([tmp_path / "into" / "results.jsonl"]) == lines


def test_the_package_holds_the_plan() -> None:
    from importlib import resources

    assert (resources.files("voxtrast.benchmarks") / PLAN).is_file()
