"""Scores of parts of a split (materials, sizes, crowded frames), how sure they are, and whether two runs differ.

Frames of one video resemble each other, so the videos are what is sampled: intervals come from a bootstrap that
draws whole videos with replacement (a cluster bootstrap; Davison & Hinkley 1997, ch. 3.8, percentile intervals),
and the test between two runs pairs the same videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon
from torch import Tensor

from featcache.errors import IncompatibleError
from featcache.store.reading import Split
from slotlab.scoring.intervals import LEVEL, Bootstrap, Interval, Values
from slotlab.scoring.scores import Scores

ATTRIBUTES = ("material", "size")  # of an instance, that scores are told apart by


def objects_by(split: Split, labels: int, attribute: str) -> dict[str, Tensor]:
    """Which objects of which video share a label of ``attribute``: its name -> (videos, labels - 1) bool."""
    instances = {video: split.instances(video) for video in split.videos}
    names = sorted({getattr(instance, attribute) for of in instances.values() for instance in of} - {""})
    chosen = {name: torch.zeros(max(split.videos) + 1, labels - 1, dtype=torch.bool) for name in names}
    for video, of in instances.items():
        for k, instance in enumerate(of):
            if name := getattr(instance, attribute):
                chosen[name][video, k] = True
    return chosen


def subgroup_scores(scores: Scores, split: Split, labels: int, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """What an evaluation adds: ``by_material``, ``by_size``, ``by_objects``, ``by_video`` and ``confidence``.

    ``by_objects`` groups the frames by how many objects they show. ``confidence`` holds the intervals of the
    totals and, under the same names, of every group.
    """
    bootstrap = bootstrap or Bootstrap()
    (tables, frame_videos), (_, ids) = scores.frame_tables(), scores.video_tables()
    confidence: dict[str, Any] = {
        "level": bootstrap.level,
        "method": "percentile bootstrap over videos",
        "resamples": bootstrap.resamples,
        "seed": bootstrap.seed,
    }

    def sure(objects: Tensor | None = None) -> dict[str, Interval | None]:
        of_videos = {f"{name}_video": values for name, values in scores.video_values(objects).items()}
        of_frames = bootstrap.intervals(scores.frame_values(objects), frame_videos)
        return of_frames | bootstrap.intervals(of_videos, ids)

    confidence |= sure()
    found: dict[str, Any] = {}
    of_frames = scores.frame_values()
    for attribute in ATTRIBUTES:
        groups = objects_by(split, labels, attribute)
        found[f"by_{attribute}"] = {name: scores.of_objects(objects) for name, objects in groups.items()}
        confidence[f"by_{attribute}"] = {name: sure(objects) for name, objects in groups.items()}
        for name, objects in groups.items():
            of_frames |= {f"{score}_{name}": values for score, values in scores.frame_values(objects).items()}
    found["by_objects"], confidence["by_objects"] = {}, {}
    shown = (tables[:, 1:].sum(-1) > 0).sum(-1)  # (F,) objects in sight
    for count in sorted(set(shown.tolist())):
        here = shown == count
        values = {name: of[here] for name, of in scores.frame_values().items()}
        found["by_objects"][str(count)] = {
            "frames": int(here.sum()),
            "videos": len(set(frame_videos[here].tolist())),
            **{name: _mean(of) for name, of in values.items()},
        }
        confidence["by_objects"][str(count)] = bootstrap.intervals(values, frame_videos[here])
    found["by_video"] = dict(_by_video(split, of_frames, frame_videos, scores.video_values(), ids))
    return found | {"confidence": confidence}


def _by_video(
    split: Split, of_frames: Mapping[str, Tensor], frames: Tensor, of_videos: Mapping[str, Tensor], ids: Tensor
) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Each video's mean over its frames, and its scores as a whole, by its name."""
    for row, video in enumerate(ids.tolist()):
        means = {name: _mean(values[frames == video]) for name, values in of_frames.items()}
        whole = {f"{name}_video": _mean(values[row]) for name, values in of_videos.items()}
        yield split.names[video], means | whole


def _mean(values: Tensor) -> float | None:
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Does ``one`` score otherwise than ``other`` on the same videos? Takes two evaluations of one split.

    For each score of ``by_video``: the mean over videos of the difference (one - other), its bootstrap interval,
    the two-sided p-value of Wilcoxon's signed-rank test (scipy, over the videos' differences), and in how many
    of the videos where both are defined ``one`` is ahead. The sample are the videos: what another seed would
    give is not in it. Raises ``IncompatibleError`` when the evaluations are of other videos.
    """
    for key in ("split", "resolution"):
        if one[key] != other[key]:
            raise IncompatibleError(f"{other['run']}: its evaluation has {key} {other[key]}, {one['run']}'s {one[key]}")
    if one["by_video"].keys() != other["by_video"].keys():
        raise IncompatibleError(
            f"{other['run']}: was evaluated on other videos than {one['run']}; compare runs on stores of one source"
        )
    return {
        "run": one["run"],
        "against": other["run"],
        "split": one["split"],
        "test": "Wilcoxon signed-rank over videos, two-sided",
        "interval": f"{LEVEL:.0%} percentile bootstrap over videos",
        "scores": paired_scores(one["by_video"], other["by_video"]),
    }


def paired_scores(
    one: Mapping[str, Mapping[str, float | None]], other: Mapping[str, Mapping[str, float | None]]
) -> dict[str, dict[str, Any]]:
    """The differences that :func:`paired` reports, by score; video id -> score -> value on both sides."""
    names = dict.fromkeys(name for scores in one.values() for name in scores)
    found = {}
    for name in names:
        pairs = [(one[video][name], other[video].get(name)) for video in one]
        both = np.array([(a, b) for a, b in pairs if a is not None and b is not None], np.float64).reshape(-1, 2)
        if len(both):
            found[name] = _difference(both[:, 0], both[:, 1])
    return found


def _difference(one: Values, other: Values) -> dict[str, Any]:
    differences = one - other
    # scipy warns, and answers NaN, when nothing differs
    p = 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)
    interval = Bootstrap().of_mean(differences)
    return {
        "run": float(one.mean()),
        "against": float(other.mean()),
        "difference": float(differences.mean()),
        "low": interval and interval[0],
        "high": interval and interval[1],
        "p": p,
        "videos": len(differences),
        "ahead": int((differences > 0).sum()),
    }
