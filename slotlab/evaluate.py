"""Scoring a run's masks against ground truth, beside a ceiling and a floor that make a score mean something."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.store import FeatureStore, Split
from slotlab import checkpoint, metrics
from slotlab.config import Config
from slotlab.diagnostics import Diagnostics, kept_slots, warnings
from slotlab.draws import Draws
from slotlab.models.base import Model, Output
from slotlab.models.config import MASKS, Masks
from slotlab.models.registry import empty_model, model_input, model_moments, model_spec, model_tap, model_tokens
from slotlab.normalise import Normaliser
from slotlab.references import grid_masks, grid_reference, kmeans_floor
from slotlab.runs import check_store, store_path
from slotlab.scores import Scores
from slotlab.subgroups import subgroup_scores

PACKAGE = Path(__file__).parent
SCORING = "models/**/*.py draws.py normalise.py kmeans.py metrics.py scores.py subgroups.py references.py evaluate.py"


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with the configuration and store it belongs to."""

    path: Path
    config: Config
    store: FeatureStore
    tap: str
    model: Model

    def segment(self, split: Split, video: int) -> Output:
        """The model's output on all frames of one video, with the masks that the run publishes; always the same."""
        return self.segment_input(model_input(self.config, split, video), video)

    def segment_input(self, features: Tensor, video: int) -> Output:
        """The same for another input in the place of that video's: (T, N, D), or (T, H, W, 3) uint8."""
        return self.output(features, video).showing(self.config.published_masks)

    @torch.no_grad()
    def output(self, features: Tensor, video: int) -> Output:
        """The same with the decoder's masks, whichever the run publishes. ``DataError`` where they are not finite."""
        device = next(self.model.parameters()).device
        return self.model.segment(features.to(device), Draws.of_step(self.config.seed, video)).checked()


def load_run(run: Path, cache: Path | None = None, device: torch.device | str = "cpu") -> LoadedRun:
    """Open a run folder; ``cache`` overrides the store that it was trained on."""
    config = checkpoint.load_run_config(run)
    store = FeatureStore.open(cache or store_path(run))
    check_store(run, store)
    model = empty_model(config, model_spec(config, store))
    checkpoint.load_model(run, model)
    return LoadedRun(run, config, store, model_tap(config, store), model.to(device).eval())


