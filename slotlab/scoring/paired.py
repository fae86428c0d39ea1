"""Tests whether two runs differ, on the same videos, paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from featcache.errors import IncompatibleError
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.intervals import LEVEL, Bootstrap, Float
from slotlab.scoring.metrics import score_of
from slotlab.scoring.scores import Values


def paired(one: Evaluation, other: Evaluation) -> dict[str, Any]:
    """The differences between two evaluations of one split, tested over the same videos; JSON-able.

    For each score of ``by_video``: the mean over videos of the difference (one - other), its bootstrap interval,
    the two-sided p-value of Wilcoxon's signed-rank test (scipy, over the videos' differences), and the number of
    videos (with both values) where ``one`` is ahead. The videos are the sample: the test says nothing about other
    seeds. Raises ``IncompatibleError`` if the evaluations are of different videos.
    """
    for key, ours, theirs in (
        ("split", one.split, other.split),
        ("resolution", one.resolution, other.resolution),
    ):
        if ours != theirs:
            raise IncompatibleError(f"{other.run}: its evaluation has {key} {theirs}, {one.run}'s {ours}")
    if one.by_video.keys() != other.by_video.keys():
        raise IncompatibleError(
            f"{other.run}: was evaluated on other videos than {one.run}; compare runs on stores of one source"
        )
    return {
        "run": one.run,
        "against": other.run,
        "split": one.split,
        "test": "Wilcoxon signed-rank over videos, two-sided",
        "interval": f"{LEVEL:.0%} percentile bootstrap over videos",
        "scores": paired_scores(one.by_video, other.by_video),
    }


def lower_is_better(name: str) -> bool:
    """Whether less of the score in ``SCORES`` that a name refers to is better."""
    score = score_of(name)
    return score is not None and not score.higher_is_better


def paired_scores(
    one: Mapping[str, Values], other: Mapping[str, Values], lower: Callable[[str], bool] = lower_is_better
) -> dict[str, dict[str, Any]]:
    """The differences that :func:`paired` reports, by score, from two mappings video name -> score -> value.

    ``lower`` says of a score's key whether less is better.
    """
    names = dict.fromkeys(name for scores in one.values() for name in scores)
    found = {}
    for name in names:
        pairs = [(one[video].get(name), other[video].get(name)) for video in one]
        both = np.array([(a, b) for a, b in pairs if a is not None and b is not None], np.float64).reshape(-1, 2)
        if len(both):
            found[name] = _difference(both[:, 0], both[:, 1], lower(name))
    return found


def _difference(one: Float, other: Float, lower: bool) -> dict[str, Any]:
    differences = one - other
    better = differences < 0 if lower else differences > 0
    # scipy warns and returns NaN if nothing differs
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
        "ahead": int(better.sum()),
    }
