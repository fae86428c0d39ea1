"""Data sources: videos from MOVi files, TFDS, folders and HDF5, all read as the same ``Video`` record."""

from __future__ import annotations

from pathlib import Path

from featcache.errors import DataError, UsageError
from featcache.sources.reading import Reading
from featcache.sources.video import Instance, Source, Video

__all__ = ["Instance", "Reading", "Source", "Video", "open_source", "sample_dir"]

SAMPLE = "sample:movi_a"
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
PARTIAL = "?partial"


def open_source(location: str | Path | None = None, reading: Reading | None = None) -> Source:
    """Open the source at ``location``; ``None`` is the embedded sample. ``reading`` says how to read its files.

    ==========================================  ======================================================
    ``sample:movi_a``                           the embedded sample
    a folder with ``features.json`` in or below MOVi in its TFRecord layout, read without TensorFlow;
                                                ``FOLDER?partial`` takes the shards that are there
    ``tfds:movi_a/256x256?data_dir=DIR``        any TFDS video data set, through TensorFlow (extra ``tf``)
    a file ending in .h5, .hdf5 or .hdf         arrays ``video`` or ``image``, optionally ``mask``
    any other folder, or one video file         videos, or images, optionally with ``masks/``
    ==========================================  ======================================================

    Raises ``DataError`` if nothing readable is there, ``UsageError`` if the location itself is wrong.
    """
    from featcache.sources.folder import FolderSource

    reading = reading or Reading()
    source = _open(location, reading)
    if reading.mask_colours and not isinstance(source, FolderSource):
        raise UsageError(f"{source.location}: --mask-colours is for folders of mask images; here masks are numbers")
    return source


def _open(location: str | Path | None, reading: Reading) -> Source:
    if location is None or str(location) == SAMPLE:
        from featcache.sources.movi import MoviSource

        return MoviSource(sample_dir(), location=SAMPLE, reading=reading)
    name = str(location)
    if name.startswith("tfds:"):
        from featcache.sources.tfds import TfdsSource

        return TfdsSource(name, reading)
    if "://" in name:
        raise UsageError(
            f"{name}: remote addresses are not read directly; download the files and give their folder, "
            "or write tfds:NAME?data_dir=ADDRESS"
        )
    partial = name.endswith(PARTIAL) and not Path(name).exists()
    path = Path(name.removesuffix(PARTIAL) if partial else name).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give a folder of videos, a MOVi folder or an HDF5 file")
    if path.is_file() and path.suffix.lower() in HDF5_SUFFIXES:
        from featcache.sources.hdf5 import Hdf5Source

        return Hdf5Source(path, reading)
    if ".tfrecord" in path.name and path.is_file():
        raise DataError(f"{path}: one shard alone is not readable; give its folder, which holds features.json")
    if path.is_dir():
        from featcache.sources.movi import MoviSource, find_features

        if (directory := find_features(path)) is not None:
            return MoviSource(directory, location=name, partial=partial, reading=reading)
    from featcache.sources.folder import FolderSource

    return FolderSource(path, reading)


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
