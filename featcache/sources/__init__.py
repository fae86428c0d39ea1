"""Data sources: videos from folders, HDF5 and the layouts of published data sets, all read as the same ``Video``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from featcache.errors import DataError, UsageError
from featcache.sources.place import Layout, Place
from featcache.sources.reading import Reading
from featcache.sources.video import Instance, Source, Video

__all__ = [
    "Instance",
    "Reading",
    "Source",
    "Video",
    "absolute",
    "layout_of",
    "layouts",
    "open_source",
    "place_of",
]

SAMPLE = "sample:movi_a"
VIEWS = "views"  # the option that every layout has


@cache
def published() -> tuple[Layout, ...]:
    """The layouts of data sets, which lie in folders of their own."""
    from featcache.sources import clevrer, clevrtex, coco, davis, multi_object, voc, youtube

    videos = (davis.LAYOUT, youtube.VIS, youtube.VOS, clevrer.LAYOUT)
    return (*videos, voc.LAYOUT, coco.LAYOUT, clevrtex.LAYOUT, multi_object.LAYOUT)


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that is read, in the order in which a place is tried: the first that it fits reads it."""
    from featcache.sources import folder, hdf5, movi, sample, tfds

    return (*published(), hdf5.LAYOUT, movi.LAYOUT, tfds.LAYOUT, sample.LAYOUT, folder.LAYOUT)


def open_source(location: str | Path | None = None, reading: Reading | None = None) -> Source:
    """Open the source at ``location``; ``None`` is the embedded sample. ``reading`` says how to read its files.

    A location is ``[LAYOUT:]PATH[?option[=value]&...]``: a folder or a file in one of ``layouts()``, which is found by
    what lies there unless it is named. ``tfds:NAME?data_dir=DIR`` goes through TensorFlow, ``sample:movi_a`` is the
    embedded sample. Any layout takes the option ``views=N`` (:mod:`featcache.sources.views`).

    Raises ``DataError`` if nothing readable is there, ``UsageError`` if the location itself is wrong.
    """
    reading = reading or Reading()
    place = place_of(SAMPLE if location is None else str(location))
    layout = _layout(place)
    options = (*layout.options, VIEWS)
    if unknown := sorted(place.options.keys() - set(options)):
        raise UsageError(
            f"{location}: no option {unknown[0]!r} after the question mark for {layout.of}; known: {', '.join(options)}"
        )
    if not place.layout and layout is layouts()[-1] and place.path.is_dir():
        _refuse_inner(place)
    if not layout.colours:
        _require_numbers(place.location, reading)
    source, views = layout.open(place, reading), place.number(VIEWS) or 1
    if views == 1:
        return source
    from featcache.sources.views import Views

    return Views(source, views)


def absolute(location: str) -> str:
    """The same location for a process with another working directory."""
    place = place_of(location)
    remote = any(each.name == place.layout and not each.local for each in layouts())
    return location if remote or not place.path.exists() else place.absolute()


def place_of(location: str) -> Place:
    """A location taken apart."""
    return Place.of(location, [each.name for each in layouts()])


def layout_of(location: str) -> str:
    """The name of the layout that a location is read in; empty where nothing is there any more to tell."""
    place = place_of(location)
    if place.layout == "sample":
        return "movi"
    if place.layout or not location or not place.path.exists():
        return place.layout
    return _layout(place).name


def _layout(place: Place) -> Layout:
    """The layout that a place names, or the first that it fits."""
    named = next((layout for layout in layouts() if layout.name == place.layout), None)
    if named and not named.local:
        return named
    if not named and "://" in place.location:
        raise UsageError(
            f"{place.location}: remote addresses are not read directly; download the files and give their folder, "
            "or write tfds:NAME?data_dir=ADDRESS"
        )
    if not place.path.exists():
        raise DataError(
            f"{place.path}: no such file or folder; give a folder of videos, an HDF5 file, or the folder of a data set "
            f"({', '.join(layout.name for layout in layouts())})"
        )
    return named or next(layout for layout in layouts() if layout.local and layout.fits(place.path))


def _refuse_inner(place: Place) -> None:
    """``DataError`` where a folder holds a published data set, whose annotations would be taken for videos."""
    for child in sorted(path for path in place.path.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if inner := next((layout for layout in published() if layout.fits(child)), None):
            raise DataError(
                f"{place.path}: holds {inner.of} in {child.name}; give {child}, or folder:{place.path} to read all as "
                "videos and frames"
            )


def _require_numbers(location: str, reading: Reading) -> None:
    if reading.mask_colours:
        raise UsageError(f"{location}: --mask-colours is for folders of mask images; here masks are numbers")
