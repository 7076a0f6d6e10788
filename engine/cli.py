"""The command line: voxtrast prepare | views | pretrain | launch | doctor | finetune | predict | …"""

import runpy
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError as missing:  # the bare install is the kernels alone
    sys.exit(f"error: {missing.name} is not installed; the command line needs voxtrast[engine]")

from .errors import UserError

app = typer.Typer(
    name="voxtrast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-supervised pretraining of volumetric medical images.",
)


@app.command()
def prepare(
    paths: Annotated[list[Path], typer.Argument(metavar="[RAW] STORE", help="Raw volumes, NIfTI to DICOM; store.")],
    spacing_mm: Annotated[float, typer.Option(help="Voxel size after resampling, all axes.")] = 1.5,
    modality: Annotated[str, typer.Option(help="ct, mr or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    order: Annotated[int, typer.Option(help="Splines of resampling: 3, 1, or 0 for the nearest voxel.")] = 3,
    workers: Annotated[int | None, typer.Option(help="Processes; default one per core.")] = None,
    minimum_size_voxels: Annotated[int, typer.Option(help="Smaller volumes are rejected.")] = 16,
    from_nnssl: Annotated[Path | None, typer.Option(help="nnssl's pretrain_data.json, in place of RAW.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, for resampling.")] = "cpu",
    timeout_s: Annotated[float, typer.Option(help="A volume that takes longer is given up; inf: never.")] = 3600.0,
    memory_limit_gb: Annotated[float | None, typer.Option(help="Of a worker; larger volumes are rejected.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler. Equal bytes need one kind of processor in its cluster."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="i/n: slice i of n, of a job array. Equal bytes need one kind of processor in all."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put the shards of STORE together.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Verify every checksum of STORE.")] = False,
) -> None:
    """Turn raw volumes into a store: reoriented, resampled, normalised. Resumable; a second run does nothing."""
    from .data import prepare as front

    alone = [name for name, given in (("--merge", merge), ("--check", check)) if given]
    if len(alone) > 1 or (alone and from_nnssl):
        raise UserError(f"{alone[0]} goes with STORE alone: leave the other option out")
    wanted = "STORE" if alone else "STORE, the list being RAW" if from_nnssl else "RAW STORE"
    if len(paths) != (1 if alone or from_nnssl else 2):
        given = " ".join(str(path) for path in paths)
        raise UserError(f"prepare {given}: expected {wanted}; `voxtrast prepare --help` shows the options")
    if check:
        problems = front.check(paths[-1], workers=workers)
        print("\n".join(problems) if problems else f"{paths[-1]}: every file is as the index says")
        raise typer.Exit(1 if problems else 0)
    if from_nnssl is not None and from_nnssl.suffix.lower() != ".json":
        raise UserError(f"--from-nnssl {from_nnssl}: expected a .json file: give nnssl's pretrain_data.json")
    if merge:
        summary = front.merge(paths[-1])
    else:
        summary = front.prepare(
            from_nnssl or paths[0], paths[-1], spacing_mm=spacing_mm, modality=modality, dtype=dtype, order=order,
            workers=workers, minimum_size_voxels=minimum_size_voxels, device=device, timeout_s=timeout_s,
            memory_limit_gb=memory_limit_gb, scheduler=scheduler, shard=shard,
        )  # fmt: skip
    print(summary)
    raise typer.Exit(summary.exit_code)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def pretrain(context: typer.Context) -> None:
    """Pretrain: RECIPE data=STORE output=RUN train.steps=N key=value ... (the same words as for the launchers)."""
    from .pretrain import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def launch(context: typer.Context) -> None:
    """Pretrain on several GPUs or machines: [--hostfile H] RECIPE data=STORE output=RUN ... (--help says more)."""
    from .launch import main as run

    raise typer.Exit(run(context.args))


@app.command()
def doctor(
    hostfile: Annotated[Path | None, typer.Option(help="Try ssh and collectives between its hosts.")] = None,
    store: Annotated[Path | None, typer.Option(help="Measure reading from this store.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what compiles or trains.")] = False,
) -> None:
    """Check this installation: versions, devices, kernels, data plane, network, and training on two ranks."""
    from .doctor import examine, print_report

    raise typer.Exit(print_report(examine(hostfile, store, quick=quick), as_json=json_lines))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def views(context: typer.Context) -> None:
    """Draw the views that a recipe makes of a store: RECIPE data=STORE --output views.png (--help says more)."""
    from .views import main as run

    raise typer.Exit(run(context.args))


@app.command()
def finetune(
    weights: Annotated[Path, typer.Argument(help="The folder RUN, or one of its weights files.")],
    store: Annotated[Path, typer.Argument(help="A store with labels.")],
    labels: Annotated[int, typer.Option(help="Number of labelled cases to learn from.")],
    seed: Annotated[int, typer.Option(help="Chooses the cases and everything random.")] = 0,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Same network and budget, no weights.")] = False,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    batch: Annotated[int, typer.Option(help="Crops per step.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the one-cycle schedule.")] = 3e-3,
    crop: Annotated[str | None, typer.Option(help="D,H,W voxels; default the store's median shape.")] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Mirror the axes at random.")] = False,
    autocast: Annotated[str, typer.Option(help="none, or bfloat16: mixed precision in training.")] = "none",
    freeze: Annotated[str, typer.Option(help="none, encoder, or encoder:STEPS for the first steps alone.")] = "none",
    layer_decay: Annotated[float, typer.Option(help="Of the learning rate, layer by layer down to the stem.")] = 1.0,
    head_warmup: Annotated[int, typer.Option(help="Steps that train only what pretraining did not fill.")] = 0,
    overlap: Annotated[float, typer.Option(help="Of neighbouring windows at the test.")] = 0.5,
    mirror: Annotated[str, typer.Option(help="Axes to mirror at the test: d,h,w, or one of them.")] = "",
    surface: Annotated[bool, typer.Option(help="Measure distances between surfaces beside the Dice.")] = True,
    device: Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for finetune.jsonl and the models.")] = None,
) -> None:
    """Fine-tune for segmentation with few labels; measure Dice and surface distances on the cases held aside."""
    from .downstream.finetune import finetune as run

    run(
        weights, store, labels=labels, seed=seed, from_scratch=from_scratch, steps=steps, batch=batch,
        learning_rate=learning_rate, crop=_three_numbers(crop), flips=flips, autocast=autocast, freeze=freeze,
        layer_decay=layer_decay, head_warmup=head_warmup, overlap=overlap, mirror=mirror, surface=surface,
        device=device, output=output,
    )  # fmt: skip


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A .safetensors that finetune saved, or a folder that holds one.")],
    raw: Annotated[Path, typer.Argument(help="An image, or a tree of images, NIfTI to DICOM.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the labels.")],
    labels: Annotated[Path | None, typer.Option(help="Folder of labels to score the predictions against.")] = None,
    overlap: Annotated[float, typer.Option(help="Of neighbouring windows.")] = 0.5,
    mirror: Annotated[str, typer.Option(help="Axes to mirror: d,h,w, or one of them.")] = "",
    surface: Annotated[bool, typer.Option(help="Score distances between surfaces beside the Dice.")] = True,
    device: Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda.")] = "auto",
    timeout_s: Annotated[float, typer.Option(help="An image that takes longer to read is given up.")] = 3600.0,
    force: Annotated[bool, typer.Option("--force", help="Replace labels of another model or unknown origin.")] = False,
) -> None:
    """Segment raw images with a fine-tuned model: one label file for each, on the image's own grid."""
    from .downstream.predict import predict as run

    summary = run(
        model, raw, output, labels=labels, overlap=overlap, mirror=mirror, surface=surface, device=device,
        timeout_s=timeout_s, force=force,
    )  # fmt: skip
    print(summary)
    raise typer.Exit(summary.exit_code)


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="finetune.jsonl files, or their folders.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
) -> None:
    """Compare fine-tuning runs: Dice by number of labels, pretrained against from scratch, with intervals."""
    from .downstream.table import label_table, read_lines, to_markdown, to_rich

    rows = label_table(read_lines(files))
    if markdown:
        print(to_markdown(rows), end="")
    else:
        Console().print(*to_rich(rows))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its weights files.")],
    file: Annotated[Path, typer.Argument(help="The file to write; of a MONAI bundle, the folder.")],
    to: Annotated[str, typer.Option(help="nnunet, monai, safetensors or encoder.")],
    patch_size: Annotated[
        str | None, typer.Option(help="Of nnunet's plans: D,H,W voxels, or H,W; default the crop of pretraining.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write the pretrained weights for another program, with a card, and say what in them is not pretrained."""
    from .export import export as write

    patch = _whole_numbers("--patch-size", patch_size)
    print("\n".join(write(run, to, file, patch_size=patch, force=force).lines))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    results: Annotated[
        list[Path] | None, typer.Option(help="More lines of fine-tuning to compare: a finetune.jsonl. Repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
) -> None:
    """One self-contained HTML page about runs: settings, curves, views, displacements, features, Dice, speed."""
    from .report import write_report

    said = Console(stderr=True)
    write_report(
        runs,
        output,
        results=results or (),
        force=force,
        say=lambda line: said.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    Console().print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show all settings of one recipe.")] = None) -> None:
    """List the recipes, or every setting of one."""
    from omegaconf import OmegaConf

    from ..methods import recipe_names
    from .config import load_config

    if name is None:
        print("\n".join(recipe_names()))
    else:
        print(OmegaConf.to_yaml(OmegaConf.structured(load_config(name))), end="")


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def bench(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="kernels: fused operators; data: views; train: a step by its parts; prepare: resampling; "
            "methods: whole trainings; scaling: one and more ranks; label-efficiency: Dice with few labels."
        ),
    ] = "kernels",
) -> None:
    """Measure speed and memory beside what one would otherwise pick: `bench kernels --help` says what can be chosen."""
    known = ("kernels", "data", "train", "prepare", "methods", "scaling", "label-efficiency")
    if what not in known:
        raise UserError(f"bench {what}: unknown; this version measures {', '.join(known)}")
    sys.argv = [f"voxtrast bench {what}", *context.args]
    runpy.run_module(f"voxtrast.benchmarks.{what.replace('-', '_')}", run_name="__main__", alter_sys=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything of the demo goes.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew in place of continuing.")] = False,
) -> None:
    """Prepare, pretrain, fine-tune, export and report on made-up subjects: no data needed."""
    from .demo import run_demo

    run_demo(output, fresh=fresh)


def _three_numbers(text: str | None) -> tuple[int, int, int] | None:
    numbers = _whole_numbers("--crop", text)
    if numbers is None:
        return None
    if len(numbers) != 3:
        raise UserError(f"--crop {text}: expected three whole numbers D,H,W, for example 40,56,40")
    depth, height, width = numbers
    return depth, height, width


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: expected whole numbers with commas between, for example 40,56,40") from None


def main() -> None:
    """The console script; a mistake of the user is one line on stderr and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
