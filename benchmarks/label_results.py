"""Tables and plots from the lines of the label-efficiency benchmark."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxtrast.engine.downstream.table import paired_difference
from voxtrast.engine.errors import UserError

from .label_plan import INITIAL, PLATEAU, SCRATCH, UNTRAINED, Plan, setting
from .voxel_probes import PARTS, RIGHT_VOXELS

Line = dict[str, Any]
KEY = ("kind", "task", "arm", "labels", "seed", "setting")  # what makes two lines the same run
BASELINES = (SCRATCH, PLATEAU, INITIAL, "mae")  # that the others are compared with
TUNED = ("labels", "arm", "seeds", "Dice", "difference to scratch", "better cases, seeds", "difference to its plateau",
         "difference to initial network", "difference to MAE", "classes",
         "all classes as one", "its difference to scratch", "its difference to initial network")  # fmt: skip
FEW = 8  # labels at most: what pretraining is for; differences are told for all such numbers together as well
TOGETHER = ("labels together", "arm", "seeds", "difference to scratch", "better cases, seeds",
            "difference to initial network", "difference to MAE")  # fmt: skip
PROBED = ("arm", "seeds", "linear, encoder", "linear, all maps", "matches, encoder", "matches, all maps")
COST = ("arm", "steps", "samples", "pretraining, min", "tensors not reached")


def read(files: Iterable[Path]) -> list[Line]:
    """The lines of the benchmark in these files; other lines are passed over, and those that were cut off. A run that
    is there twice counts once, the last time.

    Raises: UserError for a missing file.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for file in files:
        try:
            texts = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}); expected the lines of this benchmark"
            ) from None
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # of a run that was cut off while it wrote: it is made again
                print(f"{file}, line {number}: cut off, passed over", file=sys.stderr)
                continue
            if line.get("kind") in ("finetune", "probe"):
                found[tuple(line[name] for name in KEY)] = line
    return list(found.values())


def of_plan(lines: Sequence[Line], plan: Plan) -> list[Line]:
    """Those that were made under the plan as it is now; how many were not is said."""
    keys = {
        (job.kind, job.task, job.arm, job.labels, job.seed, setting(plan, job, transductive))
        for job in plan.jobs()
        for transductive in (False, True)
    }
    kept = [line for line in lines if tuple(line[name] for name in KEY) in keys]
    if len(kept) < len(lines):
        print(f"{len(lines) - len(kept)} lines of other settings than the plan's are left out", file=sys.stderr)
    return kept


def _seen(lines: Sequence[Line], transductive: bool) -> list[Line]:
    """Arms whose pretraining saw the test images, or not; those without pretraining are of both."""
    mine = [line for line in lines if line["arm"] not in UNTRAINED and line["transductive"] == transductive]
    if transductive and not mine:
        return []
    return [line for line in lines if line["arm"] in UNTRAINED] + mine


def tables(lines: Sequence[Line]) -> str:
    """Markdown: for each task Dice by number of labels and arm, what frozen features say, what pretraining took."""
    if not lines:
        return "no results yet"
    parts = []
    for task in dict.fromkeys(line["task"] for line in lines):
        for transductive in (False, True):
            mine = _seen([line for line in lines if line["task"] == task], transductive)
            if mine:
                seen = "their images were pretrained on" if transductive else "held aside from pretraining"
                parts.append(f"### {task}\n\n{_about(mine)}; test cases: {seen}.")
                parts += [_markdown(head, rows) for head, rows in _sections(mine) if rows]
    return "\n\n".join(parts) + "\n"


