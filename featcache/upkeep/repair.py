"""Repairs a store: writes again what its specifications and manifest determine, and makes the rest again.

Damaged videos lose their manifest rows, which makes the store unfinished. The extractor then extracts them, or they are
copied again from the store's origin, if it was exported. A repair that is killed therefore leaves a store that the next
extraction, export or repair finishes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zarr

from featcache.backbones.backbone import Backbone
from featcache.errors import DataError, IncompatibleError, UsageError, compare_settings
from featcache.extraction.changes import Found, arranged, match
from featcache.extraction.extract import Progress, extract
from featcache.extraction.job import SplitJob, merge
from featcache.extraction.plan import ExtractPlan, SplitPlan
from featcache.extraction.store_backbone import refuse_other_backbone, store_backbone
from featcache.moments import Moments
from featcache.sources import Reading, open_source
from featcache.sources.video import Source
from featcache.store import manifest
from featcache.store.durable import write_tree
from featcache.store.layout import array_layouts, fitting_shards, split_metadata
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, refuse_if_different
from featcache.store.writing import StoreWriter, read_split_spec, save_split_spec
from featcache.upkeep.convert import ConvertOptions, convert, copied_spec, open_origin
from featcache.upkeep.verify import Damage, extra_files, metadata_problem, open_root, verify, verify_split

READ_ALIKE = ", and --ignore-label, --mask-colours and --frames-as as they were then"


@dataclass(frozen=True)
class Means:
    """Inputs of a repair; None stands for what the store names."""

    data: str | Source | None = None
    weights: str | None = None
    backbone: Backbone | None = None
    device: str = "cpu"
    reading: Reading | None = None  # of ``data``

    def source(self, store: FeatureStore) -> Source:
        """The source of the store's videos. ``DataError`` if it is gone."""
        if self.data is not None and not isinstance(self.data, str):
            return self.data
        try:
            return open_source(self.data or store.spec.source, self.reading)
        except DataError as error:
            raise DataError(f"{error} (the store's own source; name where it is now with --data)") from error


def repair(path: Path, means: Means | None = None, progress: Progress = lambda *_: None) -> list[Damage]:
    """Repair a store and return its damage. Everything sound stays untouched.

    Nothing is deleted before a check that it can be made again. Raises ``DataError`` if the root metadata, the source
    or the weights are gone, ``IncompatibleError`` if they are not the store's.
    """
    means = means or Means()
    found = verify(path)
    if not found:
        return []
    store = open_root(path)
    unknown = {d.split for d in found if d.kind == "metadata"}
    if any(read_split_spec(path / name).part for name in store.splits if name not in unknown):
        raise UsageError(
            f"{path}: has one rank's videos of {store.spec.exported_from}; delete {path} and make it again with "
            "slotlab export --for-ranks"
        )
    with StoreWriter(path, store.spec):
        for name in sorted(unknown):
            _restore_metadata(store, path / name, means)
    # Lost metadata had hidden the damage in the rest of its split.
    damage = {name: list(verify_split(store.spec, path / name)) for name in sorted({d.split for d in found})}
    found += [d for split in damage.values() for d in split if d not in found]

    lost = {n: _lost(path / n, split) for n, split in damage.items() if _must_be_made_again(path / n, split)}
    make_again = _prepare(store, lost, means, progress) if lost else None
    with StoreWriter(path, store.spec) as writer:
        for name, split in damage.items():
            _forget(store.spec, path / name, split)
            if name not in lost and any(d.kind != "extra" for d in split):
                _finish(writer, name)
    if make_again:
        make_again()
    return found


def _must_be_made_again(folder: Path, damage: list[Damage]) -> bool:
    """Whether a complete split has lost videos; an unfinished split is left to ``slotlab extract``."""
    complete = read_split_spec(folder).statistics_videos > 0
    return complete and any(d.kind in ("chunk", "manifest") for d in damage)


