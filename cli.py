"""The ``slotlab`` command: the only place where the two packages meet a person."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from featcache.errors import DataError, FeatcacheError, UsageError
from slotlab.commands import bench, experiments, masks, report, robustness, stores
from slotlab.commands.options import CACHE_FOLDER, Cache, Device, Dtype, Json, Precision, Refine, print_json

app = typer.Typer(
    name="slotlab",
    help="Object-centric learning on frozen features: extract once, then stream, train, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    os.environ["SLOTLAB_DEBUG"] = "1" if debug else os.environ.get("SLOTLAB_DEBUG", "")


@app.command()
def extract(
    context: typer.Context,
    backbone: Annotated[str, typer.Option(help="Short name, timm:NAME or open_clip:ARCH/TAG.")] = "dinov2",
    data: Annotated[str | None, typer.Option(help="Folder, HDF5 file or tfds:NAME; default: the sample.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every split.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: cache/BACKBONE.zarr.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="block12, block12.norm, block9.key ...; repeatable.")] = None,
    input_size: Annotated[int | None, typer.Option(help="Pixels a side that the backbone sees.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="int8 keeps a scale for each token.")] = "float16",
    frame_stride: Annotated[int, typer.Option(help="Keep every N-th frame.")] = 1,
    max_videos: Annotated[int | None, typer.Option(help="Of each split.")] = None,
    frame_size: Annotated[int | None, typer.Option(help="Side of the stored frames; default: as they are.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file, or random.")] = None,
    batch_size: Annotated[str, typer.Option(help="Frames at a time, or auto (measured).")] = "auto",
    precision: Annotated[Precision, typer.Option(help="The backbone runs in; auto measures.")] = "auto",
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes of one thread, on this machine.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Of dask; its workers share this file system.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over the videos once and store its patch tokens. Resumes where it stopped."""
    if batch_size != "auto" and not batch_size.isdigit():
        raise UsageError(f"--batch-size {batch_size}: give a number, or auto")
    path = out or CACHE_FOLDER / f"{backbone.replace(':', '_').replace('/', '_')}.zarr"

    from featcache.registry import get_spec

    get_spec(backbone)  # a misspelt name is told before anything heavy is imported
    from featcache.backbones import load_backbone
    from featcache.device import pick_device
    from featcache.extract import ExtractOptions, measure_seconds, plan
    from featcache.extract import extract as run_extract
    from featcache.sources import PARTIAL, open_source
    from slotlab import display

    options = ExtractOptions(
        splits=tuple(split or ()),
        dtype=dtype,
        frame_stride=frame_stride,
        max_videos=max_videos,
        frame_size=frame_size,
        batch_size=None if batch_size == "auto" else int(batch_size),
        precision=precision,
    )
    client = None
    if (scheduler or workers is not None) and not dry_run:
        from featcache.distributed import connect, extract_distributed

        client = context.with_resource(connect(scheduler, workers))
        if data and Path(data.removesuffix(PARTIAL)).exists():
            data = str(Path(data).absolute())  # workers may have another working directory
    source = open_source(data)
    model = load_backbone(backbone, weights, tuple(tap or ()), input_size, pick_device(device))
    todo = plan(path, source, model, options)
    if dry_run:
        summary = {
            "out": str(path),
            "splits": {s.name: {"videos": len(s.spec.lengths), "frames_left": s.frames_left} for s in todo.splits},
            "taps": list(model.taps),
            "batch_size": todo.spec.batch_size,
            "precision": todo.spec.precision,
            "frames_left": todo.frames_left,
            "bytes_left": todo.bytes_left,
            "bytes_free": todo.bytes_free,
            "seconds": measure_seconds(todo, source, model),
        }
        if as_json:
            print_json(summary)
        else:
            display.out.print(display.plain_table(("", "value"), [(k, str(v)) for k, v in summary.items()]))
        return
    with display.ExtractProgress() as progress:
        if client:
            store = extract_distributed(todo, source, client, weights=weights, device=device, progress=progress)
        else:
            store = run_extract(todo, source, model, progress)
    summary = {"path": str(path), "splits": {name: store[name].frames for name in store.splits}}
    if as_json:
        print_json(summary)
    else:
        frames = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())  # type: ignore[attr-defined]
        display.out.print(f"{path}: {frames} frames. Next: slotlab stats {path}")


