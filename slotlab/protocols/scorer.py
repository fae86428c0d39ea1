"""Scores a run under any number of protocols, from one pass over its videos."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from featcache.sources.video import Size
from featcache.store.reading import Split
from slotlab.masks.labels import masks_to_labels
from slotlab.protocols.detections import Detections, confidence
from slotlab.protocols.protocol import Unit
from slotlab.protocols.scores import SCORES, DetectionScore, TableScore, TrackScore, counted
from slotlab.protocols.store import Applied
from slotlab.scoring.follow import Followed
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.metrics import visible
from slotlab.scoring.refined import Refined
from slotlab.scoring.scores import mean
from slotlab.scoring.tables import contingency, labelled_frames, mask_tables
from slotlab.scoring.tracks import track_scores


@dataclass(frozen=True)
class Sized:
    """A followed video with its truth at the size that is scored."""

    followed: Followed
    size: Size
    fine: Tensor | None = None  # the slot of each pixel (T, H, W) of refined masks, at the size of the store's frames

    @cached_property
    def truth(self) -> Tensor:
        """Labels (T, H, W) int16: of each pixel, the stored one that its centre lies in."""
        truth = self.followed.truth
        assert truth is not None
        return _resized(truth, self.size)

    @cached_property
    def labelled(self) -> Tensor:
        """Frames (T,) with pixels of known truth."""
        return labelled_frames(self.truth)

    @cached_property
    def counts(self) -> Tensor:
        """Pixels (T, labels + 1, K) int64 of each label in each slot, those of unknown truth in the first row.

        Frames of which nothing is known have no pixels.
        """
        masks, labels, truth = self.followed.masks, self.followed.labels + 1, self.truth + 1
        if self.fine is None:
            counts = mask_tables(masks, truth, labels)
        else:
            pairs = zip(self.slots.flatten(1), truth.flatten(1), strict=True)
            counts = torch.cat([contingency(one[None], true[None], masks.shape[1], labels) for one, true in pairs])
        return counts * self.labelled.view(-1, 1, 1)

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each pixel (T, H, W): soft masks bilinearly to the size, then argmax; of refined ones, the
        pixel of the stored frame that it lies in."""
        if self.fine is None:
            return masks_to_labels(self.followed.masks, self.size)
        return _resized(self.fine, self.size).long()


class Collector(Protocol):
    """Collects one unit of one protocol, video by video."""

    def add(self, video: Sized) -> None: ...

    def result(self) -> dict[str, Any]:
        """Counts and scores by key, JSON-able."""


ByUnit = dict[Unit, list[Collector]]
Collected = tuple[Applied, ByUnit]


class Tables:
    """Scores of contingency tables."""

    def __init__(self, applied: Applied, unit: Unit, keys: Sequence[str], classes: Classes) -> None:
        self._unit, self._chunk, self._void, self._classes = unit, applied.terms.chunk, applied.terms.void, classes
        self._scores = {key: score for key in keys if isinstance(score := SCORES[key], TableScore)}
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._visible: list[Tensor] = []
        self._videos: list[Tensor] = []

    def add(self, video: Sized) -> None:
        counts = self._units(video.counts)
        counts = counts[counts[:, 1:].sum((1, 2)) > 0]
        if not len(counts):
            return
        self._visible.append(visible(counts[:, 1:]))
        self._videos.append(torch.full((len(counts),), video.followed.video))
        for key, score in self._scores.items():
            if score.rows == "classes":
                merged = self._classes.merged(counts, video.followed.video)
                self._values[key].append(score.of(counted(merged, self._void, "classes")))
            else:
                self._values[key].append(score.of(counted(counts, self._void, score.rows)))

    def _units(self, counts: Tensor) -> Tensor:
        """Sums (U, ...) of the counts of frames (T, ...)."""
        if self._unit == "frame":
            return counts
        length = len(counts) if self._unit == "video" else self._chunk
        units = len(counts) // length
        return counts[: units * length].reshape(units, length, *counts.shape[1:]).sum(1)

    def result(self) -> dict[str, Any]:
        if not self._videos:
            return {"units": 0, "without_objects": 0, "one_object": 0} | dict.fromkeys(self._scores)
        shown, videos = torch.cat(self._visible), torch.cat(self._videos)
        values = {key: torch.cat(of) for key, of in self._values.items()}
        if not (shown > 1).any() and "fg_ari" in values:  # one object alone has no ARI
            values["fg_ari"] = torch.full_like(values["fg_ari"], torch.nan)
        if not self._classes:
            values |= {
                key: torch.full((len(shown),), torch.nan) for key, s in self._scores.items() if s.rows == "classes"
            }
        found = {"units": len(shown), "without_objects": int((shown == 0).sum()), "one_object": int((shown == 1).sum())}
        intervals = Bootstrap().intervals(values, videos)
        return found | {key: mean(of) for key, of in values.items()} | {"intervals": intervals}


