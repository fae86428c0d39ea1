"""Options and output functions that commands share."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from featcache import words
from featcache.errors import UsageError
from featcache.words import FramesAs

CACHE_FOLDER = Path("cache")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1, mps ...")]
Precision = Literal["auto", words.Precision]
Cache = Annotated[Path, typer.Option("--cache", help="Store made by slotlab extract.", show_default=False)]
MaskColours = Annotated[bool, typer.Option("--mask-colours", help="Masks by colour: each colour is one object.")]
IgnoreLabel = Annotated[str | None, typer.Option(help="Number of void pixels in masks; a colour: #rrggbb; or none.")]
AsFrames = Annotated[FramesAs | None, typer.Option(help="Meaning of the images of a folder: one video, or one each.")]


def parse_size(option: str, text: str | None) -> int | tuple[int, int] | None:
    """``N`` pixels a side, or ``ROWSxCOLUMNS``. ``UsageError`` for anything else."""
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() for side in sides):
        raise UsageError(f"{option} {text}: give N, or ROWSxCOLUMNS such as 224x392")
    return (int(sides[0]), int(sides[1])) if sides[1:] else int(text)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(value))
