"""slotlab masks and segment: masks as files, for the videos of a store or for your own pictures and videos."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from featcache.errors import UsageError
from slotlab.commands.options import Device, Json, parse_size, print_json
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
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[RUN] FILES...",
            help="Run folder (none with --no-training); then pictures, videos, and folders of pictures (each a video).",
        ),
    ],
    out: Out,
    form: Annotated[
        MaskFormat, typer.Option("--format", help="Format of the files; png: label maps, rle: one COCO file.")
    ] = "overlay-png",
    refine: Annotated[
        Literal["none", Refinement],
        typer.Option(help="Method that refines masks along the frames' edges; none: as the model gives them."),
    ] = "guided",
    frame_size: Annotated[
        int | None,
        typer.Option(min=1, help="Shorter side that larger pictures are scaled to; default: as they are."),
    ] = None,
    fps: Fps = FRAMES_A_SECOND,
    weights: Annotated[str | None, typer.Option(help="Checkpoint file of the backbone, if it has moved.")] = None,
    no_training: Annotated[
        bool, typer.Option("--no-training", help="Training-free segments: a backbone's features, and no run.")
    ] = False,
    backbone: Annotated[str | None, typer.Option(help="Backbone without a run; default: dinov2.")] = None,
    input_size: Annotated[
        str | None,
        typer.Option(help="Pixels that it sees: a side, or 224x392; more is finer. Default: the run's, or its own."),
    ] = None,
    cut: Annotated[
        float | None, typer.Option(min=0, help="Cut of segments, without a run; higher: fewer, larger ones.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Segment pictures and videos of your own, with a trained run or without any training."""
    size = parse_size("--input-size", input_size)
    files = paths if no_training else _after_run(paths, {"--backbone": backbone, "--cut": cut})
    if missing := [path for path in files if not path.exists()]:
        raise UsageError(f"{missing[0]}: no such file; name pictures, videos, or folders of pictures")
    from slotlab.commands import terminal
    from slotlab.pictures.files import Masked, MaskWriter
    from slotlab.pictures.frames import read_path
    from slotlab.segment import Segmenter, load, training_free

    segmenter: Segmenter
    told = {}
    if no_training:
        options = {} if cut is None else {"cut": cut}
        segmenter = training_free(
            files, backbone=backbone or "dinov2", input_size=size, device=device, weights=weights, **options
        )
        told["whitened_by"] = segmenter.measured
        terminal.err.print(f"features whitened by {segmenter.measured}")
    else:
        segmenter = load(paths[0], input_size=size, device=device, weights=weights)
    method = None if refine == "none" else refine
    with MaskWriter(out, form, fps) as writer:
        for index, path in enumerate(files):
            frames = read_path(path, frame_size)
            labels = segmenter.label(frames, refine=method)
            writer.add(Masked(f"{index:04d}-{path.stem}", frames, labels, segmenter.slots))
    _tell(out, writer.files, as_json, **told)


def _after_run(paths: list[Path], without_run: dict[str, object]) -> list[Path]:
    """The files that follow the run."""
    if given := [option for option, value in without_run.items() if value is not None]:
        raise UsageError(f"{given[0]}: a run has its own; leave it out, or segment without a run by --no-training")
    if paths[0].is_file():
        raise UsageError(f"{paths[0]}: is no run folder; name the run first, or segment without one by --no-training")
    if len(paths) == 1:
        raise UsageError(f"{paths[0]}: no pictures to segment; name them after the run")
    return paths[1:]


def _tell(out: Path, files: int, as_json: bool, **also: object) -> None:
    from slotlab.commands import terminal

    if as_json:
        print_json({"out": str(out), "files": files, **also})
    else:
        terminal.out.print(f"{out}: {files} files written")