class Tracks:
    """J, F and J&F of the objects of all videos."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._scores = {key: score for key in keys if isinstance(score := SCORES[key], TrackScore)}
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._videos: list[Tensor] = []
        self._left_out, self._units = 0, 0

    def add(self, video: Sized) -> None:
        truth = video.truth[video.labelled].numpy()
        if not (truth > 0).any():
            return
        found = track_scores(video.slots[video.labelled].cpu().numpy(), np.maximum(truth, 0), truth < 0)
        for key, score in self._scores.items():
            self._values[key].append(torch.from_numpy(getattr(found, score.of)))
        self._videos.append(torch.full((len(found.j),), video.followed.video))
        self._left_out, self._units = self._left_out + found.left_out, self._units + 1

    def result(self) -> dict[str, Any]:
        counts = {"units": self._units, "objects": sum(map(len, self._videos)), "tracks_left_out": self._left_out}
        if not self._videos:
            return counts | dict.fromkeys(self._scores)
        values = {key: torch.cat(of) for key, of in self._values.items()}
        intervals = Bootstrap().intervals(values, torch.cat(self._videos))
        return counts | {key: mean(of) for key, of in values.items()} | {"intervals": intervals}


class DetectedMasks:
    """AP and AR of all frames."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._scores = {key: score for key in keys if isinstance(score := SCORES[key], DetectionScore)}
        self._frames = Detections()

    def add(self, video: Sized) -> None:
        sure = confidence(video.followed.masks).numpy()
        for frame in video.labelled.nonzero().flatten().tolist():
            self._frames.add(video.slots[frame].cpu().numpy(), video.truth[frame].numpy(), sure[frame])

    def result(self) -> dict[str, Any]:
        stats = self._frames.stats() if len(self._frames) else [None] * 12
        return {"units": len(self._frames)} | {key: stats[score.of] for key, score in self._scores.items()}


class Classes:
    """The classes of a split's objects: their categories. Objects without one are a class together."""

    def __init__(self, split: Split) -> None:
        self._split = split

    @cached_property
    def _of(self) -> dict[int, list[str]]:
        return {video: [each.category for each in self._split.instances(video)] for video in self._split.videos}

    @cached_property
    def _names(self) -> list[str]:
        return sorted({"", *(name for of in self._of.values() for name in of)})

    def __bool__(self) -> bool:
        """Whether any object has one."""
        return any(self._names)

    def merged(self, counts: Tensor, video: int) -> Tensor:
        """Counts (U, classes + 2, K) of a video's counts (U, labels + 1, K): objects of one class are one."""
        of = self._of[video]
        names = of + [""] * (counts.shape[1] - 2 - len(of))
        rows = [0, 1, *(self._names.index(name) + 2 for name in names)]
        merged = counts.new_zeros((len(counts), len(self._names) + 2, counts.shape[2]))
        return merged.index_add_(1, torch.tensor(rows), counts)


class ProtocolScorer:
    """Collects the scores of a run on a split under several protocols, one followed video at a time.

    The masks as the model gives them are what published figures are of; those of ``refined``, if given, come beside.
    """

    def __init__(self, split: Split, applied: Sequence[Applied], slots: int, refined: Refined | None = None) -> None:
        """``slots`` is the number that the model has."""
        self._slots, self._refined = slots, refined
        classes, films = Classes(split), max(split.spec.lengths) > 1

        def collectors(of: Applied) -> ByUnit:
            units = [unit for unit in of.terms.scores if films or unit == "frame"]
            return {unit: list(_collectors(of, unit, classes)) for unit in units}

        self._plain = [(each, collectors(each)) for each in applied]
        self._fine = [(each, collectors(each)) for each in applied if refined]

    def add(self, followed: Followed) -> None:
        self._add(self._plain, followed)
        if self._refined and self._fine:
            self._add(self._fine, followed, self._refined.slots(followed))

    @staticmethod
    def _add(collected: Sequence[Collected], followed: Followed, fine: Tensor | None = None) -> None:
        sized = {size: Sized(followed, size, fine) for size in {each.size for each, _ in collected}}
        for each, units in collected:
            for collectors in units.values():
                for collector in collectors:
                    collector.add(sized[each.size])

    def result(self) -> dict[str, Any]:
        """Scores, and what they are of, by the protocol's name; JSON-able."""
        found = {each.protocol.name: self._told(each, _scores(units)) for each, units in self._plain}
        if self._refined:
            for each, units in self._fine:
                found[each.protocol.name]["refined"] = {"method": self._refined.method, "scores": _scores(units)}
        return found

    def _told(self, applied: Applied, units: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
        terms = applied.terms
        return {
            "of": applied.protocol.of,
            "data": applied.data,
            **({"edition": applied.edition} if applied.edition else {}),
            "masks": list(applied.size),
            "slots": self._slots,
            "published_slots": terms.slots,
            "published_on": terms.data,
            "beside": applied.beside,
            **({"chunk": terms.chunk} if terms.chunk else {}),
            "scores": units,
        }


def _resized(labels: Tensor, size: Size) -> Tensor:
    """Labels (T, H, W) at another size, (T, *size)."""
    rows, columns = map(_nearest, labels.shape[1:], size)
    return labels[:, rows][:, :, columns]


def _nearest(stored: int, scored: int) -> Tensor:
    """The stored row or column under the centre of each that is scored, (scored,): torch's ``nearest-exact``."""
    return (2 * torch.arange(scored) + 1) * stored // (2 * scored)


def _scores(units: ByUnit) -> dict[Unit, dict[str, Any]]:
    return {unit: _joined(of) for unit, of in units.items()}


def _joined(collectors: Sequence[Collector]) -> dict[str, Any]:
    found: dict[str, Any] = {"intervals": {}}
    for collector in collectors:
        result = collector.result()
        found["intervals"] |= result.pop("intervals", {})
        found |= result
    return found


def _collectors(applied: Applied, unit: Unit, classes: Classes) -> Iterator[Collector]:
    keys = applied.terms.scores[unit]
    kinds = {type(SCORES[key]) for key in keys}
    if TableScore in kinds:
        yield Tables(applied, unit, keys, classes)
    if TrackScore in kinds:
        yield Tracks(keys)
    if DetectionScore in kinds:
        yield DetectedMasks(keys)
