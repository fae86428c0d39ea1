"""What becomes of a split when its source is no longer what it was: which videos stay, come, are made anew or go.

A video is known by its fingerprint, wherever its file lies now and whatever it is called; one whose fingerprint is
new, by its name. Its place in the store is that of its arrival, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.errors import IncompatibleError, compare_settings
from featcache.sources.fingerprint import digest
from featcache.sources.video import Source
from featcache.store.manifest import Row
from featcache.store.reading import Split
from featcache.store.spec import SplitSpec, refuse_if_different

NAMED = 3  # videos that a line names


@dataclass(frozen=True)
class Found:
    """The videos of a split as its source has them now; hashes are made when they are first asked for."""

    source: Source
    split: str
    stride: int = 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(-(-length // self.stride) for length in self.source.lengths(self.split))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.source.names(self.split))

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        return tuple(self.source.fingerprints(self.split))

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint(self.split)

    def video(self, index: int) -> tuple[str, str, int]:
        """Name, fingerprint and frames of one."""
        return self.names[index], self.fingerprints[index], self.lengths[index]

    def has(self, index: int | None, fingerprint: str) -> bool:
        """Whether a video is there, and as it was."""
        return index is not None and self.fingerprints[index] == fingerprint


@dataclass(frozen=True)
class Changes:
    """The videos of a split by what becomes of them, each by its name."""

    kept: int = 0  # finished, and as they were
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()  # finished, and made anew because their files are others now
    vanished: tuple[str, ...] = ()  # finished, and no longer in the source
    removed: tuple[str, ...] = ()  # no longer in the source, and so taken from the store
    new: tuple[str, ...] = ()  # in the source alone, and not asked for

    def counts(self) -> dict[str, int]:
        return {key: value if isinstance(value, int) else len(value) for key, value in asdict(self).items()}

    def lines(self, where: str, location: str) -> list[str]:
        """What a person must know of them, a line each."""
        said = (
            (self.changed, "{video} changed in {source} since {it} {was} stored, and {is_} made anew"),
            (self.vanished, "{video} {is_} no longer in {source}; the store keeps {them}, --prune removes {them}"),
            (self.removed, "{video} {is_} no longer in {source}, and {is_} removed from the store"),
            (self.added if self.kept else (), "{video} {is_} added"),
            (self.new, "{video} of {source} {is_} not in the store; --grow adds {them}"),
        )
        one = {"video": "1 video", "it": "it", "them": "it", "was": "was", "is_": "is"}
        lines = []
        for names, text in said:
            several = {"video": f"{len(names)} videos", "it": "they", "them": "them", "was": "were", "is_": "are"}
            listed = ", ".join([*names[:NAMED], *(["..."] if names[NAMED:] else [])])
            words = one if len(names) == 1 else several
            lines += [f"{where}: {text.format(source=location, **words)}: {listed}"] if names else []
        return lines


@dataclass(frozen=True)
class Settled:
    """What a split shall be, and where each of its videos is in the source; None where it is no longer."""

    spec: SplitSpec
    origins: tuple[int | None, ...]
    changes: Changes = field(default_factory=Changes)
    finished: frozenset[int] = frozenset()  # videos that need no work


def settle(
    fresh: SplitSpec, found: Found, split: Split | None, max_videos: int | None, grow: bool, prune: bool
) -> Settled:
    """Settle a split that is extracted for the first time (``split`` is None), or again.

    ``fresh`` is what the source alone would make of it. Raises ``IncompatibleError`` where the store's videos are not
    the source's.
    """
    if split is None or not split.manifest:
        return _fresh(fresh, found, max_videos)
    present = replace(split.spec, statistics_videos=0)
    asked = {**fresh.form(), "chunk_frames": present.chunk_frames, "shard_chunks": present.shard_chunks}
    refuse_if_different(split.path, present.form(), asked)
    if split.complete and _is_same(present, found, max_videos):
        everything = range(len(present.lengths))
        return Settled(present, tuple(everything), Changes(len(everything)), frozenset(everything))
    if not present.fingerprints:
        present = _adopted(split.path, present, found)
    return _Merge(present, split, found, max_videos, grow, prune).settled()


def _fresh(fresh: SplitSpec, found: Found, max_videos: int | None) -> Settled:
    spec = replace(
        fresh,
        lengths=found.lengths[:max_videos],
        names=found.names[:max_videos],
        fingerprints=found.fingerprints[:max_videos],
        skipped=tuple(found.source.damaged(found.split)),
    )
    return Settled(spec, tuple(range(len(spec.lengths))), Changes(added=spec.names))


def _is_same(present: SplitSpec, found: Found, max_videos: int | None) -> bool:
    """Whether the source is as it was, and the split has all that is asked for, in the source's order."""
    videos = len(present.lengths)
    wanted = min(len(found.names), max_videos or len(found.names))
    same = present.names or found.names[:videos]
    return (
        present.source_fingerprint == found.fingerprint
        and same == found.names[:videos]
        and present.lengths == found.lengths[:videos]
        and videos >= wanted
    )


def _adopted(path: Path, present: SplitSpec, found: Found) -> SplitSpec:
    """A split of version 0.1, which had one fingerprint for all of its videos, with one of each."""
    videos = len(present.lengths)
    known: tuple[dict[str, Any], dict[str, Any]] = (
        {"source_fingerprint": present.source_fingerprint, "lengths": present.lengths},
        {"source_fingerprint": found.fingerprint, "lengths": found.lengths[:videos]},
    )
    refuse_if_different(path, *known)
    return replace(present, names=found.names[:videos], fingerprints=found.fingerprints[:videos])


