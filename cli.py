"""The ``slotlab`` command: the only place where the two packages meet a person."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer

from featcache.errors import DataError, FeatcacheError, UsageError

app = typer.Typer(
    name="slotlab",
    help="Object-centric learning on frozen features: extract once, then stream, train, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CACHE_FOLDER = Path("cache")
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Dtype = Literal["float16", "int8"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Residence = Literal["auto", "disk", "host", "device"]
Cache = Annotated[Path, typer.Option("--cache", help="Store made by slotlab extract.", show_default=False)]


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
            _print_json(summary)
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
        _print_json(summary)
    else:
        frames = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())  # type: ignore[attr-defined]
        display.out.print(f"{path}: {frames} frames. Next: slotlab stats {path}")


@app.command()
def stats(
    caches: Annotated[list[Path] | None, typer.Argument(help="Stores; default: all in cache/.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: train, or the first there is.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure.")] = None,
    recompute: Annotated[bool, typer.Option(help="From the stored features, block by block with dask.")] = False,
    as_json: Json = False,
) -> None:
    """The scale of the features: std, token norms, outliers, effective rank; stores side by side."""
    from featcache.report import plot_scale, render, store_reports
    from slotlab import display

    paths = caches or sorted(CACHE_FOLDER.glob("*.zarr"))
    if not paths:
        raise DataError(f"{CACHE_FOLDER}/: no stores; make one with: slotlab extract --backbone dinov2")
    reports = [report for path in paths for report in store_reports(path, split, recompute)]
    if plot:
        plot_scale(reports, plot)
    if as_json:
        _print_json({"stores": [report.as_dict() for report in reports]})
    else:
        display.out.print(render(reports))


@app.command()
def train(
    cache: Cache,
    preset: Annotated[str, typer.Option(help="A shipped configuration.")] = "default",
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over the preset.")] = None,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value, for example model.slots=7.")] = None,
    normalize: Annotated[str | None, typer.Option(help="slow=K, whiten, channel, scale, none, sample ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Frames a step.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/STORE-PRESET-SEED.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run from its checkpoint.")] = False,
    device: Device = "auto",
) -> None:
    """Train a slot model on cached features."""
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
    from slotlab.train import train as run_train

    run = out or Path("runs") / f"{cache.stem}-{preset}-{settings.seed}"
    store = FeatureStore.open(cache)
    with display.training_display(settings.optim.steps) as show:
        run_train(settings, store, run, resume=resume, device=pick_device(device), report=show)
    display.out.print(f"{run}: trained. Next: slotlab eval {run}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    cache: Annotated[Path | None, typer.Option(help="Another store of the same features.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: the configuration's, validation.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also draw frames, ground truth and slots to this PNG.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run: FG-ARI, ARI, mBO, mIoU by frame, video and material, beside a ceiling and a floor."""
    from featcache.device import pick_device
    from slotlab import display
    from slotlab.evaluate import evaluate as run_evaluate
    from slotlab.evaluate import load_run

    loaded = load_run(run, cache, pick_device(device))
    result = run_evaluate(loaded, split)
    (run / f"eval-{result['split']}.json").write_text(json.dumps(result, indent=1))
    if sheet:
        from slotlab.sheet import draw_sheet

        draw_sheet(loaded, loaded.store[result["split"]], sheet)
    if as_json:
        _print_json(result)
    else:
        display.out.print(display.scores_table(result))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run and the picture go.")] = Path("demo"),
    cache: Annotated[Path, typer.Option(help="Store to make or reuse.")] = CACHE_FOLDER / "dinov2.zarr",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default: about six minutes on two cores.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The main job on the embedded sample: extract, stats, train, eval and a picture of the masks."""
    from featcache.device import pick_device
    from slotlab import demo as job
    from slotlab import display
    from slotlab.config import load_config

    settings = load_config("demo", optim__steps=steps, seed=seed)
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
        _print_json(result.scores)
    else:
        display.out.print(display.scores_table(result.scores))
        display.out.print(f"picture of the masks  {result.sheet}")
        display.out.print(f"run folder            {result.run}")
        display.out.print(f"feature store         {cache}")
        display.out.print("\nOn your own data:")
        display.out.print("  slotlab extract --backbone dinov2 --data VIDEOS --out cache/mine.zarr")
        display.out.print("  slotlab train --cache cache/mine.zarr --out runs/mine")
        display.out.print("  slotlab eval runs/mine --sheet masks.png")


@app.command()
def verify(
    cache: Annotated[Path, typer.Argument(help="Store to check.")],
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged, and only that.")] = False,
    data: Annotated[str | None, typer.Option(help="Where the store's videos are now, if they have moved.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file, if it has moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check all of a store against its manifest; names the damaged videos, exit code 3 if any are left."""
    from featcache.device import pick_device
    from featcache.verify import verify as run_verify
    from slotlab import display

    damage, repaired = run_verify(cache), []
    if damage and repair:
        from featcache.repair import Means
        from featcache.repair import repair as run_repair

        with display.ExtractProgress() as progress:
            repaired = run_repair(cache, Means(data, weights, device=str(pick_device(device))), progress)
        damage = run_verify(cache)
    if as_json:
        lists = {"damaged": damage, "repaired": repaired}
        _print_json({"path": str(cache), **{k: [d.as_dict() for d in v] for k, v in lists.items()}})
    elif damage:
        display.out.print(display.plain_table(("split", "video", "id", "what"), [d.row() for d in damage], str(cache)))
    else:
        display.out.print(f"{cache}: sound" + (f", {len(repaired)} damages repaired" if repaired else ""))
    if damage:
        raise typer.Exit(DataError.exit_code)


