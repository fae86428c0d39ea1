"""slotlab demo: every step on the embedded sample."""

from pathlib import Path
from typing import Annotated

import typer

from slotlab.commands.options import CACHE_FOLDER, Device, Json, print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run and the picture.")] = Path("demo"),
    cache: Annotated[Path, typer.Option(help="Store to make or reuse.")] = CACHE_FOLDER / "dinov2.zarr",
    steps: Annotated[
        int | None, typer.Option(help="Number of optimiser steps; default: the preset's 400, about a minute.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default: 0.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The main job on the embedded sample: extract, stats, train, eval and a picture of the masks."""
    from featcache.machine import pick_device
    from slotlab.commands import demo_job, terminal
    from slotlab.commands.tables import scores_table
    from slotlab.config.load import load_config

    settings = load_config("default", optim__steps=steps, seed=seed)
    chosen = pick_device(device)
    say = terminal.err.print
    say("1/4 extracting DINOv2 ViT-S/14 features of the embedded MOVi-A sample", style="bold")
    with terminal.ExtractProgress() as progress:
        store = demo_job.extract_sample(cache, chosen, progress)
    say("2/4 the scale of the features", style="bold")
    if not as_json:
        from featcache.scale.report import store_reports
        from slotlab.commands.tables import render

        terminal.out.print(render(store_reports(cache)))
    say(f"3/4 training {settings.optim.steps} steps of {settings.optim.batch_size} frames", style="bold")
    with terminal.training_display(settings.optim.steps) as show:
        result = demo_job.train_and_score(settings, store, out, chosen, show)
    say("4/4 scores on videos that training never saw", style="bold")
    if as_json:
        print_json(result.scores.as_dict())
    else:
        terminal.out.print(scores_table(result.scores))
        terminal.warn(result.scores.warnings)
        terminal.out.print(f"picture of the masks  {result.sheet}")
        terminal.out.print(f"run folder            {result.run}")
        terminal.out.print(f"feature store         {cache}")
        terminal.out.print()
        terminal.out.print("On your own data:")
        terminal.out.print("  slotlab extract --backbone dinov2 --data VIDEOS --out cache/mine.zarr")
        terminal.out.print("  slotlab train --cache cache/mine.zarr --out runs/mine")
        terminal.out.print("  slotlab eval runs/mine --sheet masks.png")
