"""`voxtrast demo`: the whole way on made-up subjects, from raw files to a report, without any data of one's own.

Everything goes into one folder. A second call continues where the first one stopped and does nothing that is done.
"""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .config import differences, load_config, read_config
from .data.demo import CLASS_NAMES, make_cases
from .data.prepare import prepare
from .data.splits import fraction_for
from .data.store import INDEX, Store, file_sha256
from .downstream.finetune import finetune
from .downstream.table import label_table, read_lines
from .errors import UserError
from .export import export
from .report import Phase, Story, write_report
from .signals import run_child
from .weights import RUN_WEIGHTS, load_weights, write_whole

STATE = "demo.json"
CAVEATS = (
    "All subjects here are made from one average brain (MNI152, from nilearn's wheel) by smooth random deformation, "
    "change of contrast, bias field and noise. They differ far less than people do. This page shows that the software "
    "works, end to end; it is a demonstration, not a result.",
    "The labels come from the grey and white matter maps of the same average, deformed alike. To tell grey from white "
    "is close to a threshold on intensity, an easy task that needs little pretraining.",
    "Pretraining took minutes on a dozen small volumes; a real run takes hours to days on hundreds or thousands.",
)


@dataclass(frozen=True)
class DemoSettings:
    """Chosen so that the whole takes less than eight minutes on two cores."""

    seed: int = 0
    cases: int = 16
    held_aside: int = 4  # for validation of pretraining and for the test of fine-tuning
    spacing_mm: float = 4.0
    recipe: str = "cover-tiny"
    pretrain_steps: int = 320
    pretrain_words: tuple[str, ...] = ("views.crop=[32,40,32]", "validation.every=40")
    labels: int = 2
    finetune_seeds: int = 2
    finetune_steps: int = 60
    finetune_crop: tuple[int, int, int] = (32, 40, 32)


def run_demo(output: Path = Path("runs/demo"), *, fresh: bool = False, settings: DemoSettings | None = None) -> Path:
    """Makes cases, prepares, pretrains, fine-tunes both arms, exports, and writes OUTPUT/report.html.

    Args:
        output: folder for everything.
        fresh: remove an earlier demo in `output` first.
        settings: sizes; the default takes minutes on two cores.

    Returns: the report.
    Raises: UserError where `output` holds something else, or a step cannot be done.
    """
    return _Demo(Path(output), settings or DemoSettings(), fresh).run()