def _lost(folder: Path, damage: list[Damage]) -> list[int]:
    """The videos of a complete split that must be made again."""
    rows, bad = manifest.scan(folder)[0], {d.video for d in damage}
    return [video for video in range(len(read_split_spec(folder).lengths)) if video not in rows or video in bad]


def _forget(store: StoreSpec, folder: Path, damage: list[Damage]) -> None:
    """Remove damaged videos from the manifest, and foreign files from the folder."""
    spec = read_split_spec(folder)
    kinds = {d.kind for d in damage}
    if kinds - {"extra"}:
        save_split_spec(folder, replace(spec, statistics_videos=0))  # first: it marks the split complete
    if kinds & {"chunk", "manifest"}:
        bad = {d.video for d in damage}
        rows, _ = manifest.scan(folder)
        manifest.replace_rows(folder, {video: row for video, row in rows.items() if video not in bad})
    for file in extra_files(folder, spec, array_layouts(store, spec)):
        shutil.rmtree(file) if file.is_dir() else file.unlink()


def _finish(writer: StoreWriter, name: str) -> None:
    """Write tables and statistics from the stored values, if every video exists."""
    path, store = writer.path, writer.spec
    with closing(writer.split(name, read_split_spec(path / name))) as split:
        if len(split.done) < len(split.spec.lengths):
            return
        job = SplitJob(split.path.absolute(), name, store, split.spec, str(path), resize_frames=False)
        # Merge in the original order, so that sums are rounded alike.
        groups = [range(v, v + 1) for v in split.done] if store.exported_from else job.groups()
        statistics: dict[str, Moments] = {}
        for group in groups:
            merge(statistics, job.measure(group, split.done, []))
        split.finish(statistics)


# -- making videos again -----------------------------------------------------------------------------------


def _prepare(
    store: FeatureStore, lost: Mapping[str, list[int]], means: Means, progress: Progress
) -> Callable[[], object]:
    """A function that makes the lost videos of some splits, after a check that it makes the same ones."""
    if store.spec.exported_from:
        return _prepare_copy(store, list(lost), means, progress)
    source, spec = means.source(store), store.spec
    splits = []
    for name, videos in lost.items():
        split = read_split_spec(store.path / name)
        splits.append(SplitPlan(name, split, _origins(store.path / name, split, videos, source, spec.frame_stride)))
    backbone = means.backbone or store_backbone(store, weights=means.weights, device=means.device)
    refuse_other_backbone(store, backbone)
    free = shutil.disk_usage(store.path).free
    # Stored frames have the size of the first extraction, whether or not it was an option then.
    plan = ExtractPlan(store.path, spec, tuple(splits), free, resize_frames=True)
    return lambda: extract(plan, source, backbone, progress)


def _origins(folder: Path, split: SplitSpec, lost: list[int], source: Source, stride: int) -> tuple[int | None, ...]:
    """Where a split's videos are in the source. ``IncompatibleError`` unless it has the lost ones as they were."""
    found = Found(source, folder.name, stride)
    origins: tuple[int | None, ...] = ()
    present: dict[str, Any]
    there: dict[str, Any]
    if folder.name not in source.splits():
        present, there = {"split": folder.name}, {"split": ", ".join(source.splits())}
    elif split.fingerprints:
        origins = match(split, found)
        present = {split.names[video]: split.fingerprints[video] for video in lost}
        there = {split.names[v]: None if (at := origins[v]) is None else found.fingerprints[at] for v in lost}
    else:
        origins = tuple(range(len(split.lengths)))
        present = {"source_fingerprint": split.source_fingerprint, "lengths": split.lengths}
        there = {"source_fingerprint": found.fingerprint, "lengths": found.lengths[: len(split.lengths)]}
    if differences := compare_settings(present, there):
        raise IncompatibleError(
            f"{folder}: {source.location} does not hold its videos",
            differences,
            f"give the same videos with --data{READ_ALIKE}",
        )
    return origins


