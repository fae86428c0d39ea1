"""slotlab rollout: what a dynamics run predicts, scored."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Device, Json, print_json


def rollout(
    run: Annotated[Path, typer.Argument(help="Run folder of a dynamics run (slotlab train --preset dynamics).")],
    cache: Annotated[Path | None, typer.Option(help="Store of the features, if it has moved.")] = None,
    tracks: Annotated[Path | None, typer.Option(help="Store of tracks, instead of the run's own.")] = None,
    dense: Annotated[
        Path | None, typer.Option(help="Run of --preset dynamics-dense on the same features, for a row beside it.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to score; default: the configuration's, validation.")] = None,
    without_entering: Annotated[
        bool, typer.Option("--without-entering", help="Leave out videos that an object enters after the seen frames.")
    ] = False,
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw: truth, rollout and copy over the frames.")] = None,
    film: Annotated[
        Path | None,
        typer.Option(help="Film of the same, as .mp4, .gif or .webp: truth, rollout, constant velocity, copy."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Roll out a world model: features, masks and places to come, beside rows that learn nothing and an oracle."""
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.commands.splits import chosen_split
    from slotlab.commands.tables import rollout_tables
    from slotlab.dynamics.rollout import features_at, load_dense, load_dynamics, roll_out
    from slotlab.dynamics.rows import ROWS
    from slotlab.pictures.files import FILMS
    from slotlab.runs.folder import keep_result

    if sheet and sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: is drawn as PNG; name a file that ends in .png")
    if film and film.suffix.lower() not in FILMS:
        raise UsageError(f"--film {film}: name a file that ends in {', '.join(FILMS)}")
    loaded = load_dynamics(run, tracks, pick_device(device))
    features, chosen = features_at(loaded.store, cache), chosen_split(loaded, split)
    also = []
    if sheet or film:
        from slotlab.pictures.strip import Strips, pick_strips

        strips = Strips(chosen, pick_strips(chosen))
        also.append(strips.add)
    rows = ROWS if dense is None else ROWS | {"dense": load_dense(dense, loaded, features)}
    found = roll_out(loaded, features, chosen, rows, without_entering=without_entering, also=also)
    result = found.as_dict()
    terminal.warn(keep_result(run, loaded.store, result, "rollout"))
    if sheet:
        strips.draw(sheet)
    if film:
        strips.film(film)
    if as_json:
        print_json(result)
        return
    terminal.out.print(*rollout_tables(found))
    if found.entering:
        left = "left out" if without_entering else "counted; --without-entering leaves them out"
        terminal.err.print(f"note: an object enters after the seen frames in {len(found.entering)} videos, {left}")