def _sections(lines: Sequence[Line]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    return [
        (TUNED, _tuned_rows(lines)),
        (TOGETHER, _together_rows(lines)),
        (PROBED, _probed_rows(lines)),
        (COST, _cost_rows(lines)),
    ]


def _about(lines: Sequence[Line]) -> str:
    tuned = [line for line in lines if line["kind"] == "finetune"]
    if not tuned:
        return "no fine-tuning yet"
    first = tuned[0]
    steps = sorted({line["steps"] for line in tuned})
    hours = sum(line["seconds"] for line in tuned) / 3600
    crop = "x".join(map(str, first["crop"]))
    rates = " or ".join(f"{rate:g}" for rate in sorted({line["learning_rate"] for line in tuned}))
    return (
        f"{len(first['cases'])} test cases, {' or '.join(map(str, steps))} steps of {first['batch']} crops {crop}, "
        f"learning rate {rates}, {len(tuned)} fine-tunings of {hours:.1f} h in all, "
        f"{', '.join(dict.fromkeys(x['device'] for x in tuned))}{_mixed(tuned)}"
    )


def _mixed(tuned: Sequence[Line]) -> str:
    """What lines of one setting may still differ in, if they do."""
    commits = sorted({line["commit"] for line in tuned if line.get("commit")})
    weights: dict[str, set[str]] = {}
    for line in tuned:
        if line["arm"] not in UNTRAINED and "weights_sha256" in line:
            weights.setdefault(line["arm"], set()).add(line["weights_sha256"])
    several = [arm for arm, found in weights.items() if len(found) > 1]
    return "".join(
        [f", commits {', '.join(commits)}" if len(commits) > 1 else "",
         f", WEIGHTS OF SEVERAL PRETRAININGS: {', '.join(several)}" if several else ""]
    )  # fmt: skip


def runs_of(lines: Sequence[Line], labels: int, arm: str) -> dict[int, Line]:
    """Fine-tunings by seed."""
    return {
        line["seed"]: line
        for line in lines
        if line["kind"] == "finetune" and line["labels"] == labels and line["arm"] == arm
    }


def compared_runs(lines: Sequence[Line], labels: int) -> dict[str, dict[int, Line]]:
    """Fine-tunings by arm and seed, of the seeds that every arm has: another seed is another draw of the cases.

    Scratch to its plateau is trained for some numbers of labels alone, and last: the others do not wait for it.
    """
    every = {arm: runs_of(lines, labels, arm) for arm in arms_of(lines)}
    there = [set(runs) for arm, runs in every.items() if runs and arm != PLATEAU]
    seeds = sorted(set.intersection(*there)) if there else []
    shared = {arm: {seed: runs[seed] for seed in seeds if seed in runs} for arm, runs in every.items()}
    return {arm: runs for arm, runs in shared.items() if runs}


def arms_of(lines: Sequence[Line]) -> list[str]:
    """Those that nobody pretrained, the masked autoencoder, then the methods by name."""
    order = [*UNTRAINED, "mae"]
    return sorted({line["arm"] for line in lines}, key=lambda arm: (order.index(arm) if arm in order else 9, arm))


def _tuned_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for labels in sorted({line["labels"] for line in lines if line["kind"] == "finetune"}):
        every = compared_runs(lines, labels)
        as_one = _as_one(every)
        for arm, runs in every.items():
            means = [run["dice"]["mean"] for run in runs.values()]
            names = next(iter(runs.values()))["dice"]["classes"]
            classes = {key: _mean(run["dice"]["classes"][key] for run in runs.values()) for key in names}
            scratch, plateau, initial, mae = (_difference(arm, base, every) for base in BASELINES)
            rows.append(
                (
                    str(labels),
                    arm,
                    str(len(runs)),
                    _mean_and_spread(means),
                    *scratch,
                    plateau[0],
                    initial[0],
                    mae[0],
                    ", ".join(f"{key}: {value:.2f}" for key, value in classes.items() if value is not None),
                    *_as_one_cells(arm, as_one),
                )
            )
    return rows


def _as_one(every: dict[str, dict[int, Line]]) -> dict[str, dict[int, Line]]:
    """The same runs with the Dice of all classes taken as one; of arms that have it in every run, which older lines
    and tasks of one class do not."""

    def lean(run: Line) -> Line:
        return {"cases": [{"case": case["case"], "mean": case["foreground"]} for case in run["cases"]]}

    return {
        arm: {seed: lean(run) for seed, run in runs.items()}
        for arm, runs in every.items()
        if all("foreground" in case for run in runs.values() for case in run["cases"])
    }


def _as_one_cells(arm: str, as_one: dict[str, dict[int, Line]]) -> tuple[str, ...]:
    if arm not in as_one:
        return "", "", ""
    means = [_mean_of(run) for run in as_one[arm].values()]
    return _mean_and_spread(means), *(_difference(arm, base, as_one)[0] for base in (SCRATCH, INITIAL))


def _together_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Differences averaged over the small numbers of labels, of the seeds that every arm has for all of them."""
    counts = sorted({line["labels"] for line in lines if line["kind"] == "finetune" and line["labels"] <= FEW})
    if len(counts) < 2:
        return []
    arms = [arm for arm in arms_of(lines) if arm != PLATEAU]
    every = {arm: _averaged([runs_of(lines, labels, arm) for labels in counts]) for arm in arms}
    every = {arm: runs for arm, runs in every.items() if runs}
    seeds = sorted(set.intersection(*map(set, every.values()))) if every else []
    every = {arm: {seed: runs[seed] for seed in seeds} for arm, runs in every.items()}
    rows: list[tuple[str, ...]] = []
    for arm, runs in every.items():
        scratch, _, initial, mae = (_difference(arm, base, every) for base in BASELINES)
        if scratch[0] or mae[0]:
            rows.append((" + ".join(map(str, counts)), arm, str(len(runs)), *scratch, initial[0], mae[0]))
    return rows


def _averaged(runs: Sequence[dict[int, Line]]) -> dict[int, Line]:
    """By seed, the cases of several runs in one, each with its mean Dice over the runs."""
    found: dict[int, Line] = {}
    for seed in sorted(set.intersection(*map(set, runs))):
        cases = [{case["case"]: case["mean"] for case in each[seed]["cases"]} for each in runs]
        found[seed] = {"cases": [{"case": name, "mean": _mean(case[name] for case in cases)} for name in cases[0]]}
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    """Of what is there: a class that no test case has got no number."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _difference(arm: str, base: str, every: dict[str, dict[int, Line]]) -> tuple[str, str]:
    """Mean and 95 % interval over seeds and cases, and how many of both are better; of the seeds that both have."""
    runs, others = every[arm], every.get(base, {})
    shared = sorted(set(runs) & set(others)) if arm != base else []
    if not shared:
        return "", ""
    pairs = [(runs[seed], others[seed]) for seed in shared]
    found = paired_difference(pairs)
    better = sum(_mean_of(mine) > _mean_of(theirs) for mine, theirs in pairs)
    of_seeds = f"{better} of {len(pairs)}"
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})", f"{found.better} of {found.cases}, {of_seeds}"