def _prepare_copy(store: FeatureStore, names: list[str], means: Means, progress: Progress) -> Callable[[], object]:
    origin_path = _origin_path(store, means)
    origin, jobs = open_origin(origin_path), []
    for name in names:
        split = read_split_spec(store.path / name)
        chosen = split.shard_chunks == fitting_shards(store.spec, split)
        videos = None if chosen else split.shard_chunks // -(-max(split.lengths) // split.chunk_frames)
        options = ConvertOptions(store.spec.dtype, tuple(store.spec.taps), (name,), videos)
        jobs.append(options)
        refuse_if_different(store.path, store.spec.identity(), copied_spec(origin, options).identity())
        there = origin.splits[name].spec if name in origin.splits else None
        kept = {"source_fingerprint": split.source_fingerprint, "lengths": split.lengths}
        refuse_if_different(store.path / name, kept, {key: getattr(there, key, None) for key in kept})

    def copy() -> None:
        for options in jobs:
            convert(origin_path, store.path, options, progress=progress)

    return copy


def _origin_path(store: FeatureStore, means: Means) -> Path:
    path = Path(means.data if isinstance(means.data, str) else store.spec.exported_from)
    if not path.exists():
        raise DataError(f"{path}: gone, and {store.path} was exported from it; name where it is now with --data")
    return path


# -- metadata ----------------------------------------------------------------------------------------------


def _restore_metadata(store: FeatureStore, folder: Path, means: Means) -> None:
    """Write every zarr.json again that differs from the specifications."""
    try:
        spec = read_split_spec(folder)
    except DataError:
        spec = _rebuilt_spec(store, folder, means)
    documents = split_metadata(store.spec, spec)
    write_tree(folder, {name: data for name, data in documents.items() if metadata_problem(folder / name, data)})


def _rebuilt_spec(store: FeatureStore, folder: Path, means: Means) -> SplitSpec:
    """A split's lost specification, rebuilt from its arrays, its manifest and the source."""
    name, spec = folder.name, store.spec
    try:
        video = zarr.open_array(str(folder / "video"), mode="r")
    except Exception as error:
        raise DataError(
            f"{folder}: both its zarr.json and that of its video array are lost; delete {folder} and extract it again"
        ) from error
    rows, frames = manifest.scan(folder)[0], video.chunks[0]
    bare = SplitSpec(
        source_fingerprint="",
        lengths=(),
        chunk_frames=frames,
        frame_size=(video.shape[1], video.shape[2]),
        masks=(folder / "segmentations").is_dir(),
        ignored=(folder / "ignored").is_dir(),
        shard_chunks=video.shards[0] // frames if video.shards else 0,
    )
    if spec.exported_from:
        origin = open_origin(_origin_path(store, means))
        if name not in origin.splits:
            raise DataError(f"{origin.path}: has no split {name}; name the store's origin with --data")
        made = replace(origin.splits[name].spec, **bare.form())
    else:
        made = arranged(bare, rows, Found(means.source(store), name, spec.frame_stride))
    ends = made.starts[1:].tolist()
    if video.shape[0] not in ends or any(
        row not in range(len(made.lengths)) or rows[row].frames != made.lengths[row] for row in rows
    ):
        raise IncompatibleError(
            f"{folder}: the source does not hold its videos; give the same ones with --data{READ_ALIKE}"
        )
    videos = ends.index(video.shape[0]) + 1
    if spec.exported_from and len(rows) < videos:  # which of the two, the lost specification said
        raise DataError(
            f"{folder}: its zarr.json is lost, and it has {len(rows)} of the {videos} videos of {spec.exported_from}: "
            f"one rank's, or an unfinished export; delete {store.path} and run the same slotlab export command again"
        )
    return replace(
        made,
        lengths=made.lengths[:videos],
        names=made.names[:videos],
        fingerprints=made.fingerprints[:videos],
        # Verification checks tables and statistics only of a split that is marked complete.
        statistics_videos=videos if len(rows) == videos else 0,
    )
