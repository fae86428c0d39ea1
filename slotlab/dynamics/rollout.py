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
from slotlab.dynamics.rows import ROWS, Clip, Predicted, Row, dense
from slotlab.dynamics.tracks import Identity, own_slots
from slotlab.models.dynamics.dense import DenseModel
from slotlab.models.dynamics.model import DynamicsModel
from slotlab.models.dynamics.motion import on_grid
from slotlab.models.inputs import Tracks
from slotlab.runs import checkpoint
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.groups import ATTRIBUTES, objects_by
from slotlab.scoring.intervals import Bootstrap
from slotlab.scoring.metrics import MATCHED_IOU, best_overlap, foreground_ari, matched_iou, matched_slots
from slotlab.scoring.tables import count_labels, ground_truth, mask_tables

HORIZONS = (1, 2, 4, 8, 12, 18)  # frames ahead that tables show
MOVED = 1.0  # patches from its last seen place beyond which an object has moved


@dataclass(frozen=True)
class Measure:
    """One quantity of a predicted frame."""

    key: str
    title: str
    higher_is_better: bool = True


MEASURES: tuple[Measure, ...] = (
    Measure("mse", "feature MSE", False),
    Measure("cosine", "feature cosine"),
    Measure("fg_ari", "FG-ARI"),
    Measure("mbo", "mBO"),
    Measure("miou", "FG-mIoU"),
    Measure("centre", "centre error, px", False),
    Measure("identity", "identity"),
)


@dataclass(frozen=True)
class Truth:
    """The ground truth of one video's predicted frames."""

    labels: Tensor  # (H, height, width)
    count: int  # labels, background included
    centres: Tensor  # (H, objects, 2) pixels; NaN where an object is absent
    own: Tensor  # (objects,) slot that held each object in the seen frames; -1 for none
    groups: Mapping[str, Tensor]  # name -> (H, objects) bool
    enters: bool  # whether an object is first visible in a predicted frame

    @classmethod
    def of(cls, split: Split, clip: Clip, video: int, named: Mapping[str, Tensor], labels: int) -> Truth:
        truth, burn_in, grid = ground_truth(split, video), clip.burn_in, clip.model.grid
        seen = mask_tables(on_grid(clip.seen.masks[0, :burn_in], grid), truth[:burn_in], labels)
        centres = object_centres(truth, labels)
        patch = truth.shape[1] / grid[0]
        # An object that was away in the last seen frame counts from where it was before.
        moved = (centres[burn_in:] - last_known(centres[:burn_in])).norm(dim=-1) > MOVED * patch
        steps = len(truth) - burn_in
        groups = {"moving": moved, "still": ~moved}
        groups |= {name: of[video].expand(steps, -1) for name, of in named.items()}
        shown = ~centres[..., 0].isnan()  # (T, objects)
        enters = bool((shown[burn_in:].any(0) & ~shown[:burn_in].any(0)).any())
        return cls(truth[burn_in:], labels, centres[burn_in:], own_slots(seen), groups, enters)


def object_centres(truth: Tensor, labels: int) -> Tensor:
    """Mean row and column of each object's pixels, (T, labels - 1, 2); NaN where it has none. truth (T, H, W)."""
    height, width = truth.shape[1:]
    objects = truth.unsqueeze(1) == torch.arange(1, labels).view(1, -1, 1, 1)  # (T, objects, H, W)
    rows = objects.sum(3).double() @ torch.arange(height).double()
    columns = objects.sum(2).double() @ torch.arange(width).double()
    return torch.stack([rows, columns], -1) / objects.sum((2, 3)).unsqueeze(-1)


def last_known(centres: Tensor) -> Tensor:
    """The last centre of each object that is not NaN, (objects, 2), of centres (T, objects, 2)."""
    known = centres[0]
    for later in centres[1:]:
        known = torch.where(later.isnan(), known, later)
    return known


