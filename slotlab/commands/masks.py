"""slotlab masks and segment: masks as files, for the videos of a store or for your own pictures and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Device, Json, print_json
from slotlab.words import MaskFormat, Refinement

FRAMES_A_SECOND = 12.0  # the frame rate of MOVi

Out = Annotated[Path, typer.Option(help="Folder to make or add to.")]
Refined = Annotated[Refinement | None, typer.Option(help="Method that refines masks along the frames' edges.")]
Fps = Annotated[float, typer.Option(min=1, help="Frames per second of mp4 and gif.")]


def masks(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Out,
    cache: Annotated[Path | None, typer.Option(help="Store of the same features, instead of the run's own.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to write; default: the configuration's, validation.")] = None,
    videos: Annotated[
        int | None, typer.Option(min=1, help="Number of videos, spread over the split; default: all.")
    ] = None,
    form: Annotated[
        MaskFormat, typer.Option("--format", help="Format of the files; png: label maps, rle: one COCO file.")
    ] = "png",
    refine: Refined = None,
    fps: Fps = FRAMES_A_SECOND,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a run's masks of a split: PNG label maps, COCO run lengths, or the frames with the masks laid over."""
    from featcache.machine import pick_device
    from slotlab.commands import terminal
    from slotlab.commands.splits import chosen_split
    from slotlab.pictures.files import MaskWriter, store_masks
    from slotlab.runs.loaded import load_run

    loaded = load_run(run, cache, pick_device(device))
    chosen = chosen_split(loaded, split)
    with terminal.ExtractProgress() as progress, MaskWriter(out, form, fps) as writer:
        for masked in store_masks(loaded, chosen.name, videos, refine, progress):
            writer.add(masked)
    _tell(out, writer.files, as_json)


def segment(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, and folders of pictures (each a video).")],
    out: Out,
    form: Annotated[
        MaskFormat, typer.Option("--format", help="Format of the files; png: label maps, rle: one COCO file.")
    ] = "overlay-png",
    refine: Refined = None,
    fps: Fps = FRAMES_A_SECOND,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file of the backbone, if it has moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Segment pictures and videos of your own with a trained run."""
    if missing := [path for path in files if not path.exists()]:
        raise UsageError(f"{missing[0]}: no such file; name pictures, videos, or folders of pictures")
    from slotlab.pictures.files import Masked, MaskWriter
    from slotlab.pictures.frames import read_path
    from slotlab.segment import load

    segmenter = load(run, device=device, weights=weights)
    with MaskWriter(out, form, fps) as writer:
        for index, path in enumerate(files):
            frames = read_path(path)
            labels = segmenter.label(frames, refine=refine)
            writer.add(Masked(f"{index:04d}-{path.stem}", frames, labels, segmenter.model.slots))
    _tell(out, writer.files, as_json)


def _tell(out: Path, files: int, as_json: bool) -> None:
    from slotlab.commands import terminal

    if as_json:
        print_json({"out": str(out), "files": files})
    else:
        terminal.out.print(f"{out}: {files} files written")
