"""Scoring a run's masks against ground truth, beside a ceiling and a floor that make a score mean something."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from featcache.errors import DataError, UsageError
from featcache.store.reading import Split
from slotlab.config.model import MASKS, Masks
from slotlab.config.schema import Config
from slotlab.models.base import on_grid
from slotlab.runs import checkpoint
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.collapse import Diagnostics, warnings
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.groups import subgroup_scores
from slotlab.scoring.references import References, references
from slotlab.scoring.scores import Scores
from slotlab.scoring.tables import count_labels, mask_tables

PACKAGE = Path(__file__).parent

SCORING = "models/**/*.py draws.py normalise.py kmeans.py metrics.py scores.py subgroups.py references.py evaluate.py"


@cache
def scoring_code() -> str:
    """Digest of the sources that masks and scores come from: numbers of other sources are not to be mixed with."""
    files = [file for pattern in SCORING.split() for file in sorted(PACKAGE.glob(pattern))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def evaluate(loaded: LoadedRun, split_name: str | None = None, known: References | None = None) -> Evaluation:
    """Scores of every frame and video of a split.

    ``known`` are the :func:`references` of an earlier run on the same tap and split with as many slots, which
    take longer than the scores. ``DataError`` when the split has no masks. Scores and diagnostics are those of the
    masks that the run publishes, beside them the scores of both kinds.
    """
    split = split_to_score(loaded, split_name)
    labels, step = count_labels(split), checkpoint.state(loaded.path)["step"]
    scores, found = score_masks(loaded, split, split.videos, labels)
    published, means = scores[loaded.config.published_masks], found.means()
    return Evaluation(
        run=str(loaded.path),
        cache=str(loaded.store.path),
        split=split.name,
        tap=loaded.tap,
        step=step,
        code=scoring_code(),
        resolution=split.spec.frame_size,
        published_masks=loaded.config.published_masks,
        summary=published.summary(),
        masks={name: of.summary() for name, of in scores.items()},
        references=known or references(split, loaded),
        diagnostics=means,
        diagnostics_by_frame=found.at_each_frame(),
        largest_activation_by_slot=found.largest_by_slot(),
        warnings=[*loaded.differs, *_unfinished(step, loaded.config), *warnings(means, loaded.config)],
        groups=subgroup_scores(published, split, labels),
    )


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
        output = loaded.output(loaded.inputs.read(split, video), video)
        for name, of in scores.items():
            tables = mask_tables(on_grid(output.showing(name).masks, loaded.model.grid).cpu(), truth, labels)
            of.add_video(tables, video)
        found.add(output.showing(loaded.config.published_masks))
    return scores, found


def _unfinished(step: int, config: Config) -> list[str]:
    steps = config.optim.steps
    return [f"the run is not finished: its checkpoint is of step {step} of {steps}"] if step < steps else []