class _Demo:
    def __init__(self, output: Path, settings: DemoSettings, fresh: bool) -> None:
        self.output, self.settings = output, settings
        self.raw, self.store, self.pretrained = output / "raw", output / "store", output / "pretrain"
        self.console = Console(soft_wrap=True, highlight=False, markup=False)
        self.phases: list[Phase] = []
        self.exports: list[str] = []
        self._open(fresh)

    def run(self) -> Path:
        self.console.print(
            f"voxtrast demo in {self.output}: its subjects are made from one average brain; a "
            "demonstration, not a result"
        )
        names = {
            "cases": self._cases,
            "prepare": self._prepare,
            "pretrain": self._pretrain,
            "fine-tune": self._finetune,
            "export": self._export,
        }
        for name, work in names.items():
            self._phase(name, work, len(names) + 1)
        report = self.output / "report.html"
        self._phase("report", lambda: self._report(report), len(names) + 1)
        total = sum(phase.seconds for phase in self.phases)
        self.console.print(f"all: {total:.0f} s, with what earlier calls did; open {report} in a browser")
        return report

    def _open(self, fresh: bool) -> None:
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output}: is a file; name a folder, which the demo makes")
        if fresh and self.output.exists():
            if any(self.output.iterdir()) and not (self.output / STATE).is_file():
                raise UserError(
                    f"{self.output}: not removed, because no demo made it (no {STATE} in it); name another folder"
                )
            for each in self.output.iterdir():  # not the folder itself: it may be a link to another disk
                if each.is_dir() and not each.is_symlink():
                    shutil.rmtree(each)
                else:
                    each.unlink()
        self.state: dict[str, Any] = {"settings": wanted, "phases": {}}
        state = self.output / STATE
        if state.is_file():
            try:
                found = json.loads(state.read_text(encoding="utf-8"))
                earlier, phases = found["settings"], found["phases"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{state}: not readable ({error!r}); start anew with --fresh") from error
            if earlier != wanted:
                changed = [key for key in sorted(wanted | earlier) if wanted.get(key) != earlier.get(key)]
                raise UserError(
                    f"{self.output}: holds a demo with other settings ({', '.join(changed)}); start anew "
                    "with --fresh, or name another folder"
                )
            self.state["phases"] = phases
        elif self.output.exists() and any(self.output.iterdir()):
            raise UserError(f"{self.output}: holds something that no demo made; name another folder")
        self._save_state()

    def _save_state(self) -> None:
        text = json.dumps(self.state, indent=1) + "\n"
        write_whole(self.output / STATE, lambda partial: Path(partial).write_text(text, encoding="utf-8"))

    def _phase(self, name: str, work: Callable[[], tuple[str, bool]], count: int) -> None:
        """Runs one phase; `work` returns what to say and whether there was anything to do."""
        started = time.perf_counter()
        before = self.state["phases"].get(name)
        unfinished = before["seconds"] if before and not before["done"] else 0.0
        try:
            outcome, did = work()
        except BaseException:
            # The call that continues this phase adds its own time.
            spent = unfinished + time.perf_counter() - started
            self.state["phases"][name] = {"seconds": spent, "outcome": "stopped", "done": False}
            self._save_state()
            raise
        seconds = time.perf_counter() - started
        if did or before is None or not before["done"]:
            before = {"seconds": seconds + unfinished, "outcome": outcome, "done": True}
            self.state["phases"][name] = before
            self._save_state()
            said = f"{seconds:.1f} s"
        else:
            said = f"done before, in {before['seconds']:.1f} s"
        self.phases.append(Phase(name, before["seconds"], before["outcome"], earlier=not did))
        self.console.print(f"[{len(self.phases)}/{count}] {name}: {before['outcome']} ({said})")

    def _cases(self) -> tuple[str, bool]:
        wanted = self.settings.cases
        did = make_cases(self.raw, cases=wanted, seed=self.settings.seed)
        return f"{wanted} volumes with grey and white matter labels in {self.raw}", did

    def _prepare(self) -> tuple[str, bool]:
        summary = prepare(
            self.raw, self.store, spacing_mm=self.settings.spacing_mm, modality="mr", progress=sys.stderr.isatty()
        )
        if summary.exit_code:
            raise UserError(
                f"prepare: rejected {summary.rejected} of the demo's own files; see "
                f"{self.store / 'rejected.jsonl'}, or start anew with --fresh"
            )
        cases = len(Store(self.store).cases)
        return (
            f"{cases} volumes reoriented, resampled to {self.settings.spacing_mm:g} mm and normalised, "
            f"{summary.bytes / 1e6:.0f} MB"
        ), summary.prepared > 0

    @property
    def _pretrain_words(self) -> list[str]:
        # Fine-tuning tests on the cases that pretraining holds aside: these very ones.
        fraction = fraction_for(Store(self.store).cases, self.settings.held_aside)
        return [
            self.settings.recipe,
            f"data={self.store}",
            f"output={self.pretrained}",
            f"train.steps={self.settings.pretrain_steps}",
            f"seed={self.settings.seed}",
            f"validation.fraction={fraction:.6f}",
            *self.settings.pretrain_words,
        ]

    def _pretrain(self) -> tuple[str, bool]:
        outcome = f"{self.settings.recipe}, {self.settings.pretrain_steps} steps without any label"
        if self._pretrained():
            return outcome, False
        _run_module("voxtrast.engine.pretrain", self._pretrain_words)
        return outcome, True

    def _pretrained(self) -> bool:
        """Whether the run is whole and was made with these very settings."""
        weights, config = self.pretrained / RUN_WEIGHTS, self.pretrained / "config.yaml"
        if not (weights.is_file() and config.is_file()):
            return False
        recipe, *words = self._pretrain_words
        wanted = load_config(recipe, words)
        wanted.data_sha256 = file_sha256(self.store / INDEX)
        if differences(read_config(config), wanted):
            return False  # pretrain itself says what is different
        return bool(load_weights(weights)[1].get("step") == self.settings.pretrain_steps)

    def _finetune(self) -> tuple[str, bool]:
        wanted, did = self.settings, False
        for seed in range(wanted.finetune_seeds):
            for from_scratch in (False, True):
                if self._finetuned(seed, from_scratch):
                    continue
                finetune(
                    self.pretrained,
                    self.store,
                    labels=wanted.labels,
                    seed=seed,
                    from_scratch=from_scratch,
                    steps=wanted.finetune_steps,
                    crop=wanted.finetune_crop,
                    test_cases=wanted.held_aside,
                    progress=sys.stderr.isatty(),
                )
                did = True
        rows = label_table(read_lines([self.pretrained / "finetune"]))
        dice = ", ".join(f"{row.arm.split(',')[0].replace('scratch', 'from scratch')} {row.dice:.3f}" for row in rows)
        return (
            f"{wanted.labels} labels, {wanted.finetune_steps} steps, {wanted.finetune_seeds} seeds each: "
            f"mean Dice {dice}"
        ), did

    def _finetuned(self, seed: int, from_scratch: bool) -> bool:
        """Whether the line of this very run is there, with its model."""
        results = self.pretrained / "finetune" / "finetune.jsonl"
        if not results.is_file():
            return False
        wanted = {
            "arm": "scratch" if from_scratch else "pretrained",
            "labels": self.settings.labels,
            "seed": seed,
            "steps": self.settings.finetune_steps,
            "crop": list(self.settings.finetune_crop),
            "weights_sha256": file_sha256(self.pretrained / RUN_WEIGHTS),
            "store_sha256": file_sha256(self.store / INDEX),
        }
        return any(
            all(line.get(key) == value for key, value in wanted.items())
            and len(line["cases"]) == self.settings.held_aside
            and Path(line["model"]).is_file()
            for line in read_lines([results])
        )

    def _export(self) -> tuple[str, bool]:
        files = {"nnunet": "nnunet.pth", "safetensors": "network.safetensors"}
        for form, name in files.items():
            target = self.output / "export" / name
            self.exports += [f"voxtrast export {self.pretrained} {target} --to {form}"]
            self.exports += [f"  {line}" for line in export(self.pretrained, form, target, force=True).lines]
        return f"{' and '.join(files)} in {self.output / 'export'}", True

    def _report(self, report: Path) -> tuple[str, bool]:
        wanted = self.settings
        commands = [
            f"voxtrast demo --output {self.output}",
            "",
            "# which does the same as",
            f"voxtrast prepare {self.raw} {self.store} --spacing-mm {wanted.spacing_mm:g} --modality mr",
            f"voxtrast pretrain {' '.join(self._pretrain_words)}",
            f"# and fine-tunes with {wanted.labels} labels, {wanted.finetune_steps} steps of crops "
            f"{wanted.finetune_crop}, seeds 0 to {wanted.finetune_seeds - 1}, from the weights and from scratch",
        ]
        write_report(
            [self.pretrained],
            report,
            force=True,  # the folder is the demo's own
            story=Story(
                title="voxtrast demo",
                commands=commands,
                phases=self.phases,
                caveats=list(CAVEATS),
                class_names=CLASS_NAMES,
                exports=self.exports,
            ),
        )
        return f"{report}, {report.stat().st_size / 1e6:.1f} MB", True


def _run_module(module: str, words: Sequence[str]) -> None:
    """Runs `python -m module words` and waits for it; what it prints goes where ours does.

    Raises: UserError where it fails; SystemExit with its code where it was stopped by a signal.
    """
    code = run_child([sys.executable, "-m", module, *words])  # stopped, the child saves its state and ends by itself
    if code < 0:  # it had no time to say so itself
        print(f"{module}: ended by {signal.Signals(-code).name}; the same command continues", file=sys.stderr)
        raise SystemExit(128 - code)
    if code > 128:
        raise SystemExit(code)
    if code:
        raise UserError(
            f"{module}: ended with code {code}; its message is above. The same command continues, --fresh starts anew"
        )
