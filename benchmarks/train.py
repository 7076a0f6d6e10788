"""The training step of a recipe by its parts, with our operators and with their torch references.

voxtrast bench train cover-3d data=STORE [train.global_batch=1] [--steps N] [--synthetic] [--output FILE]

Both forms start from the same weights, see the same batches and take turns (A B A B), so that a machine that slows down
slows both; their losses are compared step by step. Encoder and decoder are what runs inside the backbone's `encode` and
`decode`; in backward a part begins where the gradient of its last map is whole. What is left belongs to the losses, a
momentum encoder among it. The wait for data is what is left of the loader's work while a step runs; with `--synthetic`
one batch is drawn, kept and repeated, so that nothing waits. Memory is what one more step holds at most beyond what is
held before it. With stages, the step measured is one of the last stage. What several ranks say to each other is part of
`voxtrast bench scaling`.
"""

import argparse
import contextlib
import copy
import inspect
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxtrast import kernels
from voxtrast.engine.config import Config, load_config
from voxtrast.engine.data.pipeline import ViewPipeline
from voxtrast.engine.errors import UserError
from voxtrast.engine.optimizers import build_optimizer
from voxtrast.engine.precision import autocast
from voxtrast.engine.runs import build_method, open_cases
from voxtrast.methods import Batch, Method

from .harness import append
from .machine import machine, results_file
from .place import Place, choose_place

PARTS = (
    "data",
    "encoder forward",
    "decoder forward",
    "losses forward",
    "losses backward",
    "decoder backward",
    "encoder backward",
    "optimizer",
    "adversary",
)
FORMS = ("ours", "references")


class Clock:
    """Seconds in each part; one part runs at a time."""

    parts: tuple[str, ...] = PARTS

    def __init__(self, place: Place) -> None:
        self.place = place
        self.seconds = dict.fromkeys(self.parts, 0.0)
        self._running = self.parts[0]
        self._since = 0.0

    def start(self, part: str) -> None:
        """A step, with its first part."""
        self.seconds = dict.fromkeys(self.parts, 0.0)
        self._running, self._since = part, self._now()

    def enter(self, part: str | None) -> str:
        """From here on `part` runs; says which one did. None for the end of the step."""
        now = self._now()
        self.seconds[self._running] += now - self._since
        before, self._running, self._since = self._running, part or self._running, now
        return before

    def _now(self) -> float:
        if self.place.on_gpu:
            torch.cuda.synchronize(self.place.device)
        return time.perf_counter()


