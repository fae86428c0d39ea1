"""Looks at the masks while a run trains."""

from __future__ import annotations

from typing import Any

from featcache.store.reading import FeatureStore, Split
from slotlab.config.schema import Config, DataConfig
from slotlab.models.base import Model
from slotlab.models.inputs import ModelInput
from slotlab.runs.loaded import StoreModel, evaluation_split
from slotlab.scoring.collapse import Diagnostics, warnings
from slotlab.scoring.follow import follow
from slotlab.scoring.metrics import shown, shown_of_videos
from slotlab.scoring.scores import Scores


def look(model: Model, config: Config, store: FeatureStore) -> dict[str, Any]:
    """Scores and collapse diagnostics on a few videos of the evaluation split, as ``eval_*`` values of a logged row.

    Scores are left out if the split has no masks. ``DataError`` if the model's masks are not finite.
    """
    split = look_split(config, store)
    training = model.training
    model.eval()
    scores, found = Scores(), Diagnostics()
    on_store = StoreModel(config, store, ModelInput.of(config, store), model)
    for followed in follow(on_store, split, split.spread(config.evaluate_videos)):
        found.add(followed.shown)
        if followed.truth is not None:
            scores.add_video(followed.tables(), followed.video)
    model.train(training)
    means = found.means()
    row: dict[str, Any] = {f"eval_{key}": value for key, value in means.items()}
    row["eval_diagnostics_by_frame"] = found.at_each_frame()
    row["eval_largest_activation_by_slot"] = found.largest_by_slot()
    if split.has_truth:
        values = scores.summary().values
        row |= {f"eval_{key}": values[key] for key in (*shown("headline"), *shown_of_videos("headline"))}
    row["warnings"] = warnings(means, config)
    return row


def look_split(config: Config, store: FeatureStore) -> Split:
    """The split to look at: :func:`evaluation_split`, or the training split.

    ``UsageError`` if the store lacks a split that the configuration names.
    """
    named = config.data.eval_split
    return evaluation_split(config, store, None if named == DataConfig().eval_split else named, or_training=True)
