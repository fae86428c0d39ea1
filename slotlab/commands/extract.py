"""slotlab extract: the store of a backbone's features."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.errors import UsageError
from featcache.text import bytes_text
from featcache.words import Dtype, Fit
from slotlab.commands.options import (
    CACHE_FOLDER,
    AsFrames,
    Device,
    IgnoreLabel,
    Json,
    MaskColours,
    Precision,
    parse_size,
    print_json,
)

if TYPE_CHECKING:
    from featcache.extraction.rounding import Rounding


def extract(
    context: typer.Context,
    backbone: Annotated[str, typer.Option(help="Backbone: a short name, timm:NAME or open_clip:ARCH/TAG.")] = "dinov2",
    data: Annotated[
        str | None, typer.Option(help="Source of videos: a folder, a file or LAYOUT:PATH; default: the sample.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option(help="Split to extract; repeatable; default: all that repeat no other.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Store to make or to resume; default: cache/BACKBONE.zarr.")] = None,
    tap: Annotated[
        list[str] | None,
        typer.Option(help="Tap: block12, block12.norm, encoder.block9.key of one of several ViTs ...; repeatable."),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option(help="Size of the backbone's input in pixels: a side, or rows x columns as 224x392.")
    ] = None,
    fit: Annotated[
        Fit, typer.Option(help="Way to bring frames of other proportions to the input: squash, crop or pad.")
    ] = "squash",
    dtype: Annotated[Dtype, typer.Option(help="Form of the stored tokens; int8 keeps a scale for each.")] = "float16",
    frame_stride: Annotated[int, typer.Option(help="Stride N: every N-th frame is kept.")] = 1,
    max_videos: Annotated[int | None, typer.Option(help="Largest number of videos of each split.")] = None,
    frame_size: Annotated[
        str | None, typer.Option(help="Size of the stored frames: the shorter side, or 128x224; default: as they are.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights of the backbone: a checkpoint file, or random.")] = None,
    batch_size: Annotated[
        str, typer.Option(help="Number of frames at a time; auto: 8 on a CPU, what fits on a GPU.")
    ] = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Number format of the backbone; auto: the fastest that is close enough.")
    ] = "auto",
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option(help="Number of processes on this machine, one thread each.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of the dask scheduler; its workers share this file system.")
    ] = None,
    mask_colours: MaskColours = False,
    ignore_label: IgnoreLabel = None,
    frames_as: AsFrames = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Damaged videos left out, and listed at the end.")
    ] = False,
    grow: Annotated[bool, typer.Option("--grow", help="Videos that are new in the source are added.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Videos that are no longer in the source are removed from the store.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "--plan", help="Plan only: the frames, space and time that it would take.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a frozen backbone over the videos once and store its patch tokens. Resumes where it stopped."""
    if batch_size != "auto" and not batch_size.isdigit():
        raise UsageError(f"--batch-size {batch_size}: give a number, or auto")
    path = out or CACHE_FOLDER / f"{backbone.replace(':', '_').replace('/', '_')}.zarr"

    from featcache.backbones.registry import get_spec

    get_spec(backbone)  # report a misspelt name before heavy imports
    from featcache.backbones.backbone import load_backbone
    from featcache.extraction.extract import extract as run_extract
    from featcache.extraction.extract import measure_seconds
    from featcache.extraction.plan import ExtractOptions, plan
    from featcache.extraction.rounding import measure_rounding
    from featcache.machine import chosen, on_windows_drive, pick_device
    from featcache.sources import Reading, absolute, open_source
    from featcache.sources.damaged import SoundVideos
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    options = ExtractOptions(
        splits=tuple(split or ()),
        dtype=dtype,
        frame_stride=frame_stride,
        max_videos=max_videos,
        frame_size=parse_size("--frame-size", frame_size),
        fit=fit,
        batch_size=None if batch_size == "auto" else int(batch_size),
        precision=precision,
        grow=grow,
        prune=prune,
    )
    size = parse_size("--input-size", input_size)
    reading = Reading.of(mask_colours, ignore_label, frames_as)
    client = None
    if (scheduler or workers is not None) and not dry_run:
        from featcache.extraction.distributed import connect, extract_distributed

        client = context.with_resource(connect(scheduler, workers))
        data = absolute(data) if data else None  # workers may have another working directory
    source = open_source(data, reading)
    source = SoundVideos(source) if skip_damaged else source
    model = load_backbone(backbone, weights, tuple(tap or ()), size, pick_device(device))
    todo = plan(path, source, model, options)
    rounding = measure_rounding(todo, source, model)
    damaged = [line for split in todo.splits for line in source.damaged(split.name).values()]
    said = {
        "damaged": damaged,
        "left_out": dict(source.left_out()),
        "changes": {split.name: asdict(split.changes) for split in todo.splits},
        "rounding": [asdict(of) for of in rounding],
    }
    if dry_run:
        summary: dict[str, Any] = {
            "out": str(path),
            "splits": {
                s.name: {"videos": len(s.spec.lengths), "frames_left": s.frames_left, **s.changes.counts()}
                for s in todo.splits
            },
            "taps": list(model.taps),
            "batch_size": todo.spec.batch_size,
            "precision": todo.spec.precision,
            "frames_left": todo.frames_left,
            "bytes_left": todo.bytes_left,
            "bytes_free": todo.bytes_free,
            "seconds": measure_seconds(todo, source, model),
        }
        if as_json:
            print_json(summary | said | {"remarks": list(todo.remarks)})
        else:
            rows = [(k, bytes_text(int(str(v))) if k.startswith("bytes") else str(v)) for k, v in summary.items()]
            terminal.out.print(plain_table(("", "value"), rows))
            _tell(dtype, rounding, damaged)
        return
    terminal.err.print(chosen(model.device), highlight=False)
    if on_windows_drive(path):
        terminal.warn([f"{path}: on a drive of Windows, several times slower; choose --out below {Path.home()}"])
    with terminal.ExtractProgress() as progress:
        if client:
            store = extract_distributed(todo, source, client, weights=weights, device=device, progress=progress)
        else:
            store = run_extract(todo, source, model, progress)
    summary = {"path": str(path), "splits": {name: store[name].frames for name in store.splits}}
    if as_json:
        print_json(summary | said)
    else:
        _tell(dtype, rounding, damaged)
        frames = ", ".join(f"{name} {count}" for name, count in summary["splits"].items())
        terminal.out.print(f"{path}: {frames} frames. Next: slotlab stats {path}")


def _tell(dtype: Dtype, rounding: "Sequence[Rounding]", damaged: Sequence[str]) -> None:
    from slotlab.commands import terminal

    for of in rounding:
        terminal.out.print(
            f"{dtype} at {of.tap}: relative error of a token {of.median:.1%} (median), {of.p99:.1%} (99th percentile), "
            f"measured on {of.frames} frames",
            soft_wrap=True,
            highlight=False,
        )
    for line in damaged:
        terminal.out.print(f"left out: {line}", highlight=False)
