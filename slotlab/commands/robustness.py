"""slotlab robustness: a run's masks under other colours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from slotlab.commands.options import Device, Json, print_json

COLUMNS = {
    "mask_stability": "mask IoU",
    "mask_correlation": "corr.",
    "slot_similarity": "slots",
    "slot_diversity": "diversity",
}  # and the scores


def robustness(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    cache: Annotated[Path | None, typer.Option(help="Store of the same features, instead of the run's own.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to look at; default: the configuration's, validation.")
    ] = None,
    max_videos: Annotated[
        int, typer.Option(min=1, help="Number of videos, spread over the split; each passes the backbone again.")
    ] = 8,
    frames: Annotated[int, typer.Option(min=1, help="Number of frames of each video, from its first.")] = 6,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file of the backbone, if it has moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Masks and slots when only the colours change: hue, brightness, contrast, saturation, grey, channels, jitter.

    Uses some videos and frames by default, as every transformation runs the backbone again. The result is kept in the
    run folder as robustness-SPLIT.json.
    """
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.commands.splits import chosen_split
    from slotlab.commands.tables import plain_table
    from slotlab.runs.folder import keep_result
    from slotlab.runs.loaded import load_run
    from slotlab.scoring.metrics import shown
    from slotlab.scoring.robustness import robustness as measure

    loaded = load_run(run, cache, pick_device(device))
    chosen = chosen_split(loaded, split)
    with terminal.ExtractProgress() as progress:
        result = measure(loaded, chosen.name, max_videos=max_videos, frames=frames, weights=weights, progress=progress)
    terminal.warn(keep_result(run, loaded.store, result, "robustness"))
    if as_json:
        print_json(result)
        return
    mean, scores = result["mean"], shown("headline")
    columns = COLUMNS | scores

    def cells(values: Mapping[str, Any], which: str = "mean") -> list[float | None]:
        return [values.get(key, {}).get(which) for key in columns]

    rows = [("before", *cells(result["before"])), *((n, *cells(v)) for n, v in result["transformations"].items())]
    rows += [("mean", *cells(mean)), ("  95 % from", *cells(mean, "low")), ("  to", *cells(mean, "high"))]
    terminal.out.print(
        plain_table(("colours", *columns.values()), rows, f"{result['run']} on {result['split']} under other colours")
    )
    for key, name in scores.items():
        change = mean.get(f"{key}_change", {"mean": None})
        if change["mean"] is not None:
            bounds = (f"{value:+.3f}" for value in change.values() if value is not None)
            terminal.out.print(f"{name} changes by {' / '.join(bounds)} (mean / interval)")
    terminal.out.print(
        f"first {result['frames_a_video']} frames of {result['videos']} of {result['videos_in_split']} videos",
        f"mean: over all colours except identity; {result['interval']}",
        f"running the backbone again changes the stored features by {result['relative_error']:.1e}",
        sep="\n",
        style="dim",
    )
