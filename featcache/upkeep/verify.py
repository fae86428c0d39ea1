"""Verifies a store: compares its files with its specifications and manifest.

Chunks must have the manifest's checksums, metadata and tables must match what ``featcache.store`` would write, and real
features must be finite. One chunk is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.metadata import ArrayV3Metadata

from featcache.errors import DataError
from featcache.moments import Moments
from featcache.store import manifest
from featcache.store.durable import TEMPORARY
from featcache.store.layout import (
    COMPRESSED,
    METADATA,
    ArrayLayout,
    array_layouts,
    chunk_numbers,
    chunk_path,
    split_metadata,
    tables,
)
from featcache.store.reading import FeatureStore
from featcache.store.shards import read_chunk
from featcache.store.spec import SplitSpec, StoreSpec
from featcache.store.writing import read_split_spec, refuse_foreign

Kind = Literal["chunk", "manifest", "metadata", "extra", "table", "statistics"]


@dataclass(frozen=True)
class Damage:
    """A difference from the manifest and the specifications, in one video or in a whole split."""

    split: str
    video: int | None
    id: str
    what: str
    kind: Kind = "chunk"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> tuple[str, int | str, str, str]:
        return self.split, "" if self.video is None else self.video, self.id, self.what


def verify(path: Path) -> list[Damage]:
    """The damage of a store; an empty list means that every finished video is sound.

    Raises ``DataError`` if there is no store, or if its root metadata, which everything else depends on, is lost.
    """
    store = open_root(path)
    return [damage for name in split_names(path) for damage in verify_split(store.spec, path / name)]


def open_root(path: Path) -> FeatureStore:
    """The store at ``path``. ``DataError`` if it is missing, or, with a remedy, if its root metadata is lost."""
    try:
        return FeatureStore.open(path)
    except DataError as error:
        if path.exists():
            refuse_foreign(path)  # raises for a missing root
        if any(path.glob(f"*/{manifest.NAME}")):
            raise DataError(
                f"{path / METADATA}: damaged, and with it the specification of the features; "
                "put back a copy of that file, or extract to another --out"
            ) from error
        raise


def split_names(path: Path) -> list[str]:
    """The names of folders that are, or were, splits."""
    return sorted({file.parent.name for name in (manifest.NAME, METADATA) for file in path.glob(f"[!.]*/{name}")})


def verify_split(store: StoreSpec, folder: Path) -> Iterator[Damage]:
    """The damage of the split in ``folder``."""
    split = folder.name
    try:
        spec = read_split_spec(folder)
    except DataError:
        if (folder / manifest.NAME).exists():
            yield Damage(split, None, "", f"{split}/{METADATA} is missing or damaged", "metadata")
        return  # without it nothing else can be checked
    if not (folder / manifest.NAME).exists():
        if spec.statistics_videos:  # otherwise its creation was never finished
            yield Damage(split, None, "", f"{split}/{manifest.NAME} is missing", "manifest")
        return
    yield from _metadata(store, spec, folder)
    rows, broken = manifest.scan(folder)
    for number, reason in broken.items():
        yield Damage(split, None, "", f"{split}/{manifest.NAME} line {number} is no row ({reason})", "manifest")
    layouts = array_layouts(store, spec)
    for video, row in rows.items():
        if why := _contradiction(row, spec, layouts):
            yield Damage(split, video, row.id, why, "manifest")
            continue
        for layout in layouts:
            for what in chunk_problems(folder, spec, layout, row):
                yield Damage(split, video, row.id, what)
    for file in extra_files(folder, spec, layouts):
        yield Damage(split, None, "", f"{split}/{file.relative_to(folder)} does not belong there", "extra")
    if spec.statistics_videos:
        missing = set(spec.held) - set(rows)
        for video in sorted(missing):
            yield Damage(split, video, "", "is not in the manifest of a split that was complete", "manifest")
        if not missing:
            yield from _tables(folder, spec, rows)
        for tap, tap_spec in store.taps.items():
            frames = sum(spec.lengths if spec.part else (row.frames for row in rows.values()))
            if why := _statistics_problem(folder / "statistics" / tap, frames, frames * tap_spec.patches):
                yield Damage(split, None, "", f"{split}/statistics/{tap} {why}", "statistics")


# -- chunks ------------------------------------------------------------------------------------------------


def chunk_problems(folder: Path, spec: SplitSpec, layout: ArrayLayout, row: manifest.Row) -> Iterator[str]:
    """Descriptions of damage in one video's chunks of one array, each with its file."""
    frames, length = spec.chunk_frames, row.frames
    for place, number in enumerate(chunk_numbers(spec, row.video)):
        file = chunk_path(folder / layout.name, number // max(1, spec.shard_chunks), layout.ndim)
        where = f"{folder.name}/{file.relative_to(folder)}"
        real = min(frames, length - place * frames)
        try:
            data = checked_chunk(folder, spec, layout, row, place)
            if layout.name in COMPRESSED and real == frames:
                continue  # a matching checksum is enough
            values = layout.decode(data, frames)
        except ValueError as error:
            yield f"{where} {error}"
            continue
        if values.dtype == np.float16 and (bad := int(_non_finite(values[:real]).sum())):
            yield f"{where} has {bad} non-finite values"
        if not np.array_equal(values[real:], np.full_like(values[real:], layout.fill), equal_nan=layout.fill != 0):
            yield f"{where} has values in its padding"


def checked_chunk(folder: Path, spec: SplitSpec, layout: ArrayLayout, row: manifest.Row, place: int) -> bytes:
    """The encoded bytes of a video's chunk number ``place``. ``ValueError`` describes damage."""
    data = read_chunk(folder / layout.name, spec, chunk_numbers(spec, row.video)[place], layout.ndim)
    if data is None:
        raise ValueError("is missing")
    found, expected = google_crc32c.value(data), row.crc32c[layout.name][place]
    if found != expected:
        raise ValueError(f"has checksum {found:08x}, the manifest says {expected:08x}")
    return data


def _non_finite(values: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """``~isfinite`` of float16 values, several times faster than numpy, which converts to float32."""
    exponent = np.uint16(0x7C00)
    return np.asarray((values.view(np.uint16) & exponent) == exponent)


def _contradiction(row: manifest.Row, spec: SplitSpec, layouts: list[ArrayLayout]) -> str | None:
    if not 0 <= row.video < len(spec.lengths):
        return f"is in the manifest of a split of {len(spec.lengths)}"
    if row.fingerprint and spec.fingerprints and row.fingerprint != spec.fingerprints[row.video]:
        return f"was made from files of fingerprint {row.fingerprint}, the split says {spec.fingerprints[row.video]}"
    if row.frames != spec.lengths[row.video]:
        return f"has {row.frames} frames in the manifest, {spec.lengths[row.video]} in the split"
    chunks = len(chunk_numbers(spec, row.video))
    if {name: len(sums) for name, sums in row.crc32c.items()} != {layout.name: chunks for layout in layouts}:
        return "has a manifest row of other arrays or chunks than the store's"
    return None


def extra_files(folder: Path, spec: SplitSpec, layouts: list[ArrayLayout]) -> Iterator[Path]:
    """Files among the chunks that no metadata explains. Chunks of unfinished videos are not damage."""
    files = -(-spec.rows // (spec.chunk_frames * max(1, spec.shard_chunks)))
    for layout in layouts:
        array = folder / layout.name
        known = {chunk_path(array, number, layout.ndim).name for number in range(files)} | {METADATA}
        for file in sorted(array.iterdir()) if array.is_dir() else ():
            if file.name not in known and file.suffix not in (TEMPORARY, ".partial"):  # the next writer deletes those
                yield file


# -- metadata, tables, statistics --------------------------------------------------------------------------


def _metadata(store: StoreSpec, spec: SplitSpec, folder: Path) -> Iterator[Damage]:
    for name, expected in split_metadata(store, spec).items():
        if why := metadata_problem(folder / name, expected):
            yield Damage(folder.name, None, "", f"{folder.name}/{name} {why}", "metadata")


def metadata_problem(file: Path, expected: bytes) -> str | None:
    """The difference between a zarr.json and the expected one; None if they mean the same."""
    wanted = json.loads(expected)
    try:
        found = json.loads(file.read_bytes())
        if found["node_type"] != wanted["node_type"] or found["zarr_format"] != wanted["zarr_format"]:
            return "is of another kind of node"
        if wanted["node_type"] == "group":
            return None
        return _array_problem(_described(found), _described(wanted))
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # zarr raises many kinds
        return f"is damaged ({type(error).__name__})"


def _described(document: dict[str, Any]) -> dict[str, Any]:
    # Parsed by zarr, so that documents by its other versions compare by meaning.
    return {k: v for k, v in ArrayV3Metadata.from_dict(document).to_dict().items() if k != "attributes"}


def _array_problem(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    rows, rest = found["shape"][0], tuple(found["shape"][1:])
    # An interrupted growth leaves more rows; they hold no finished video.
    if rows < wanted["shape"][0] or rest != tuple(wanted["shape"][1:]):
        return f"has shape {tuple(found['shape'])}, not {tuple(wanted['shape'])}"
    for key in sorted(set(found) | set(wanted)):
        if key != "shape" and repr(found.get(key)) != repr(wanted.get(key)):  # repr, because NaN equals nothing
            return f"has another {key}"
    return None


def _tables(folder: Path, spec: SplitSpec, rows: Mapping[int, manifest.Row]) -> Iterator[Damage]:
    for name, table in tables(spec, rows).items():
        try:
            array = zarr.open_array(str(folder / name), mode="r")
            labels = array.attrs.get("labels")
            same = np.array_equal(np.asarray(array[...]), table.values) and labels == (
                None if table.labels is None else list(table.labels)
            )
            why = None if same else "disagrees with the manifest"
        except Exception as error:  # zarr and its codecs raise many kinds
            why = f"cannot be read ({type(error).__name__})"
        if why:
            yield Damage(folder.name, None, "", f"{folder.name}/{name} {why}", "table")


def _statistics_problem(folder: Path, frames: int, tokens: int) -> str | None:
    try:
        group = zarr.open_group(str(folder), mode="r")
        arrays = {name: np.asarray(array[...]) for name, array in group.arrays()}
        moments = Moments.from_arrays(arrays)
    except Exception as error:
        return f"cannot be read ({type(error).__name__})"
    if not all(np.isfinite(values).all() for values in arrays.values()):
        return "are not finite"
    if (moments.frames, moments.tokens) != (frames, tokens):
        return f"cover {moments.frames} frames of {moments.tokens} tokens, not {frames} of {tokens}"
    return None