def frame_values(predicted: Predicted, clip: Clip, truth: Truth | None) -> dict[str, Tensor]:
    """Each measure of the predicted frames, (H,) float64, NaN where it is not defined; of groups, ``mbo_metal``.

    Errors of features are of those standardised by channel, over patches and channels.
    """
    # The model's features are standardised about the mean of each place; here about that of all, as others' are.
    offset = clip.model.normaliser.shift
    offset = (offset - offset.mean(0)) * clip.model.normaliser.weight
    unit = (1 + offset.square().mean(0)).rsqrt()
    guess, target = ((x + offset) * unit for x in (predicted.features, clip.dense[clip.burn_in :]))
    found = {
        "mse": (guess - target).double().square().mean((1, 2)),
        "cosine": F.cosine_similarity(guess, target, dim=-1).double().mean(1),
    }
    if truth is None or predicted.masks is None or predicted.places is None:
        return found
    grid = clip.model.grid
    tables = mask_tables(on_grid(predicted.masks, grid), truth.labels, truth.count)
    slots = matched_slots(tables, above=MATCHED_IOU)
    visible = tables[:, 1:].sum(-1) > 0
    held = (slots >= 0) & visible & (truth.own >= 0)
    size = torch.tensor(truth.labels.shape[1:]) / torch.tensor(grid)  # pixels of a patch
    middle = (torch.tensor(truth.labels.shape[1:]) - 1) / 2
    places = predicted.places[:, truth.own.clamp_min(0)] * size + middle
    away = (places - truth.centres).norm(dim=-1)
    of_objects = {
        "mbo": best_overlap(tables),
        "miou": matched_iou(tables),
        "centre": torch.where((truth.own >= 0) & visible, away, torch.nan),
        "identity": torch.where(held, (slots == truth.own).double(), torch.nan),
    }
    found["fg_ari"] = foreground_ari(tables)
    found |= {key: values.nanmean(-1) for key, values in of_objects.items()}
    for name, chosen in truth.groups.items():
        for key in ("mbo", "centre"):
            found[f"{key}_{name}"] = torch.where(chosen, of_objects[key], torch.nan).nanmean(-1)
    return found


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


def load_dynamics(run: Path, tracks: Path | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """A run of ``model.kind = dynamics``; ``tracks`` replaces the store that it was trained on.

    ``UsageError`` for a run of another kind.
    """
    kind = checkpoint.load_run_config(run).model.kind
    if kind != "dynamics":
        raise UsageError(
            f"{run}: predicts nothing (model.kind = {kind}); train a world model on its slots with "
            f"slotlab train --preset dynamics --run {run}"
        )
    return load_run(run, tracks, device)


def load_dense(run: Path, beside: LoadedRun, features: FeatureStore) -> tuple[str, Row]:
    """The row of a run of ``model.kind = dense``. ``UsageError`` for another kind, ``IncompatibleError`` for one on
    other features."""
    other = load_run(run, features.path, beside.model.place.device)  # type: ignore[arg-type]
    if not isinstance(other.model, DenseModel):
        raise UsageError(
            f"--dense {run}: is of model.kind = {other.config.model.kind}; name one of --preset dynamics-dense"
        )
    return dense(other.model)


def features_of(loaded: LoadedRun, cache: Path | None = None) -> FeatureStore:
    """The store of the features that a run's tracks are of. ``DataError`` if it is gone."""
    path = Path(loaded.store.spec.exported_from) if cache is None else cache
    if not path.exists():
        raise DataError(f"{loaded.path}: its tracks are of {path}, which is not there; name that store with --cache")
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
        raise DataError(f"{features.path}: not the videos of {split.path}; make the tracks again with slotlab slots")
    labels = count_labels(split) if split.has_truth else 0
    named = (
        {name: of for attribute in ATTRIBUTES for name, of in objects_by(split, labels, attribute).items()}
        if labels
        else {}
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
