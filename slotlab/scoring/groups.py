"""Scores of parts of a split (materials, sizes, categories, numbers of objects), and their confidence intervals.

Frames of one video resemble each other, so videos are the sample: intervals come from a bootstrap that draws whole
videos with replacement (a cluster bootstrap; Davison & Hinkley 1997, ch. 3.8, percentile intervals).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from featcache.store.reading import Split
from slotlab.scoring.intervals import LEVEL, Bootstrap, Interval
from slotlab.scoring.metrics import visible
from slotlab.scoring.scores import Scores, Summary, Values, in_order, mean

Intervals = Mapping[str, Interval | None]  # by a score's key, with _video behind it for whole videos

METHOD = "percentile bootstrap over videos"
ATTRIBUTES = ("material", "size", "category")  # of an instance; scores are grouped by them


def objects_by(split: Split, labels: int, attribute: str) -> Iterator[tuple[str, Tensor]]:
    """The objects with each value of ``attribute``, in the order of the values: (videos, labels - 1) bool."""
    found: dict[str, int] = {"": 0}
    numbers = torch.zeros(max(split.videos) + 1, labels - 1, dtype=torch.int32)  # of the values, by object
    for video in split.videos:
        of = [found.setdefault(getattr(each, attribute), len(found)) for each in split.instances(video)]
        numbers[video, : len(of)] = torch.tensor(of, dtype=torch.int32)
    for name in sorted(found.keys() - {""}):
        yield name, numbers == found[name]


@dataclass(frozen=True)
class Confidence:
    """Intervals of the scores of a split and of its groups; None where too few videos have a value."""

    level: float
    method: str
    resamples: int
    seed: int
    total: Intervals
    groups: Mapping[str, Mapping[str, Intervals]]  # by_material -> metal -> score

    def as_dict(self) -> dict[str, Any]:
        method = {"level": self.level, "method": self.method, "resamples": self.resamples, "seed": self.seed}
        return method | dict(self.total) | {key: dict(groups) for key, groups in self.groups.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The intervals of :meth:`as_dict`, by this version or an earlier one."""
        groups = {key: of for key, of in raw.items() if key.startswith("by_")}
        total: Intervals = in_order(raw)
        level, method = raw.get("level", LEVEL), raw.get("method", METHOD)
        return cls(level, method, raw.get("resamples", 0), raw.get("seed", 0), total, groups)


@dataclass(frozen=True)
class Groups:
    """Scores of the parts of a split and of its videos, with intervals."""

    summaries: Mapping[str, Mapping[str, Summary]]  # by_material -> metal; by_size; by_objects -> "3"
    by_video: Mapping[str, Values]  # a video's name -> its scores: over frames, of groups (mbo_metal), as a whole
    confidence: Confidence


def subgroup_scores(scores: Scores, split: Split, bootstrap: Bootstrap | None = None) -> Groups:
    """Scores of objects by their attributes, of frames by their number of objects, and of each video."""
    bootstrap = bootstrap or Bootstrap()
    (tables, frame_videos), (_, ids) = scores.frame_tables(), scores.video_tables()

    def sure(parts: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> dict[str, Intervals]:
        """Intervals of each of some parts from the same draws, which cost more than the scores."""
        of_frames = {(name, key): of for name, (frames, _) in parts.items() for key, of in frames.items()}
        of_videos = {(name, f"{key}_video"): of for name, (_, videos) in parts.items() for key, of in videos.items()}
        found = bootstrap.intervals(of_frames, frame_videos)
        if len(ids) == len(frame_videos):  # images: each is its video
            found |= {(name, f"{key}_video"): found[name, key] for name, (_, of) in parts.items() for key in of}
        else:
            found |= bootstrap.intervals(of_videos, ids)
        return {name: {key: found[part, key] for part, key in found if part == name} for name in parts}

    summaries: dict[str, dict[str, Summary]] = {}
    intervals: dict[str, dict[str, Intervals]] = {}
    of_frames, of_videos = scores.frame_values(), scores.video_values()
    named = dict(of_frames)  # scores of each frame, by name
    rare: set[str] = set()  # those of which a video defines few: it has some of eighty categories
    for attribute in ATTRIBUTES:
        parts = {name: scores.part(objects) for name, objects in objects_by(split, tables.shape[1], attribute)}
        summaries[f"by_{attribute}"] = {name: part.summary for name, part in parts.items()}
        intervals[f"by_{attribute}"] = sure({name: (part.frames, part.videos) for name, part in parts.items()})
        for name, part in parts.items():
            more = {f"{score}_{name}": values for score, values in part.frames.items()}
            named |= more
            if attribute == "category":
                rare.update(more)
    summaries["by_objects"], intervals["by_objects"] = {}, {}
    shown = visible(tables)  # (F,) number of visible objects
    for count in sorted(set(shown.tolist())):
        here = shown == count
        values = {name: of[here] for name, of in of_frames.items()}
        summaries["by_objects"][str(count)] = Summary(
            int(here.sum()), len(set(frame_videos[here].tolist())), {name: mean(of) for name, of in values.items()}
        )
        intervals["by_objects"][str(count)] = bootstrap.intervals(values, frame_videos[here])
    by_video = dict(_by_video(split, named, rare, frame_videos, of_videos, ids))
    how = (bootstrap.level, METHOD, bootstrap.resamples, bootstrap.seed)
    return Groups(summaries, by_video, Confidence(*how, sure({"": (of_frames, of_videos)})[""], intervals))


def _by_video(
    split: Split,
    of_frames: Mapping[str, Tensor],
    rare: Set[str],
    frames: Tensor,
    of_videos: Mapping[str, Tensor],
    ids: Tensor,
) -> Iterator[tuple[str, Values]]:
    """Each video's name, with its means over frames (``rare`` ones where defined), and its scores as a whole."""
    position = torch.searchsorted(ids, frames)  # (F,): each frame's row in ids
    means = {name: _means_of(values, position, len(ids)) for name, values in of_frames.items()}
    wholes = {
        f"{name}_video": _means_of(values, torch.arange(len(ids)), len(ids)) for name, values in of_videos.items()
    }
    for row, video in enumerate(ids.tolist()):
        known = {name: of[row] for name, of in means.items() if name not in rare or of[row] is not None}
        yield split.names[video], known | {name: of[row] for name, of in wholes.items()}


def _means_of(values: Tensor, position: Tensor, videos: int) -> list[float | None]:
    """Mean of each video's values (F,) that are not NaN; None where all are."""
    known = ~values.isnan()
    sums = values.new_zeros(videos).index_add_(0, position, values.nan_to_num(0.0))
    counts = values.new_zeros(videos).index_add_(0, position, known.to(values.dtype))
    return [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]