@app.command()
def export(
    cache: Annotated[Path, typer.Argument(help="Store to copy.")],
    out: Annotated[Path, typer.Argument(help="Store or file to make.")],
    form: Annotated[Literal["zarr", "hdf5"], typer.Option("--format", help="Of the copy.")] = "zarr",
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as it is.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every split.")] = None,
    shard_videos: Annotated[int, typer.Option(help="Videos that share a file, where inodes are scarce.")] = 0,
) -> None:
    """Copy a store in another dtype, with fewer taps, in shards, or as HDF5. Never loads it; checks as it reads."""
    from featcache.convert import ConvertOptions, convert
    from slotlab import display

    options = ConvertOptions(dtype, tuple(tap or ()), tuple(split or ()), shard_videos)
    with display.ExtractProgress() as progress:
        convert(cache, out, options, form, progress)
    display.out.print(f"{out}: written")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="HDF5 file by slotlab export, or of the layout in docs/store.md.")],
    out: Annotated[Path, typer.Argument(help="Store to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: as it is.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Repeatable; default: every split.")] = None,
    shard_videos: Annotated[int, typer.Option(help="Videos that share a file, where inodes are scarce.")] = 0,
) -> None:
    """Make a store of the features in an HDF5 file."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; name an HDF5 file, or copy a store with slotlab export")
    export(file, out, "zarr", dtype, tap, split, shard_videos)


@app.command()
def weights(
    fetch: Annotated[str | None, typer.Option(help="Download this backbone's weights now.")] = None,
    as_json: Json = False,
) -> None:
    """Which backbones there are, and where each one's weights come from."""
    from featcache.registry import ALIASES, get_spec, list_backbones
    from slotlab import display

    if fetch:
        from featcache.weights import resolve_weights

        found = resolve_weights(get_spec(fetch))
        _print_json({"backbone": fetch, "origin": found.origin, "sha256": found.sha256})
        return
    short = {name: alias for alias, name in ALIASES.items()}
    rows = [
        (s.name + (f" ({short[s.name]})" if s.name in short else ""), s.library, s.model_id, s.patch, s.dim, s.source)
        for s in list_backbones()
    ]
    if as_json:
        keys = ("name", "library", "model_id", "patch", "dim", "source")
        _print_json({"backbones": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        display.out.print(display.plain_table(("backbone", "library", "model", "patch", "dim", "weights"), rows))


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers: packages, devices, memory, disk, weights, the embedded sample."""
    from slotlab import display
    from slotlab.doctor import examine

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        display.out.print(display.plain_table(("", "found"), [(k, str(v)) for k, v in findings.items()]))


bench = typer.Typer(help="Measured rates beside what this machine allows.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command("stream")
def bench_stream(
    cache: Cache,
    split: Annotated[str, typer.Option(help="Of the store.")] = "train",
    tap: Annotated[str | None, typer.Option(help="Default: the store's first.")] = None,
    residence: Annotated[Residence, typer.Option(help="Where the features live while they stream.")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Medians are over so many.")] = 7,
    cold: Annotated[bool, typer.Option(help="Also from the disk: drops the store from the page cache.")] = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Random clips and frames of a store: bare reads and whole stream, beside memory's and the disk's rate."""
    from featcache.bench import measure_stream
    from featcache.device import pick_device
    from featcache.store import FeatureStore
    from slotlab import display

    store = FeatureStore.open(cache)
    chosen = store[split].require_complete()
    rates = measure_stream(
        chosen, store.tap(tap), rounds=rounds, cold=cold, device=pick_device(device), residence=residence
    )
    if as_json:
        _print_json({"cache": str(cache), "split": split, "patterns": [rate.as_dict() for rate in rates]})
        return
    rows = [
        (r.name, f"{r.bytes_per_s / 1e9:.2f}", f"{r.limit_bytes_per_s / 1e9:.2f}", f"{r.ratio:.2f}", r.limit)
        for r in rates
    ]
    display.out.print(display.plain_table(("pattern", "GB/s", "limit", "ratio", "the limit is"), rows, str(cache)))
    if cold and not any(rate.name.startswith("cold") for rate in rates):
        display.out.print("cold: not measured; another process holds the store in memory, or it must be decoded")


# -- shared ------------------------------------------------------------------------------------------------


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: user errors become one line on stderr and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)  # None, or the code of an exit; 130 for Ctrl-C in newer typers
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("slotlab: interrupted; what was finished is kept, the same command resumes", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except FeatcacheError as error:
        if os.environ.get("SLOTLAB_DEBUG"):
            raise
        print(f"slotlab: {error.render()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):  # click's, wherever typer keeps its click
            raise
        error.show()
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