@app.command()
def stats(
    context: typer.Context,
    caches: Annotated[list[Path] | None, typer.Argument(help="Stores; default: all in cache/.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: train, or the first there is.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure.")] = None,
    recompute: Annotated[bool, typer.Option(help="From the stored features, block by block with dask.")] = False,
    workers: Annotated[int | None, typer.Option(help="With --recompute: processes on this machine.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="With --recompute: of dask; its workers see the store.")] = None,
    as_json: Json = False,
) -> None:
    """The scale of the features: std, token norms, outliers, effective rank; stores side by side."""
    elsewhere = scheduler is not None or workers is not None
    if elsewhere and not recompute:
        raise UsageError("--scheduler and --workers: only with --recompute, else the stored statistics are read")

    from featcache.report import plot_scale, render, store_reports
    from slotlab import display

    paths = caches or sorted(CACHE_FOLDER.glob("*.zarr"))
    if not paths:
        raise DataError(f"{CACHE_FOLDER}/: no stores; make one with: slotlab extract --backbone dinov2")
    client = None
    if elsewhere:
        from featcache.distributed import connect

        client = context.with_resource(connect(scheduler, workers))
    reports = [report for path in paths for report in store_reports(path, split, recompute, client)]
    if plot:
        plot_scale(reports, plot)
    if as_json:
        print_json({"stores": [report.as_dict() for report in reports]})
    else:
        display.out.print(render(reports))


@app.command()
def train(
    context: typer.Context,
    cache: Cache,
    preset: Annotated[str, typer.Option(help="A shipped configuration.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over the preset.")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, for example model.slots=7.")] = None,
    normalize: Annotated[str | None, typer.Option(help="slow=K, whiten, whiten=K, channel, scale, none ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step: frames, or clips.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/STORE-PRESET-SEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run from its checkpoint.")] = False,
    init_from: Annotated[Path | None, typer.Option(help="Start with the parameters of this run.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write events to RUN/tensorboard.")] = False,
    device: Device = "auto",
) -> None:
    """Train a slot model on cached features. Runs on several GPUs under: torchrun --nproc-per-node N -m cli train."""
    from slotlab.config import load_config

    settings = load_config(
        preset,
        config,
        override or (),
        data__normalize=normalize,
        optim__steps=steps,
        optim__batch_size=batch_size,
        seed=seed,
    )
    from featcache.device import pick_device
    from featcache.store import FeatureStore
    from slotlab import display
    from slotlab.ranks import is_leader
    from slotlab.train import train as run_train

    run = out or Path("runs") / f"{cache.stem}-{preset}-{settings.seed}"
    store, place = FeatureStore.open(cache), pick_device(device)
    for idle in settings.unread() if is_leader() else ():
        display.err.print(f"note: {idle}", soft_wrap=True)
    if settings.optim.precision == "bfloat16" and place.type == "cpu" and is_leader():
        from slotlab.doctor import bfloat16_speed, bfloat16_verdict

        if (speed := bfloat16_speed()) < 1:
            warning = f"warning: optim.precision=bfloat16 has {bfloat16_verdict(speed)}"
            display.err.print(warning, style="yellow", soft_wrap=True)
    shown = [context.with_resource(display.training_display(settings.optim.steps))]
    if tensorboard:
        from slotlab.tensorboard import events

        shown.append(context.with_resource(events(run, resume)))

    def tell(row: dict[str, Any]) -> None:
        for each in shown:
            each(row)

    run_train(settings, store, run, resume=resume, init_from=init_from, device=place, report=tell)
    if is_leader():
        display.out.print(f"{run}: trained. Next: slotlab eval {run}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    cache: Annotated[Path | None, typer.Option(help="Another store of the same features.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: the configuration's, validation.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also draw frames, ground truth and slots to this PNG.")] = None,
    boundaries: Annotated[bool, typer.Option("--boundaries", help="Also boundary F and bleeding by area.")] = False,
    refine: Annotated[Refine | None, typer.Option(help="Also score masks refined by the frames.")] = None,
    binarise: Annotated[list[str] | None, typer.Option(help="Also argmax, threshold=T or gumbel=T.")] = None,
    against: Annotated[Path | None, typer.Option(help="Run to test this one against, video by video.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run: FG-ARI, ARI, mBO, mIoU by frame, video and material, beside a ceiling and a floor."""
    from featcache.device import pick_device
    from slotlab import display
    from slotlab.evaluate import evaluate as run_evaluate
    from slotlab.evaluate import load_run
    from slotlab.runs import keep_result

    if sheet and sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: is drawn as PNG; name a file that ends in .png")
    loaded = load_run(run, cache, pick_device(device))
    fine = {}
    if boundaries or refine is not None or binarise:
        from slotlab.outlines import gains_table, outline_scores, outlines_table

        fine = outline_scores(loaded, split, refine, binarise or ())  # first, as it may lack a package
    result = run_evaluate(loaded, split) | fine
    keep_result(run, loaded.store, result)
    if sheet:
        from slotlab.sheet import draw_sheet

        draw_sheet(loaded, loaded.store[result["split"]], sheet)
    compared = None
    if against is not None:
        from slotlab.subgroups import paired

        compared = paired(result, run_evaluate(load_run(against, None, pick_device(device)), result["split"]))
    if as_json:
        print_json(result | ({"against": compared} if compared else {}))
    else:
        display.out.print(display.scores_table(result))
        display.warn(result["warnings"])
        if fine:
            display.out.print(outlines_table(result), gains_table(result))
        if compared:
            display.out.print(display.paired_table(compared))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run and the picture go.")] = Path("demo"),
    cache: Annotated[Path, typer.Option(help="Store to make or reuse.")] = CACHE_FOLDER / "dinov2.zarr",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; default: the preset's 400, about a minute.")
    ] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The main job on the embedded sample: extract, stats, train, eval and a picture of the masks."""
    from featcache.device import pick_device
    from slotlab import demo as job
    from slotlab import display
    from slotlab.config import load_config

    settings = load_config("default", optim__steps=steps, seed=seed)
    chosen = pick_device(device)
    say = display.err.print
    say("[bold]1/4[/] extracting DINOv2 ViT-S/14 features of the embedded MOVi-A sample")
    with display.ExtractProgress() as progress:
        store = job.extract_sample(cache, chosen, progress)
    say("[bold]2/4[/] the scale of the features")
    if not as_json:
        from featcache.report import render, store_reports

        display.out.print(render(store_reports(cache)))
    say(f"[bold]3/4[/] training {settings.optim.steps} steps of {settings.optim.batch_size} frames")
    with display.training_display(settings.optim.steps) as show:
        result = job.train_and_score(settings, store, out, chosen, show)
    say("[bold]4/4[/] scores on videos that training never saw")
    if as_json:
        print_json(result.scores)
    else:
        display.out.print(display.scores_table(result.scores))
        display.warn(result.scores["warnings"])
        display.out.print(f"picture of the masks  {result.sheet}")
        display.out.print(f"run folder            {result.run}")
        display.out.print(f"feature store         {cache}")
        display.out.print("\nOn your own data:")
        display.out.print("  slotlab extract --backbone dinov2 --data VIDEOS --out cache/mine.zarr")
        display.out.print("  slotlab train --cache cache/mine.zarr --out runs/mine")
        display.out.print("  slotlab eval runs/mine --sheet masks.png")


app.command()(stores.verify)
app.command()(stores.export)
app.command("import")(stores.import_file)
app.command()(stores.weights)
app.command()(stores.doctor)
app.command()(masks.masks)
app.command()(masks.segment)
app.command()(robustness.robustness)
app.command()(report.report)
app.command()(report.view)
app.command()(experiments.compare)
app.command()(experiments.ablate)
app.command()(experiments.table)
app.add_typer(bench.bench, name="bench")


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _of_the_machine(error: Exception) -> str | None:
    """What to say of memory that is not there, and of places that cannot be read or written."""
    full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if full or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):  # torch's two
        return (
            "out of memory; take a smaller --batch-size, or --set optim.accumulate=2 or more (extract: fewer --workers)"
        )
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"{what}; look at the place and its permissions, or name another"
    return None


def main() -> None:
    """Entry point: user errors become one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)  # None, or the code of an exit; 130 for Ctrl-C in newer typers
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        said = "interrupted; what was finished is kept, the same command resumes (train: with --resume)"
        print(f"slotlab: {said}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except FeatcacheError as error:
        if os.environ.get("SLOTLAB_DEBUG"):
            raise
        print(f"slotlab: {error.render()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if (told := _of_the_machine(error)) and not os.environ.get("SLOTLAB_DEBUG"):
            print(f"slotlab: {told}", file=sys.stderr)
            sys.exit(DataError.exit_code)
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):  # click's, wherever typer keeps its click
            raise
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