def _mean_of(run: Line) -> float:
    return float(np.mean([case["mean"] for case in run["cases"] if case["mean"] is not None]))


def _probed_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    probed = [line for line in lines if line["kind"] == "probe"]
    for arm in arms_of(probed):
        mine = [line for line in probed if line["arm"] == arm]
        dice = [_mean_and_spread([line["linear"][part]["dice"]["mean"] for line in mine]) for part in PARTS]
        right = [_mean_and_spread([line["correspondence"][part]["right"] for line in mine]) for part in PARTS]
        rows.append((arm, str(len(mine)), *dice, *right))
    if probed:
        chance = [line["correspondence"]["chance"]["right"] for line in probed]
        rows.append(("a place at random", "", "", "", *[_mean_and_spread(chance)] * 2))
    return rows


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _cost_rows(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    told: dict[str, Line] = {line["arm"]: line["pretraining"] for line in lines if "pretraining" in line}
    return [
        (
            arm,
            str(about["steps"]),
            str(about["samples"]),
            f"{about['seconds'] / 60:.1f}",
            str(about["untrained"]),
        )
        for arm, about in ((arm, told[arm]) for arm in arms_of(lines) if arm in told)
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    note = (
        f"\n\nmatches: share of voxels found within {RIGHT_VOXELS:g} voxels in the other view" if head is PROBED else ""
    )
    told = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    lines = list(zip(*told, strict=True))
    lines.insert(1, ("---",) * len(told))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + note


def plot(lines: Sequence[Line], path: Path) -> None:
    """Dice against the number of labels, mean and standard deviation over seeds, a panel a task."""
    from matplotlib.figure import Figure

    tuned = [line for line in _seen(lines, False) if line["kind"] == "finetune"]
    names = list(dict.fromkeys(line["task"] for line in tuned))
    figure = Figure(figsize=(6.5 * max(1, len(names)), 5), layout="constrained")
    every = arms_of(tuned)
    trained = [arm for arm in every if arm not in UNTRAINED]
    for axes, task in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        mine = [line for line in tuned if line["task"] == task]
        counts = sorted({line["labels"] for line in mine})
        compared = {n: compared_runs(mine, n) for n in counts}
        for index, arm in enumerate(every):
            there = [n for n in counts if arm in compared[n]]
            means = [[run["dice"]["mean"] for run in compared[n][arm].values()] for n in there]
            if not there:
                continue
            shift = 2 ** (0.03 * (index - len(every) / 2))  # so that bars do not hide each other
            axes.errorbar(
                [n * shift for n in there], [np.mean(each) for each in means],
                yerr=[np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in means],
                label=f"{arm} ({max(map(len, means))} seeds)",
                color={INITIAL: "grey"}.get(arm, "black" if arm in UNTRAINED else f"C{trained.index(arm)}"),
                linestyle={SCRATCH: "--", PLATEAU: ":", INITIAL: "-."}.get(arm, "-"), marker="o", capsize=2,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xlabel("labelled cases")
        axes.set_ylabel("mean Dice of the test cases")
        axes.set_title(f"{task}, {mine[0]['device']}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
