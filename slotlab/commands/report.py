"""slotlab report and view: the page on runs, as a file or served."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.text import bytes_text
from slotlab.commands.options import Device, Json, print_json

Runs = Annotated[list[Path], typer.Argument(help="Run folders, the first to compare against.", show_default=False)]
Split = Annotated[str | None, typer.Option(help="Split to report; default: the configuration's, validation.")]
Store = Annotated[Path | None, typer.Option("--cache", help="Store of the same features, instead of the run's own.")]
Videos = Annotated[int, typer.Option(min=0, help="Number of videos in the gallery: half the worst, half the best.")]
Rank = Annotated[str, typer.Option(help="Score that ranks the videos: its key in eval --json.")]
Frames = Annotated[int, typer.Option(min=1, help="Largest number of frames of a video, evenly spaced.")]
Title = Annotated[str | None, typer.Option(help="Title of the page; default: the run's name.")]


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="Page to write.")] = Path("report.html"),
    split: Split = None,
    cache: Store = None,
    videos: Videos = 6,
    rank: Rank = "mbo",
    frames: Frames = 48,
    title: Title = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file for the tables.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures, as PNG and SVG.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """One self-contained page of runs: scores, videos to look through, curves, configuration, provenance."""
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.report.options import PageOptions
    from slotlab.report.write import Extras, write_report

    found = write_report(
        runs,
        out,
        split=split,
        cache=cache,
        options=PageOptions(title, videos, rank, frames),
        extras=Extras(markdown, figures),
        device=pick_device(device),
        say=terminal.err.print,
    )
    if as_json:
        print_json(found)
        return
    terminal.out.print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {bytes_text(found['bytes'])}")
    for path in (found["markdown"], *found["figures"]):
        if path:
            terminal.out.print(path)


def view(
    runs: Runs,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 takes any free one.")] = 8000,
    browser: Annotated[bool, typer.Option(help="Browser opened on the page.")] = True,
    split: Split = None,
    cache: Store = None,
    videos: Videos = 6,
    rank: Rank = "mbo",
    frames: Frames = 48,
    title: Title = None,
    device: Device = "auto",
) -> None:
    """Serve the report on this machine and refresh it while the runs train. Ctrl-C ends it, with exit code 0."""
    import threading
    import webbrowser

    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.report.options import PageOptions
    from slotlab.report.server import HOST, LiveReport, serve

    live = LiveReport(
        runs, split, cache, PageOptions(title, videos, rank, frames), pick_device(device), terminal.err.print
    )
    with serve(live, port) as server:
        live.refresh()  # before the address is printed: errors appear here, not in the browser
        follower = threading.Thread(target=live.follow, daemon=True)
        follower.start()
        address = f"http://{HOST}:{server.server_port}/"
        terminal.out.print(f"{address}  (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the normal way to stop it
            terminal.err.print("stopped")
        finally:
            live.stop()
            follower.join(timeout=5)
