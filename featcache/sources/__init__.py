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
    "sample_dir",
]

SAMPLE = "sample:movi_a"


@cache
def published() -> tuple[Layout, ...]:
    """The layouts of data sets, which lie in folders of their own."""
    from featcache.sources import clevrer, clevrtex, coco, davis, multi_object, voc, youtube

    videos = (davis.LAYOUT, youtube.VIS, youtube.VOS, clevrer.LAYOUT)
    return (*videos, voc.LAYOUT, coco.LAYOUT, clevrtex.LAYOUT, multi_object.LAYOUT)


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout that is read, in the order in which a place is tried: the first that it fits reads it."""
    from featcache.sources import folder, hdf5, movi, tfds

    return (*published(), hdf5.LAYOUT, movi.LAYOUT, tfds.LAYOUT, folder.LAYOUT)


def open_source(location: str | Path | None = None, reading: Reading | None = None) -> Source:
    """Open the source at ``location``; ``None`` is the embedded sample. ``reading`` says how to read its files.

    A location is ``[LAYOUT:]PATH[?option[=value]&...]``: a folder or a file in one of ``layouts()``, which is found by
    what lies there unless it is named. ``tfds:NAME?data_dir=DIR`` goes through TensorFlow, ``sample:movi_a`` is the
    embedded sample.

    Raises ``DataError`` if nothing readable is there, ``UsageError`` if the location itself is wrong.
    """
    reading = reading or Reading()
    if location is None or str(location) == SAMPLE:
        from featcache.sources.movi import MoviSource

        _require_numbers(SAMPLE, reading)
        return MoviSource(sample_dir(), location=SAMPLE, reading=reading)
    place = place_of(str(location))
    layout = _layout(place)
    if unknown := sorted(place.options.keys() - set(layout.options)):
        known = ", ".join(layout.options) or "none"
        raise UsageError(
            f"{location}: no option {unknown[0]!r} after the question mark for {layout.of}; known: {known}"
        )
    if not place.layout and layout is layouts()[-1] and place.path.is_dir():
        _refuse_inner(place)
    if not layout.colours:
        _require_numbers(place.location, reading)
    return layout.open(place, reading)


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
    if location == SAMPLE:
        return "movi"
    place = place_of(location)
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


def sample_dir() -> Path:
    """Folder of the embedded sample: in the repository, or packed in the wheel. ``DataError`` if in neither."""
    package = Path(__file__).resolve().parents[1]
    for root in (package.parent / "data" / "movi_a", package / "_sample" / "movi_a"):
        if found := sorted(root.glob("*/*/features.json")):
            return found[-1].parent
    raise DataError(
        f"the embedded sample is missing beside {package}: run from a clone of the repository (data/movi_a), "
        "reinstall the wheel, or name your own videos with --data"
    )
