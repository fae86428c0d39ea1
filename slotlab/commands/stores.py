"""slotlab stats, verify, export, import and weights: stores, and the weights of backbones."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.errors import DataError, UsageError
from featcache.words import Dtype, StoreFormat
from slotlab.commands.options import (
    CACHE_FOLDER,
    AsFrames,
    Device,
    IgnoreLabel,
    Json,
    MaskColours,
    print_json,
)


def stats(
    context: typer.Context,
    caches: Annotated[list[Path] | None, typer.Argument(help="Stores; default: all in cache/.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to report; default: train, or the first.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to draw, such as stats.png.")] = None,
    recompute: Annotated[
        bool, typer.Option(help="Statistics computed again from the stored features, block by block with dask.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Number of processes on this machine, with --recompute.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of the dask scheduler, with --recompute; its workers see the store.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Report the scale of the features: std, token norms, outliers, effective rank; stores side by side."""
    elsewhere = scheduler is not None or workers is not None
    if elsewhere and not recompute:
        raise UsageError("--scheduler and --workers: only with --recompute, else the stored statistics are read")

    from featcache.scale.report import store_reports
    from slotlab.commands import terminal
    from slotlab.commands.tables import render

    paths = caches or sorted(CACHE_FOLDER.glob("*.zarr"))
    if not paths:
        raise DataError(f"{CACHE_FOLDER}/: no stores; make one with: slotlab extract --backbone dinov2")
    client = None
    if elsewhere:
        from featcache.extraction.distributed import connect

        client = context.with_resource(connect(scheduler, workers))
    reports = [report for path in paths for report in store_reports(path, split, recompute, client)]
    if plot:
        from slotlab.pictures.chart import save
        from slotlab.report.charts import scale_charts

        save(scale_charts(reports), plot)
    if as_json:
        print_json({"stores": [report.as_dict() for report in reports]})
    else:
        terminal.out.print(render(reports))


def verify(
    cache: Annotated[Path, typer.Argument(help="Store to check.")],
    repair: Annotated[bool, typer.Option("--repair", help="Repair of what is damaged, and of nothing else.")] = False,
    data: Annotated[str | None, typer.Option(help="Source of the store's videos, if they have moved.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file of the backbone, if it has moved.")] = None,
    device: Device = "auto",
    mask_colours: MaskColours = False,
    ignore_label: IgnoreLabel = None,
    frames_as: AsFrames = None,
    as_json: Json = False,
) -> None:
    """Check all of a store against its manifest; names the damaged videos, exit code 3 if any are left."""
    from featcache.machine import pick_device
    from featcache.upkeep.verify import verify as run_verify
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    damage, repaired = run_verify(cache), []
    if damage and repair:
        from featcache.sources import Reading
        from featcache.upkeep.repair import Means
        from featcache.upkeep.repair import repair as run_repair

        with terminal.ExtractProgress() as progress:
            reading = Reading.of(mask_colours, ignore_label, frames_as)
            means = Means(data, weights, device=str(pick_device(device)), reading=reading)
            repaired = run_repair(cache, means, progress)
        damage = run_verify(cache)
    if as_json:
        lists = {"damaged": damage, "repaired": repaired}
        print_json({"path": str(cache), **{k: [d.as_dict() for d in v] for k, v in lists.items()}})
    elif damage:
        terminal.out.print(plain_table(("split", "video", "id", "what"), [d.row() for d in damage], str(cache)))
    else:
        terminal.out.print(f"{cache}: sound" + (f", {len(repaired)} damages repaired" if repaired else ""))
    if damage:
        raise typer.Exit(DataError.exit_code)


def export(
    cache: Annotated[Path, typer.Argument(help="Store to copy.")],
    out: Annotated[Path, typer.Argument(help="Store or file to make.")],
    form: Annotated[StoreFormat, typer.Option("--format", help="Format of the copy.")] = "zarr",
    dtype: Annotated[Dtype | None, typer.Option(help="Form of the copied tokens; default: as they are.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Tap to copy; repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split to copy; repeatable; default: every split.")] = None,
    shard_videos: Annotated[
        int | None, typer.Option(help="Number of videos that share a file; 0: none. Default: by their number and size.")
    ] = None,
    for_ranks: Annotated[
        int | None, typer.Option(help="Number of ranks; OUT is a folder of stores, with the videos of one rank each.")
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="Rank to make the store of, with --for-ranks; repeatable; default: all.")
    ] = None,
) -> None:
    """Copy a store in another dtype, with fewer taps, in shards, or as HDF5. Never loads it; checks as it reads."""
    if rank and for_ranks is None:
        raise UsageError("--rank: only with --for-ranks, which says of how many")
    if for_ranks is not None and form == "hdf5":
        raise UsageError("--for-ranks: ranks train on zarr stores; leave out --format")

    from featcache.upkeep.convert import ConvertOptions, convert
    from slotlab.commands import terminal

    options = ConvertOptions(dtype, tuple(tap or ()), tuple(split or ()), shard_videos)
    made = [out]
    with terminal.ExtractProgress() as progress:
        if for_ranks is None:
            convert(cache, out, options, form, progress)
        else:
            from featcache.upkeep.ranks import export_for_ranks
            from slotlab.models.inputs import SAMPLE_VIDEOS

            made = export_for_ranks(cache, out, options, for_ranks, rank or (), SAMPLE_VIDEOS, progress)
    for path in made:
        terminal.out.print(f"{path}: written")


def import_file(
    file: Annotated[Path, typer.Argument(help="HDF5 file by slotlab export, or of the layout in docs/store.md.")],
    out: Annotated[Path, typer.Argument(help="Store to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Form of the copied tokens; default: as they are.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Tap to copy; repeatable; default: every tap.")] = None,
    split: Annotated[list[str] | None, typer.Option(help="Split to copy; repeatable; default: every split.")] = None,
    shard_videos: Annotated[
        int | None, typer.Option(help="Number of videos that share a file; 0: none. Default: by their number and size.")
    ] = None,
) -> None:
    """Make a store of the features in an HDF5 file."""
    if not file.is_file():
        raise DataError(f"{file}: no such file; name an HDF5 file, or copy a store with slotlab export")
    export(file, out, "zarr", dtype, tap, split, shard_videos)


def weights(
    fetch: Annotated[str | None, typer.Option(help="Backbone to download the weights of; prints JSON.")] = None,
    as_json: Json = False,
) -> None:
    """List the backbones, and where the weights of each come from."""
    from featcache.backbones.registry import ALIASES, get_spec, list_backbones
    from slotlab.commands import terminal
    from slotlab.commands.tables import plain_table

    if fetch:
        from featcache.backbones.weights import resolve_weights

        found = resolve_weights(get_spec(fetch))
        print_json({"backbone": fetch, "origin": str(found.origin), "sha256": found.sha256})
        return
    short = {name: alias for alias, name in ALIASES.items()}
    rows = [
        (s.name + (f" ({short[s.name]})" if s.name in short else ""), s.library, s.model_id, s.patch, s.dim, s.source)
        for s in list_backbones()
    ]
    if as_json:
        keys = ("name", "library", "model_id", "patch", "dim", "source")
        print_json({"backbones": [dict(zip(keys, row, strict=True)) for row in rows]})
    else:
        terminal.out.print(plain_table(("backbone", "library", "model", "patch", "dim", "weights"), rows))
