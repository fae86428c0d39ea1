"""How the runs of an experiment are scored: by masks of what is seen, or, of a world model, by what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.model import ScoredBy
from slotlab.config.schema import Config
from slotlab.dynamics.measures import COMPARED_AT, MEASURES
from slotlab.dynamics.rollout import features_at, load_dynamics, roll_out
from slotlab.experiments.plan import Run
from slotlab.runs.loaded import evaluation_split, load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.metrics import shown, shown_of_videos
from slotlab.scoring.paired import lower_is_better
from slotlab.scoring.references import KnownReferences
from slotlab.scoring.scores import Values


@dataclass(frozen=True)
class Outcome:
    """A run's scores, as tables of experiments need them."""

    values: Values
    by_video: Mapping[str, Values]
    references: Mapping[str, Any] = field(default_factory=dict)  # JSON of the ceiling and floors


@dataclass(frozen=True)
class Scoring:
    """One way to score runs."""

    columns: Mapping[str, str]  # key -> title
    tested: Mapping[str, str]  # of these, what is tested against the first cell
    lower_is_better: Callable[[str], bool]  # of a key
    score: Callable[[Run, torch.device, KnownReferences], Mapping[str, Any]]  # what the run's folder keeps
    read: Callable[[Mapping[str, Any], str], Outcome]  # ... and this of it; ``DataError`` names its file


def _evaluated(run: Run, device: torch.device, known: KnownReferences) -> Mapping[str, Any]:
    return evaluate(load_run(run.path, FeatureStore.open(run.cell.cache).path, device), run.split, known).as_dict()


def _read_evaluation(raw: Mapping[str, Any], where: str) -> Outcome:
    found = Evaluation.from_dict(raw, where)
    values = {**found.values, "effective_slots": found.diagnostics.get("effective_slots")}
    return Outcome(values, found.by_video, found.references.as_dict())


def _rolled_out(run: Run, device: torch.device, known: KnownReferences) -> Mapping[str, Any]:
    loaded = load_dynamics(run.path, FeatureStore.open(run.cell.cache).path, device)
    return roll_out(loaded, features_at(loaded.store), loaded.split(run.split)).as_dict()


def _read_rollout(raw: Mapping[str, Any], where: str) -> Outcome:
    try:
        return Outcome(raw["values"], raw["by_video"])
    except KeyError as error:
        raise DataError(f"{where}: damaged, or of an earlier version ({error}); score the run again") from error


_PREDICTED = {
    f"{measure.key}_{ahead}": (f"{measure.title}, +{ahead}", measure.higher_is_better)
    for measure in MEASURES
    if measure.in_experiments
    for ahead in COMPARED_AT
}
SCORINGS: dict[ScoredBy, Scoring] = {
    "eval": Scoring(
        {**shown("comparison"), **shown_of_videos("comparison"), "effective_slots": "slots used"},
        shown("headline"),
        lower_is_better,
        _evaluated,
        _read_evaluation,
    ),
    "rollout": Scoring(
        {key: title for key, (title, _) in _PREDICTED.items()},
        {key: title for key, (title, _) in _PREDICTED.items() if key.startswith(("mse_", "mbo_moving_"))},
        lambda key: not _PREDICTED[key][1],
        _rolled_out,
        _read_rollout,
    ),
}


def scoring_of(config: Config) -> Scoring:
    """How runs of a configuration are scored."""
    return SCORINGS[config.model.scored_by]


def check_scores(config: Config, store: FeatureStore) -> None:
    """Raise ``UsageError`` or ``DataError`` unless a run on the store can be scored."""
    if config.model.kind == "dense":
        raise UsageError("predicts without slots; train it apart, and show it with slotlab rollout RUN --dense DENSE")
    if config.model.scored_by == "rollout":
        features_at(store)
    if not evaluation_split(config, store, config.data.eval_split).require_complete().has_truth:
        raise DataError(f"{store.path}: {config.data.eval_split} has no masks, so there is nothing to score against")
