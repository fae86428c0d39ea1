"""Single frames with a run's masks, kept while its videos are followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from featcache.store.reading import Split
from slotlab.scoring.follow import Followed
from slotlab.scoring.metrics import scores_in


def pick_videos(split: Split, materials: Sequence[str] = ("metal",), each: int = 3) -> list[int]:
    """Up to ``each`` labelled videos whose objects all have one of the materials, then up to ``each`` mixed ones."""
    pure = {v: {i.material for i in split.instances(v)} in [{m} for m in materials] for v in split.videos}

    def some(alike: bool) -> list[int]:
        return list(islice((v for v in split.videos if pure[v] == alike and split.labelled(v).any()), each))

    return some(True) + some(False)


@dataclass(frozen=True)
class Still:
    """The middle frame of a video, or the labelled one nearest to it, with a run's masks: a row of the sheet."""

    video: int
    frame: int
    masks: Tensor  # (1, K, rows, columns)
    objects: Mapping[int, int]  # slot -> its object, 0 for label 1
    scores: Mapping[str, float]  # by title

    @classmethod
    def of(cls, followed: Followed) -> Still:
        t = followed.middle
        objects = {slot: item for slot, item in enumerate(followed.objects[t].tolist()) if item >= 0}
        scores = {}
        if followed.truth is not None:
            scores = {score.title: float(followed.score(score)[t]) for score in scores_in("headline")}
        return cls(followed.video, t, followed.masks[t : t + 1].clone(), objects, scores)


class Stills:
    """Keeps the stills of some videos as they are followed."""

    def __init__(self, videos: Iterable[int]) -> None:
        self._videos = tuple(videos)
        self._found: dict[int, Still] = {}

    def add(self, followed: Followed) -> None:
        if followed.video in self._videos:
            self._found[followed.video] = Still.of(followed)

    def result(self) -> list[Still]:
        """The stills in the order of the videos."""
        return [self._found[video] for video in self._videos]