@cache
def scoring_code() -> str:
    """Digest of the sources that masks and scores come from: numbers of other sources are not to be mixed with."""
    files = [file for pattern in SCORING.split() for file in sorted(PACKAGE.glob(pattern))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


References = tuple[dict[str, Any], dict[str, Any]]  # the grid's ceiling, and k-means' floor


def evaluate(loaded: LoadedRun, split_name: str | None = None, known: References | None = None) -> dict[str, Any]:
    """Scores of every frame and video of a split; JSON-able.

    ``known`` are the :func:`references` of an earlier run on the same tap and split with as many slots, which
    take longer than the scores. ``DataError`` when the split has no masks. Scores and diagnostics are those of the
    masks that the run publishes; ``decoder`` and ``attention`` hold the scores of both kinds.
    """
    split = split_to_score(loaded, split_name)
    labels, step = count_labels(split), checkpoint.state(loaded.path)["step"]
    scores, found = score_masks(loaded, split, split.videos, labels)
    reference, floor = known or references(split, loaded)
    published, means = scores[loaded.config.published_masks], found.means()
    return {
        "run": str(loaded.path),
        "cache": str(loaded.store.path),
        "split": split.name,
        "tap": loaded.tap,
        "step": step,
        "code": scoring_code(),
        "resolution": list(split.spec.frame_size),
        "published_masks": loaded.config.published_masks,
        **published.summary(),
        **{name: of.summary() for name, of in scores.items()},
        "reference": reference,
        "floor": floor,
        **means,
        "diagnostics_by_frame": found.at_each_frame(),
        "largest_activation_by_slot": found.largest_by_slot(),
        "warnings": _unfinished(step, loaded.config) + warnings(means, loaded.config),
        **subgroup_scores(published, split, labels),
    }


def split_to_score(loaded: LoadedRun, name: str | None) -> Split:
    """The split of this name, or the configuration's. ``FeatcacheError`` says what to do where there are no masks."""
    name, store = name or loaded.config.data.eval_split, loaded.store
    if name not in store.splits:
        raise UsageError(f"{store.path}: no split {name!r}; choose one with --split: {', '.join(store.splits)}")
    if not store[name].spec.masks:
        raise DataError(
            f"{store[name].path}: its source had no masks, so there is nothing to score against; look at the slots "
            "with slotlab report or slotlab masks"
        )
    return store[name].require_complete()


def score_masks(
    loaded: LoadedRun, split: Split, videos: Iterable[int], labels: int
) -> tuple[dict[Masks, Scores], Diagnostics]:
    """Scores of both kinds of masks on some videos, and the diagnostics of the kind that the run publishes.

    ``labels`` are :func:`count_labels` of the split.
    """
    scores, found = {name: Scores() for name in MASKS}, Diagnostics()
    for video in videos:
        truth = torch.from_numpy(split.segmentations(video))  # (T, H, W)
        output = loaded.output(model_input(loaded.config, split, video), video)
        for name, of in scores.items():
            tables = metrics.mask_tables(on_grid(output.showing(name).masks, loaded.model.grid).cpu(), truth, labels)
            of.add(tables, torch.full((len(truth),), video))
        found.add(output.showing(loaded.config.published_masks))
    return scores, found


def on_grid(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, K, N) -> (B, K, rows, columns)."""
    return masks.reshape(*masks.shape[:-1], *grid)


def count_labels(split: Split) -> int:
    """Ground-truth labels in a split, background included."""
    labels = max(len(split.instances(video)) for video in split.videos) + 1
    if labels == 1:  # a source with masks but without instance tables
        labels = max(int(split.segmentations(video).max()) for video in split.videos) + 1
    return labels


def references(split: Split, loaded: LoadedRun) -> References:
    """The grid's ceiling, and the floor of k-means on each frame's tokens with as many clusters as slots."""
    moments = model_moments(loaded.config, loaded.store)
    whiten = Normaliser.from_moments("whiten", moments, shrinkage=0.1, center="channel")
    labels, grid = count_labels(split), loaded.model.grid
    clusters = min(loaded.model.slots, grid[0] * grid[1])
    ceiling, raw, whitened = Scores(), Scores(), Scores()
    effective: list[Tensor] = []
    for video in split.videos:
        truth = torch.from_numpy(split.segmentations(video))
        tokens = model_tokens(loaded.config, split, video)
        ids = torch.full((len(truth),), video)
        ceiling.add(grid_reference(truth, grid, labels), ids)
        effective.append(metrics.effective_slots(grid_masks(truth, grid, labels)))
        raw.add(kmeans_floor(tokens, grid, clusters, truth, labels, seed=video), ids)
        whitened.add(kmeans_floor(whiten(tokens), grid, clusters, truth, labels, seed=video), ids)
    keys = ("fg_ari", "ari", "mbo", "miou")
    found = [{key: item.summary()[key] for key in keys} for item in (ceiling, raw, whitened)]
    tracked = {f"{key}_video": ceiling.summary()[f"{key}_video"] for key in keys}  # k-means does not track
    return found[0] | tracked | {"kept_slots": kept_slots(effective)}, dict(
        zip(("kmeans_raw", "kmeans_whitened"), found[1:], strict=True)
    )


def _unfinished(step: int, config: Config) -> list[str]:
    steps = config.optim.steps
    return [f"the run is not finished: its checkpoint is of step {step} of {steps}"] if step < steps else []


def beats_floor(result: Mapping[str, Any]) -> bool:
    """Whether a run is above clustering without training, in both headline scores."""
    floors = result["floor"].values()
    return all(result[key] > max(floor[key] for floor in floors) for key in ("fg_ari", "mbo"))
