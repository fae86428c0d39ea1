"""Scores a run's masks against ground truth, with a ceiling and floors to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from featcache.store.reading import Split
from slotlab.config.model import MASKS
from slotlab.config.schema import Config
from slotlab.runs import checkpoint
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.collapse import Diagnostics, warnings
from slotlab.scoring.digest import scoring_code
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.follow import Followed, follow
from slotlab.scoring.groups import subgroup_scores
from slotlab.scoring.references import KnownReferences, references
from slotlab.scoring.scores import Means, Scores
from slotlab.scoring.tables import require_truth
from slotlab.words import Floors


class Evaluator:
    """Collects the scores of a run on a split, one followed video at a time."""

    def __init__(self, loaded: LoadedRun, split: Split) -> None:
        """``DataError`` if the split has no masks."""
        self._loaded, self._split = loaded, require_truth(split)
        self._published = loaded.config.published_masks
        self._scores = Scores()  # of the masks that the run publishes
        self._others = {kind: Means() for kind in MASKS if kind != self._published}
        self._diagnostics = Diagnostics()

    def add(self, followed: Followed) -> None:
        self._scores.add_video(followed.tables(), followed.video)
        for kind, scores in self._others.items():
            scores.add_video(followed.tables(kind), followed.video)
        self._diagnostics.add(followed.shown)

    def result(self, known: KnownReferences | None = None, floors: Floors = "usual") -> Evaluation:
        """The evaluation of the added videos, beside the ceiling and floors of
        :func:`~slotlab.scoring.references.references`."""
        loaded, split, step = self._loaded, self._split, checkpoint.state(self._loaded.path)["step"]
        scores, means = self._scores, self._diagnostics.means()
        tables, _ = scores.frame_tables()
        summaries = {self._published: scores.summary()} | {kind: of.summary() for kind, of in self._others.items()}
        height, width = split.spec.frame_size
        return Evaluation(
            run=str(loaded.path),
            cache=str(loaded.store.path),
            split=split.name,
            content=split.spec.content,
            tap=loaded.tap,
            step=step,
            code=scoring_code(),
            resolution=split.spec.frame_size,
            published_masks=self._published,
            summary=summaries[self._published],
            ignored_pixels=1 - int(tables.sum()) / (len(tables) * height * width),
            masks={kind: summaries[kind] for kind in MASKS},
            references=references(split, loaded, known, floors),
            diagnostics=means,
            diagnostics_by_frame=self._diagnostics.at_each_frame(),
            largest_activation_by_slot=self._diagnostics.largest_by_slot(),
            warnings=[*loaded.differs, *_unfinished(step, loaded.config), *warnings(means, loaded.config)],
            groups=subgroup_scores(scores, split),
        )


def evaluate(
    loaded: LoadedRun,
    split_name: str | None = None,
    known: KnownReferences | None = None,
    also: Sequence[Callable[[Followed], object]] = (),
    floors: Floors = "usual",
) -> Evaluation:
    """The evaluation of a run on a split (default: the configuration's), from one pass over its videos.

    ``known`` holds ceilings and floors that runs share, ``floors`` says which to measure
    (:func:`~slotlab.scoring.references.references`); each function in ``also`` is called with each video of the pass.

    Scores and diagnostics are those of the masks that the run publishes; ``masks`` has the scores of both kinds.
    ``UsageError`` for a split that does not exist, ``DataError`` if it has no masks.
    """
    split = loaded.split(split_name)
    evaluator = Evaluator(loaded, split)
    for followed in follow(loaded, split):
        for take in (evaluator.add, *also):
            take(followed)
    return evaluator.result(known, floors)


def _unfinished(step: int, config: Config) -> list[str]:
    steps = config.optim.steps
    return [f"the run is not finished: its checkpoint is of step {step} of {steps}"] if step < steps else []
