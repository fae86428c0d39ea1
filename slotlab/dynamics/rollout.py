"""Scores of predicted videos: features, masks and places at each horizon, beside rows that learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.store.reading import FeatureStore, Split
from slotlab.dynamics.measures import COMPARED_AT, HORIZONS, MEASURES, Truth, frame_values
from slotlab.dynamics.rows import ROWS, Clip, Predicted, Row, dense
from slotlab.dynamics.tracks import Identity
from slotlab.models.dynamics.dense import DenseModel
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.motion import on_grid
from slotlab.models.inputs import Tracks
from slotlab.runs import checkpoint
from slotlab.runs.folder import store_path
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.digest import scoring_code
from slotlab.scoring.groups import ATTRIBUTES, objects_by
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.scores import Values
from slotlab.scoring.tables import count_labels, ground_truth, mask_tables


@dataclass(frozen=True)
class Rollout:
    """Scores of a split."""

    about: Mapping[str, Any]
    names: Sequence[str]  # of the videos
    entering: Sequence[str]  # names of videos that an object enters after the seen frames
    identity: Identity  # of the tracks themselves
    titles: Mapping[str, str]  # of the rows
    rows: Mapping[str, Mapping[str, Tensor]]  # row -> measure -> (V, H)

    @property
    def steps(self) -> int:
        """H, the most predicted frames of a video."""
        return next(iter(next(iter(self.rows.values())).values())).shape[1]

    def means(self, row: str, key: str) -> list[float | None]:
        """A measure at each horizon, mean over the videos; None where no video has one."""
        return [_number(value) for value in self.rows[row][key].nanmean(0)]

    def mean(self, row: str, key: str) -> float | None:
        """A measure, mean over horizons and videos."""
        return _number(self.rows[row][key].nanmean())

    def skill(self, row: str, oracle: bool = False) -> list[float | None]:
        """1 - E / E(copy) at each horizon, E the feature MSE; with ``oracle`` the share of what the oracle saves."""
        found: list[float | None] = []
        for error, copied, best in zip(*(self.means(name, "mse") for name in (row, "copy", "oracle")), strict=True):
            if error is None or copied is None or best is None:
                found.append(None)
                continue
            gap = copied - best if oracle else copied
            found.append((copied - error) / gap if gap > 0 else None)
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.about,
            "videos": len(self.names),
            "entering": list(self.entering),
            "tracks": {"identity": self.identity.accuracy, "covered": self.identity.covered},
            "rows": {row: self._row(row) for row in self.rows},
            "values": _compared({key: of.nanmean(0) for key, of in self.rows["rollout"].items()}),
            "by_video": {
                name: _compared({key: of[video] for key, of in self.rows["rollout"].items()})
                for video, name in enumerate(self.names)
            },
        }

    def _row(self, row: str) -> dict[str, Any]:
        of = self.rows[row]
        videos = torch.arange(len(self.names))
        shown = [h for h in HORIZONS if h <= self.steps]
        values = {f"{key}/{h}": found[:, h - 1] for key, found in of.items() for h in shown}
        values |= {f"{key}/mean": found.nanmean(1) for key, found in of.items()}
        sure = Bootstrap().intervals(values, videos)
        return {
            "title": self.titles[row],
            **{key: {"by_horizon": self.means(row, key), "mean": self.mean(row, key)} for key in of},
            "skill": {"by_horizon": self.skill(row)},
            "skill_to_oracle": {"by_horizon": self.skill(row, oracle=True)},
            "confidence": {key: {str(h): sure[f"{key}/{h}"] for h in (*shown, "mean")} for key in of},
        }


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _compared(of: Mapping[str, Tensor]) -> Values:
    """What tables of runs show of the world model: ``mse_4`` is the feature MSE four frames ahead. ``of`` (H,) each."""
    return {
        f"{measure.key}_{ahead}": _number(of[measure.key][ahead - 1])
        for measure in MEASURES
        if measure.in_experiments and measure.key in of
        for ahead in COMPARED_AT
        if ahead <= len(of[measure.key])
    }


def load_dynamics(run: Path, tracks: Path | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """A run of ``model.kind = dynamics``; ``tracks`` replaces the store that it was trained on.

    ``UsageError`` for a run of another kind.
    """
    kind = checkpoint.load_run_config(run).model.kind
    if kind == "dense":
        require_masks(run)
    if kind != "dynamics":
        raise UsageError(
            f"{run}: predicts nothing (model.kind = {kind}); train a world model on its slots with "
            f"slotlab train --preset dynamics --run {run}"
        )
    place = store_path(run, "--tracks") if tracks is None else tracks
    if not place.exists():
        raise DataError(f"{place}: no such store of tracks; make it with: slotlab slots RUN --out {place}")
    Tracks.in_store(FeatureStore.open(place))
    return load_run(run, place, device)


def require_masks(run: Path) -> None:
    """Raise ``UsageError`` for a run whose scores are those of predictions, not of masks."""
    kind = checkpoint.load_run_config(run).model.kind
    if kind == "dense":
        raise UsageError(
            f"{run}: predicts without slots; show it beside a world model: slotlab rollout RUN --dense {run}"
        )
    if kind == "dynamics":
        raise UsageError(f"{run}: predicts, and its scores are those of predictions: slotlab rollout {run}")


def load_dense(run: Path, beside: LoadedRun, features: FeatureStore) -> tuple[str, Row]:
    """The row of a run of ``model.kind = dense``. ``UsageError`` for another kind, ``IncompatibleError`` for one on
    other features."""
    if (kind := checkpoint.load_run_config(run).model.kind) != "dense":
        raise UsageError(f"--dense {run}: is of model.kind = {kind}; name one of --preset dynamics-dense")
    other = load_run(run, features.path, beside.model.place.device)  # type: ignore[arg-type]
    assert isinstance(other.model, DenseModel)
    return dense(other.model)


def features_at(tracks: FeatureStore, cache: Path | None = None) -> FeatureStore:
    """The store of the features that tracks are of; ``cache`` replaces it. ``DataError`` if it is gone."""
    path = Path(tracks.spec.exported_from) if cache is None else cache
    if cache is None and not path.exists():
        raise DataError(
            f"{tracks.path}: tracks of {path}, which is not there; name that store: slotlab rollout RUN --cache STORE"
        )
    return FeatureStore.open(path)


Follow = Callable[[Clip, Truth | None, Mapping[str, Predicted], int], None]


@torch.no_grad()
def roll_out(
    loaded: LoadedRun,
    features: FeatureStore,
    split: Split,
    rows: Mapping[str, tuple[str, Row]] = ROWS,
    without_entering: bool = False,
    also: Sequence[Follow] = (),
) -> Rollout:
    """Scores of a run of ``model.kind = dynamics`` on a split of its tracks, and of the rows beside it.

    ``features`` is the store that the tracks are of. ``without_entering`` leaves out videos that an object enters after
    the seen frames: nobody could predict it. ``also`` is called with each video. ``DataError`` if no video is longer
    than the seen frames, or the store holds other videos.
    """
    inputs, model = loaded.inputs, loaded.model
    assert isinstance(inputs, Tracks) and isinstance(model, DynamicsModel)
    dense = features[split.name].require_complete()
    if dense.spec.content != split.spec.content:
        raise DataError(
            f"{features.path}: not the videos of {split.path}; name the store that these tracks are of with --cache, "
            "or make them again: slotlab slots RUN --out NEW, then --tracks NEW"
        )
    labels = count_labels(split) if split.has_truth else 0
    named = (
        {name: of for attribute in ATTRIBUTES for name, of in objects_by(split, labels, attribute)} if labels else {}
    )
    names: list[str] = []
    entering: list[str] = []
    found: dict[str, list[dict[str, Tensor]]] = {row: [] for row in rows}
    identity = Identity()
    for video in split.videos:
        if split.spec.lengths[video] <= model.config.burn_in:
            continue
        clip = Clip.of(model, inputs.read(split, video), dense.tokens(inputs.features, video).float())
        truth = Truth.of(split, clip, video, named, labels) if labels else None
        if truth is not None and truth.enters:
            entering.append(split.names[video])
            if without_entering:
                continue
        if truth is not None:
            every = mask_tables(on_grid(clip.seen.masks[0], model.grid), ground_truth(split, video), labels)
            identity += Identity.of_tables(every)
        predicted = {row: predict(clip) for row, (_, predict) in rows.items()}
        names.append(split.names[video])
        for row, of in predicted.items():
            found[row].append(frame_values(of, clip, truth))
        for take in also:
            take(clip, truth, predicted, video)
    if not names:
        raise DataError(
            f"{split.path}: no video to predict: none is longer than the {model.config.burn_in} frames that are seen"
        )
    about = {
        "run": str(loaded.path),
        "cache": str(loaded.store.path),
        "step": checkpoint.state(loaded.path)["step"],
        "code": scoring_code(),
        "content": split.spec.content,
        "without_entering": without_entering,
        "tracks_of": split.store.spec.source,
        "split": split.name,
        "burn_in": model.config.burn_in,
    }
    titles = {row: title for row, (title, _) in rows.items()}
    return Rollout(about, names, entering, identity, titles, {row: _stacked(of) for row, of in found.items()})


def _stacked(videos: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Values by measure, (V, H); NaN after a video's end."""
    most = max(len(values) for of in videos for values in of.values())
    return {
        key: torch.stack([F.pad(of[key], (0, most - len(of[key])), value=torch.nan) for of in videos])
        for key in videos[0]
    }