def watch(method: Method, clock: Clock) -> None:
    """Has the clock told where the step passes from part to part."""
    backbone: Any = method.backbone

    def timed(part: str, work: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def begin_backward(_: Tensor) -> None:
            clock.enter(f"{part} backward")

        def run(*arguments: Any, **options: Any) -> list[Tensor]:
            before = clock.enter(f"{part} forward")
            maps = work(*arguments, **options)
            # A gradient is whole when its producer's turn comes: all that was built on the map has had its own.
            if maps[-1].requires_grad:
                maps[-1].register_hook(begin_backward)
            clock.enter(before)
            return maps

        return run

    backbone.encode = timed("encoder", backbone.encode)
    backbone.decode = timed("decoder", backbone.decode)


def reference_of(name: str) -> Callable[..., Tensor]:
    """The reference of an operator, to be called as that is: references know no ranks."""
    reference: Callable[..., Tensor] = getattr(kernels, f"{name}_reference")
    if "group" not in inspect.signature(getattr(kernels, name)).parameters:
        return reference

    def alone(*arguments: Any, group: None = None, **options: Any) -> Tensor:
        if group is not None:
            raise ValueError("group: the references are measured in one process")
        return reference(*arguments, **options)

    return alone


@contextlib.contextmanager
def references_in(module: Any) -> Iterator[None]:
    """The fused operators that a module has imported, replaced by their torch references."""
    found = [
        name
        for name in kernels.__all__
        if hasattr(kernels, f"{name}_reference") and getattr(module, name, None) is getattr(kernels, name)
    ]
    try:
        for name in found:
            setattr(module, name, reference_of(name))
        yield
    finally:
        for name in found:
            setattr(module, name, getattr(kernels, name))


@contextlib.contextmanager
def references_in_methods() -> Iterator[None]:
    """The same in every module of the methods: some losses are in a part that several share."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("voxtrast.methods."):
                stack.enter_context(references_in(module))
        yield


class Form:
    """One copy of a method with its optimizer."""

    def __init__(self, name: str, method: Method, config: Config, place: Place) -> None:
        self.name, self.method, self.config, self.place = name, method.to(place.device), config, place
        self.clock = Clock(place)
        watch(self.method, self.clock)
        groups = self.method.parameter_groups(config.optimizer.weight_decay)
        self.optimizer = build_optimizer(groups, config.optimizer)
        self.parts = [part for part in PARTS if part != "adversary" or method.adversary is not None]
        if self.method.adversary is not None:
            self.critic_scaler = self._scaler()
            critic, chosen = self.method.adversary.to(place.device), config.adversary_optimizer
            self.critic_optimizer = build_optimizer([{"params": list(critic.parameters())}], chosen)
        self.scaler = self._scaler()
        self.memory_mb = 0.0
        self.losses: list[float] = []
        self.taken: list[dict[str, float]] = []

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.place.device.type, enabled=self.config.train.autocast == "float16")

    def autocast(self) -> Any:
        return autocast(self.config.train.autocast, self.place.device)

    def step(self, batch: Batch, number: int, waited: float) -> None:
        batch = dict(batch)  # a method may add to it
        with references_in_methods() if self.name == "references" else contextlib.nullcontext():
            self.clock.start("losses forward")
            with self.autocast():
                self.method.exchange([batch], number)
                losses = self.method(batch, number)
            total = torch.stack(list(losses.values())).sum()
            self.clock.enter("losses backward")
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(total).backward()
            self.clock.enter("optimizer")
            if self.config.optimizer.gradient_clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optimizer.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.method.adversary is not None and "adversarial" in self.method.weights(number):
                self.clock.enter("adversary")
                self.critic_optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    critic_losses = self.method.adversary(*self.method.adversary_inputs(batch))
                self.critic_scaler.scale(torch.stack(list(critic_losses.values())).sum()).backward()
                self.critic_scaler.step(self.critic_optimizer)
                self.critic_scaler.update()
                self.clock.enter("optimizer")
            self.method.after_step(number)
            self.clock.enter(None)
        self.losses.append(total.item())
        self.taken.append({**self.clock.seconds, "data": waited})

    def step_aside(self, batch: Batch, number: int) -> None:
        """One more step, which counts nowhere."""
        self.step(batch, number, 0.0)
        self.losses.pop()
        self.taken.pop()

    def median(self, part: str) -> float:
        return statistics.median(taken[part] for taken in self.taken[1:])  # the first step warms up

    def share_of_waiting(self) -> float:
        """Of the time of all steps but the first."""
        taken = self.taken[1:]
        return sum(each["data"] for each in taken) / sum(sum(each.values()) for each in taken)

    def shares(self) -> dict[str, float]:
        """Of each part in the time of all steps but the first."""
        spent = {part: sum(each[part] for each in self.taken[1:]) for part in self.parts}
        return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}

    def whole(self) -> float:
        """Of the step without the wait for data."""
        return statistics.median(sum(taken.values()) - taken["data"] for taken in self.taken[1:])


def operator_seconds(form: Form, batch: Batch, number: int) -> dict[str, float]:
    """Of one more step: seconds inside each of our operators, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        form.step_aside(batch, number)
    return {
        event.key.removeprefix("voxtrast::"): event.cpu_time_total / 1e6  # forward has all in a child
        for event in profile.key_averages()
        if event.key.startswith("voxtrast::")
    }


def measure(
    config: Config, steps: int, place: Place, names: Sequence[str] = FORMS, synthetic: bool = False
) -> tuple[list[Form], dict[str, float], list[float]]:
    """The forms after `steps` steps each, where there are two the seconds in our operators, and the relative difference
    of their losses at each step."""
    method = build_method(config)
    if not hasattr(method, "backbone"):
        raise UserError(f"{config.recipe}: its method has no backbone to tell parts of")
    forms = [Form(name, copy.deepcopy(method), config, place) for name in names]
    store, cases, _, _ = open_cases(config)
    device_id = place.device.index if place.on_gpu else None
    loader = {"threads": config.loader.threads, "prefetch": config.loader.prefetch, "device_id": device_id}
    first = method.schedule.moments[-1].first
    batch_size = method.schedule.batch(first, config.train.global_batch)
    options: dict[str, Any] = {"seed": config.seed, "global_batch": batch_size, "start_step": first, **loader}
    options["sampling"] = config.sampling
    with ViewPipeline(store, cases, method.views, **options) as views:
        batches: Iterator[list[Batch]] = itertools.repeat(next(iter(views))) if synthetic else iter(views)
        for number in range(first, first + steps + 1):
            for turn, form in enumerate(forms):
                began = time.perf_counter()
                if turn == 0:
                    (batch,) = next(batches)
                    waited = time.perf_counter() - began
                form.step(batch, number, waited)
    for form in forms if len(forms) > 1 else ():
        form.memory_mb = place.peak_beyond_mb(lambda form=form: form.step_aside(batch, number + 1))  # type: ignore[misc]
    losses = zip(forms[0].losses, forms[-1].losses, strict=True)
    differences = [abs(a - b) / abs(b) for a, b in losses]
    inside = {} if place.on_gpu or len(forms) == 1 else operator_seconds(forms[0], batch, number + 2)
    return forms, inside, differences


def report(forms: list[Form], inside: dict[str, float], differences: list[float]) -> str:
    ours, other = forms
    rows = [f"{'':<22}" + "".join(f"{form.name:>14}" for form in forms) + f"{'ratio':>10}{'share':>8}"]
    shares = ours.shares()
    for part in ours.parts:
        one, two = ours.median(part), other.median(part)
        ratio = f"{two / one:.2f}x" if one > 1e-6 else ""
        rows.append(f"{part:<22}{one:>12.3f} s{two:>12.3f} s{ratio:>10}{shares[part]:>8.1%}")
    one, two = ours.whole(), other.whole()
    rows.append(f"{'step without data':<22}{one:>12.3f} s{two:>12.3f} s{two / one:>9.2f}x")
    one, two = ours.memory_mb, other.memory_mb
    rows.append(f"{'memory of a step':<22}{one:>11.0f} MB{two:>11.0f} MB{two / one if one else 0:>9.2f}x")
    rows += [f"  {name:<32}{seconds:>10.3f} s" for name, seconds in sorted(inside.items(), key=lambda item: -item[1])]
    # From the second step on Adam makes whole steps of what is rounding alone in small gradients.
    rows.append(
        f"difference of the losses: {differences[0]:.1e} at the first step, at most {max(differences):.1e} in the "
        f"{len(differences)} steps"
    )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="voxtrast bench train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="cover-3d", help="a recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="data=STORE train.global_batch=1 ...")
    parser.add_argument("--steps", type=int, default=20, help="after one that warms up (default: 20)")
    parser.add_argument("--synthetic", action="store_true", help="one batch again and again")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append JSON lines to FILE or FOLDER/DEVICE.jsonl")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps: expected at least 1, got {chosen.steps}")
    try:
        place = choose_place(chosen.device, "float32")
        config = load_config(chosen.recipe, chosen.settings)
        if not config.data:
            raise UserError("data: not given; say data=STORE")
        forms, inside, differences = measure(config, chosen.steps, place, synthetic=chosen.synthetic)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = machine(place)
    schedule = forms[0].method.schedule
    batch = schedule.batch(schedule.steps, config.train.global_batch)
    print(about["device"], config.recipe, "batch", batch, "crop", list(config.views.crop))
    print(report(forms, inside, differences))
    if chosen.output:
        shape = {"batch": batch, "crop": list(config.views.crop)}
        lines = [
            {**about, "op": f"step of {config.recipe}", "shape": shape, "provider": form.name, "steps": chosen.steps,
             "median_s": form.whole(), "parts_s": {part: form.median(part) for part in form.parts},
             "shares": form.shares(), "memory_mb": form.memory_mb, "synthetic": chosen.synthetic,
             "precision": config.train.autocast,
             "first_loss_difference": differences[0], "loss_difference": max(differences),
             **({"operators_s": inside} if form is forms[0] else {})}
            for form in forms
        ]  # fmt: skip
        append(lines, results_file(chosen.output, about["device"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