def match(present: SplitSpec, found: Found) -> tuple[int | None, ...]:
    """The place in the source of each video of a split: by name and fingerprint, by fingerprint, or else by name."""
    here = list(zip(present.names, present.fingerprints, strict=True))
    there = list(zip(found.names, found.fingerprints, strict=True))
    pairs: dict[int, int] = {}
    keys: tuple[Callable[[tuple[str, str]], Any], ...] = (lambda both: both, lambda both: both[1], lambda both: both[0])
    for key in keys:
        free: dict[Any, list[int]] = {}
        taken = set(pairs.values())
        for index in reversed(range(len(there))):
            if index not in taken:
                free.setdefault(key(there[index]), []).append(index)
        for place, video in enumerate(here):
            if place not in pairs and (places := free.get(key(video))):
                pairs[place] = places.pop()
    return tuple(pairs.get(place) for place in range(len(here)))


def arranged(split: SplitSpec, rows: Mapping[int, Row], found: Found) -> SplitSpec:
    """``split`` with the videos that its finished rows and its source tell of; more may follow than it had."""
    if not all(row.fingerprint for row in rows.values()):  # version 0.1, which kept the source's order
        return replace(split, source_fingerprint=found.fingerprint, lengths=found.lengths)
    origins = match(_with_videos(split, [(row.id, row.fingerprint, row.frames) for row in rows.values()]), found)
    finished = {
        video: (_name(found, origin, row), row.fingerprint, row.frames)
        for (video, row), origin in zip(rows.items(), origins, strict=True)
    }
    others = iter(sorted(set(range(len(found.names))) - set(origins)))
    videos: list[tuple[str, str, int]] = []
    while True:
        if len(videos) in finished:
            videos.append(finished[len(videos)])
        elif (origin := next(others, None)) is not None:
            videos.append(found.video(origin))
        else:
            return replace(_with_videos(split, videos), source_fingerprint=found.fingerprint)


def _name(found: Found, origin: int | None, row: Row) -> str:
    return found.names[origin] if origin is not None and found.has(origin, row.fingerprint) else row.id


def _with_videos(split: SplitSpec, videos: Sequence[tuple[str, str, int]]) -> SplitSpec:
    names, fingerprints, lengths = zip(*videos, strict=True) if videos else ((), (), ())
    return replace(split, names=names, fingerprints=fingerprints, lengths=lengths)


@dataclass(frozen=True)
class _Merge:
    """A split and its source brought together."""

    present: SplitSpec
    split: Split
    found: Found
    max_videos: int | None
    grow: bool
    prune: bool

    def settled(self) -> Settled:
        present, found, finished = self.present, self.found, self.split.manifest
        origins = match(present, found)
        unchanged = [found.has(origin, f) for origin, f in zip(origins, present.fingerprints, strict=True)]
        if not any(unchanged):
            raise IncompatibleError(
                f"{self.split.path}: {found.source.location} has none of its videos",
                compare_settings(
                    {"source_fingerprint": present.source_fingerprint}, {"source_fingerprint": found.fingerprint}
                ),
                "choose another --out or delete the store",
            )
        names: dict[str, list[str]] = {key: [] for key in ("changed", "vanished", "removed")}
        videos: list[tuple[str, str, int]] = []
        places: list[int | None] = []
        done: set[int] = set()
        for video, (origin, known) in enumerate(zip(origins, present.videos, strict=True)):
            if origin is None and (self.prune or video not in finished):
                names["removed"].append(known[0])
                continue
            if origin is None:
                names["vanished"].append(known[0])
            if video in finished and (origin is None or unchanged[video]):
                done.add(len(videos))
                videos.append(known)
            else:
                assert origin is not None
                if video in finished:
                    names["changed"].append(known[0])
                videos.append((known[0], found.fingerprints[origin], found.lengths[origin]))
            places.append(origin)
        added, new = self._others(origins, len(videos))
        videos += [found.video(index) for index in added]
        spec = self._spec(videos, held_back=bool(new))
        changes = Changes(
            kept=len(done) - len(names["vanished"]),
            added=tuple(found.names[i] for i in added),
            new=tuple(found.names[i] for i in new),
            **{key: tuple(values) for key, values in names.items()},
        )
        return Settled(spec, (*places, *added), changes, frozenset(done))

    def _others(self, origins: Sequence[int | None], videos: int) -> tuple[list[int], list[int]]:
        """Videos that the source alone has: those to add to the ``videos`` of the split, and those not asked for."""
        others = sorted(set(range(len(self.found.names))) - set(origins))
        expected = self.grow or self.present.source_fingerprint == self.found.fingerprint
        wanted = [i for i in others if expected or self.found.names[i] in self.present.skipped]
        room = len(others) if self.max_videos is None else max(0, self.max_videos - videos)
        rest = sorted(set(others) - set(wanted))
        return wanted[:room], rest[: max(0, room - len(wanted))]

    def _spec(self, videos: Sequence[tuple[str, str, int]], held_back: bool) -> SplitSpec:
        if tuple(videos) == self.present.videos:
            return self.present
        here = self.found.fingerprint
        return replace(
            _with_videos(self.present, videos),
            # The source's own says that all of its videos were asked for, if not more than --max-videos.
            source_fingerprint=digest((here, *(known[1] for known in videos))) if held_back else here,
            skipped=tuple(self.found.source.damaged(self.found.split)),
        )
