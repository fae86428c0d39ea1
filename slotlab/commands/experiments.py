"""slotlab compare, ablate and table: experiments of many runs."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.errors import DataError, UsageError
from slotlab.commands.options import CACHE_FOLDER, AsFrames, IgnoreLabel, Json, MaskColours, print_json

Override = Annotated[list[str] | None, typer.Option("--set", help="Setting of all cells as key=value; repeatable.")]
Steps = Annotated[int | None, typer.Option(help="Number of optimiser steps of every run.")]
Scored = Annotated[
    str | None, typer.Option("--split", help="Split to score; default: validation, or the only one besides train.")
]
Devices = Annotated[str, typer.Option(help="Devices: auto, or a list such as cuda:0,cuda:1.")]
Workers = Annotated[
    int | None, typer.Option(help="Number of processes; default: one per GPU, or one per core of the CPU.")
]
WIDTH = 120  # columns of a table outside a terminal


def compare(
    backbone: Annotated[list[str] | None, typer.Option(help="Backbone, as for slotlab extract; repeatable.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Tap of every backbone; default: the last block.")] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Name of a shipped configuration; repeatable; pixel is trained once.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file, laid over each preset.")] = None,
    override: Override = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0 to N - 1.")] = 3,
    steps: Steps = None,
    data: Annotated[
        str | None, typer.Option(help="Source of videos, as for slotlab extract; default: the sample.")
    ] = None,
    mask_colours: MaskColours = False,
    ignore_label: IgnoreLabel = None,
    frames_as: AsFrames = None,
    split: Scored = None,
    weights: Annotated[list[str] | None, typer.Option(help="Weights as BACKBONE=FILE, or random; repeatable.")] = None,
    grid: Annotated[int, typer.Option(min=1, help="Patches per side, the same for all backbones.")] = 16,
    max_videos: Annotated[int | None, typer.Option(min=1, help="Largest number of videos of each split.")] = None,
    cache_folder: Annotated[Path, typer.Option(help="Folder of stores, found or made.")] = CACHE_FOLDER,
    out: Annotated[Path | None, typer.Option(help="Folder of the experiment; default: compare/BACKBONES.")] = None,
    devices: Devices = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Backbones, taps and presets side by side: extract what is missing, train, evaluate, report. Resumes."""
    from featcache.backbones.registry import get_spec

    names = [get_spec(name).name for name in backbone or ()]  # report a misspelt name before heavy imports
    if not names:
        raise UsageError("nothing to compare; name at least one --backbone, for example --backbone dinov2")
    from featcache.sources import Reading
    from slotlab.commands import terminal
    from slotlab.commands.progress import RunsProgress
    from slotlab.experiments.ablation import seed_range
    from slotlab.experiments.comparison import Settings, plan_comparison
    from slotlab.experiments.execute import conduct
    from slotlab.experiments.plan import require_free
    from slotlab.experiments.pool import places

    settings = Settings(
        backbones=tuple(names),
        taps=tuple(tap or ()),
        presets=tuple(preset or ("default",)),
        seeds=seed_range(seeds),
        config=config,
        overrides=tuple(override or ()),
        steps=steps,
        data=data,
        reading=Reading.of(mask_colours, ignore_label, frames_as),
        split=split,
        weights=tuple(weights or ()),
        grid=grid,
        max_videos=max_videos,
    )
    folder = out or Path("compare") / "-".join(dict.fromkeys(name.replace("/", "_") for name in names))
    comparison = plan_comparison(settings, folder, cache_folder)
    require_free(comparison.plan, folder)  # check before an extraction that takes hours
    if comparison.missing:
        device = places(devices, workers, 1)[0]
        with terminal.ExtractProgress() as progress:
            comparison.extract(device, progress)
    with RunsProgress() as watcher:
        table = conduct(comparison.plan, folder, watcher, devices, workers)
    finished = [Path(run["path"]) for cell in table["cells"] for run in cell["runs"] if run["state"] == "finished"]
    if finished:
        from slotlab.report.write import write_report

        write_report(finished, folder / "report.html")
        table["report"] = str(folder / "report.html")
    _print(table, as_json)
    _leave(table)


def ablate(
    file: Annotated[Path, typer.Argument(help="TOML file: preset, cache, seeds, and the tables set, grid and cells.")],
    cache: Annotated[Path | None, typer.Option(help="Store to train on, instead of the file's.")] = None,
    override: Override = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds: 0 to N - 1, instead of the file's.")] = None,
    steps: Steps = None,
    split: Scored = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the experiment; default: ablate/FILE.")] = None,
    devices: Devices = "auto",
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """A grid over any configuration keys, and seeds. Skips what is finished, resumes what is not."""
    from slotlab.commands.progress import RunsProgress
    from slotlab.experiments.ablation import read_ablation
    from slotlab.experiments.execute import conduct

    plan = read_ablation(file, cache=cache, seeds=seeds, split=split, overrides=override or (), steps=steps)
    folder = out or Path("ablate") / file.stem
    with RunsProgress() as watcher:
        table = conduct(plan, folder, watcher, devices, workers)
    _print(table, as_json)
    _leave(table)


def table(
    out: Annotated[Path, typer.Argument(help="Folder made by slotlab compare or slotlab ablate.")],
    as_json: Json = False,
) -> None:
    """Make the table of a comparison or an ablation again from its run folders, finished or not."""
    from slotlab.experiments.table import build_table, write_table

    found = build_table(out)
    write_table(found, out)
    _print(found, as_json)


def _leave(table: dict[str, Any]) -> None:
    """Exit with code 3 if a run failed, after its error; the table has the other runs."""
    from slotlab.experiments.table import failures

    if failed := failures(table):
        for run in failed:
            print(f"slotlab: {run['path']}: {run['error']}", file=sys.stderr)
        print(f"slotlab: {len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        raise typer.Exit(DataError.exit_code)


def _print(table: dict[str, Any], as_json: bool) -> None:
    from slotlab.commands import terminal
    from slotlab.commands.tables import experiment_table

    if as_json:
        print_json(table)
    else:
        console = terminal.out if terminal.out.is_terminal else terminal.Terminal(width=WIDTH)
        console.print(experiment_table(table))
        terminal.out.print(f"{table['out']}/: table.md, table.csv" + (", report.html" if "report" in table else ""))
