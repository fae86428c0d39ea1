"""slotlab eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Device, Json, Refine, print_json


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
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.commands.tables import paired_table, scores_table
    from slotlab.runs.folder import keep_result
    from slotlab.runs.loaded import load_run
    from slotlab.scoring.evaluate import evaluate as run_evaluate

    if sheet and sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: is drawn as PNG; name a file that ends in .png")
    loaded = load_run(run, cache, pick_device(device))
    fine = {}
    if boundaries or refine is not None or binarise:
        from slotlab.commands.tables import gains_table, outlines_table
        from slotlab.scoring.fine import outline_scores

        fine = outline_scores(loaded, split, refine, binarise or ())  # first, as it may lack a package
    found = replace(run_evaluate(loaded, split), fine=fine)
    result = found.as_dict()
    terminal.warn(keep_result(run, loaded.store, result))
    if sheet:
        from slotlab.pictures.sheet import draw_sheet

        draw_sheet(loaded, loaded.store[found.split], sheet)
    compared = None
    if against is not None:
        from slotlab.scoring.paired import paired

        compared = paired(found, run_evaluate(load_run(against, None, pick_device(device)), found.split))
    if as_json:
        print_json(result | ({"against": compared} if compared else {}))
    else:
        terminal.out.print(scores_table(found))
        terminal.warn(found.warnings)
        if fine:
            terminal.out.print(outlines_table(found), gains_table(found))
        if compared:
            terminal.out.print(paired_table(compared))
