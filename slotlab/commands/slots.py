"""slotlab slots: a run's slots of every video, as data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Device, Json, print_json
from slotlab.words import SlotFormat

if TYPE_CHECKING:
    from slotlab.dynamics.tracks import Identity


def slots(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    cache: Annotated[Path | None, typer.Option(help="Store of the same features, instead of the run's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Store of tracks, or file with --format; default: tracks.zarr in the run.")
    ] = None,
    form: Annotated[
        SlotFormat, typer.Option("--format", help="zarr: a store, to train on; npz, hdf5: one file for other programs.")
    ] = "zarr",
    actions: Annotated[
        Path | None,
        typer.Option(help="Actions to store beside the slots, a vector a frame: HDF5, or .npz with SPLIT/NAME."),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Follow every video and store its slots: vectors, soft masks, centroids, areas, and the identity of each track."""
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.dynamics.actions import read_actions
    from slotlab.dynamics.files import write_file
    from slotlab.dynamics.tracks import make_tracks, store_identity
    from slotlab.runs.folder import tracks_path
    from slotlab.runs.loaded import load_run

    if form != "zarr" and out is None:
        raise UsageError(f"--format {form}: name the file with --out FILE")
    loaded = load_run(run, cache, pick_device(device))
    place = out if out is not None and form == "zarr" else tracks_path(run)
    pushes = None if actions is None else read_actions(actions, loaded.store)
    with terminal.ExtractProgress() as progress:
        store = make_tracks(loaded, place, progress, pushes)
    found = {name: store_identity(store[name]) for name in store.splits}
    if not as_json:
        for name, of in found.items():
            terminal.out.print(f"{name}: {_said(of, films=max(store[name].spec.lengths) > 1)}")
    if form != "zarr":
        assert out is not None
        write_file(store, out, form)
    written = place if form == "zarr" else out
    if as_json:
        told = {
            name: None if of is None else {"identity": of.accuracy, "covered": of.covered, "visible": of.visible}
            for name, of in found.items()
        }
        print_json({"run": str(run), "out": str(written), "format": form, "splits": told})
        return
    source = f"--run {run}" if place == tracks_path(run) else f"--cache {place}"
    videos = any(length > 1 for name in store.splits for length in store[name].spec.lengths)
    then = f" Next: slotlab train --preset dynamics {source}" if videos else ""  # single images have no next frame
    terminal.out.print(f"{written}: slots written.{then}")


def _said(of: "Identity | None", films: bool) -> str:
    if of is None or of.covered is None:
        return "no ground truth to compare the tracks with"
    if of.accuracy is None:
        return "no object is held by a slot in any frame"
    if not films:
        return f"{of.covered:.1%} of visible objects are held; single images have no identity to keep"
    return (
        f"slots keep their object in {of.accuracy:.1%} of the frames in which they hold one; "
        f"{of.covered:.1%} of visible objects are held"
    )
