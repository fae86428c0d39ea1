"""Gathers the contents of a report, read from the runs' folders and stores or computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from featcache.errors import DataError
from featcache.scale.report import StoreReport, store_reports
from featcache.store.reading import FeatureStore, Split
from slotlab.config.model import ScoredBy
from slotlab.config.schema import Config
from slotlab.dynamics.rollout import features_at, roll_out
from slotlab.report.options import PageOptions
from slotlab.report.views import Choice, View, Views, footage_key
from slotlab.runs import checkpoint
from slotlab.runs.folder import LOG, keep_result, read_result, read_rows, result_path, store_path
from slotlab.runs.loaded import LoadedRun, evaluation_split, load_run
from slotlab.scoring.digest import scoring_code
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.follow import follow
from slotlab.scoring.over_frames import Curve, Trace, over_videos, trace
from slotlab.scoring.references import KnownReferences, references_key, statistics_split

Say = Callable[[str], None]


@dataclass(frozen=True)
class Logged:
    """A run's log of its training."""

    name: str  # distinguishes the run from the report's others
    rows: tuple[dict[str, Any], ...]  # of metrics.jsonl

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the last look at the masks."""
        looks = [row["warnings"] for row in self.rows if "warnings" in row]
        return tuple(looks[-1]) if looks else ()


@dataclass(frozen=True)
class RunData(Logged):
    """One run of a report. Without a checkpoint it has only a configuration and curves."""

    path: Path
    config: Config
    store: FeatureStore
    split: Split
    step: int | None = None  # of the checkpoint
    loaded: LoadedRun | None = None
    evaluation: Evaluation | None = None  # None without ground truth, and of runs that predict
    rollout: Mapping[str, Any] | None = None  # of runs that predict: JSON of slotlab.dynamics.rollout
    kept: bool = False  # whether the run folder holds the scores
    curves: dict[str, Curve] = field(default_factory=dict)  # by quantity, over the frames
    choices: tuple[Choice, ...] = ()  # videos for the gallery
    views: dict[int, View] = field(default_factory=dict)  # views of the chosen videos, by video

    @property
    def finished(self) -> bool:
        return self.step == self.config.optim.steps

    @property
    def tap(self) -> str:
        return self.loaded.tap if self.loaded else (self.config.data.tap or next(iter(self.store.spec.taps)))


@dataclass(frozen=True)
class Gathered:
    """The contents of a report."""

    runs: tuple[RunData, ...]
    scales: tuple[StoreReport, ...]  # one for each tap that runs were trained on


def gather(
    paths: Sequence[Path],
    split: str | None = None,
    cache: Path | None = None,
    options: PageOptions | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
    known: KnownReferences | None = None,
) -> Gathered:
    """The contents of a report on some runs, from one pass of each run over its split.

    The pass gives the curves over the frames, the gallery, and the scores, unless the run folder has those of its
    checkpoint. ``known`` collects ceilings and floors for runs and later calls that share them.

    Raises ``DataError`` for a folder that is not a run, ``IncompatibleError`` for a store that is not a run's,
    ``UsageError`` for a split that a store lacks.
    """
    gatherer = _Gatherer(split, cache, options or PageOptions(), device, say, {} if known is None else known)
    runs = tuple(gatherer.run(path, name) for path, name in zip(paths, names(paths), strict=True))
    return Gathered(runs, tuple(scales_of(runs)))


def logged(paths: Sequence[Path]) -> list[Logged]:
    """The logs of some runs; quick enough to call while they train."""
    return [Logged(name, tuple(read_rows(path / LOG))) for path, name in zip(paths, names(paths), strict=True)]


@dataclass
class _Gatherer:
    """The arguments of :func:`gather`, and what runs share."""

    split: str | None
    cache: Path | None
    options: PageOptions
    device: torch.device | str
    say: Say
    known: KnownReferences
    chosen: dict[str, tuple[Choice, ...]] = field(default_factory=dict)  # by footage_key: the first run's videos

    def run(self, path: Path, name: str) -> RunData:
        config = checkpoint.load_run_config(path)
        rows = tuple(read_rows(path / LOG))
        if not checkpoint.exists(path):
            store = FeatureStore.open(self.cache or store_path(path))
            return RunData(name, rows, path, config, store, self.split_of(config, store))
        loaded = load_run(path, self.cache, self.device)
        split = self.split_of(config, loaded.store).require_complete()
        base = RunData(name, rows, path, config, loaded.store, split, checkpoint.state(path)["step"], loaded)
        if split.name != (wanted := self.split or config.data.eval_split):
            self.say(f"{name}: {loaded.store.path} has no split {wanted!r}; it shows {split.name!r}")
        if config.model.kind == "dense":  # no slots to follow
            self.say(
                f"{name}: predicts without slots; show it beside a world model: slotlab rollout RUN --dense {path}"
            )
            return base
        predicts = config.model.scored_by == "rollout"
        if predicts:
            base = replace(base, **self.predicted(loaded, split, name))
        scored = split.has_truth and not predicts
        found = current_evaluation(loaded, split) if scored else None
        kept = found is not None
        views = Views(split, self.options, self.chosen.get(footage_key(split)))
        if found is not None:
            self.known[references_key(split, loaded)] = found.references
            views.rank(found)
        traces: list[Trace] = []
        takers = [lambda followed: traces.append(trace(followed)), views.add]
        todo = "scoring" if scored and found is None else "following"
        self.say(f"{name}: {todo} {len(split.videos)} videos of {split.name}")
        if todo == "scoring":
            found = evaluate(loaded, split.name, self.known, takers)
            for warning in keep_result(path, loaded.store, found.as_dict()):
                self.say(warning)
            kept = current_evaluation(loaded, split) is not None
        else:
            for followed in follow(loaded, split):
                for take in takers:
                    take(followed)
        self.chosen.setdefault(footage_key(split), views.choices())
        undefined = {key for key, value in found.values.items() if value is None} if found else set()
        curves = {name: curve for name, curve in over_videos(traces).items() if name not in undefined}
        base = replace(base, curves=curves, choices=views.choices(), views=views.result())
        return base if predicts else replace(base, evaluation=found, kept=kept)

    def split_of(self, config: Config, store: FeatureStore) -> Split:
        return evaluation_split(config, store, self.split, or_training=True)

    def predicted(self, loaded: LoadedRun, split: Split, name: str) -> dict[str, Any]:
        """The rollout of a run that predicts, and whether its folder holds it; none where its features are gone."""
        found = current_rollout(loaded, split)
        if found is None:
            try:
                features = features_at(loaded.store)
                self.say(f"{name}: rolling out {len(split.videos)} videos of {split.name}")
                found = roll_out(loaded, features, split).as_dict()
            except DataError as error:
                self.say(f"{name}: not rolled out: {error}")
                return {}
            for warning in keep_result(loaded.path, loaded.store, found, "rollout"):
                self.say(warning)
        return {"rollout": found, "kept": current_rollout(loaded, split) is not None}


def current_evaluation(loaded: LoadedRun, split: Split) -> Evaluation | None:
    """The scores in a run's folder, or None if they are not :func:`current`."""
    try:
        if (raw := current(loaded, split, "eval")) is None:
            return None
        found = Evaluation.from_dict(raw)
    except DataError:
        return None
    same = (
        found.published_masks == loaded.config.published_masks
        and Path(found.references.statistics or "").resolve() == statistics_split(split, loaded).path.resolve()
    )
    return found if same else None


def current_rollout(loaded: LoadedRun, split: Split) -> Mapping[str, Any] | None:
    """The rollout of all videos in a run's folder, or None if it is not :func:`current`."""
    found = current(loaded, split, "rollout")
    return None if found is None or found.get("without_entering") else found


def current(loaded: LoadedRun, split: Split, name: ScoredBy) -> dict[str, Any] | None:
    """The result in a run's folder, or None if it is of other videos, another checkpoint, store or version of the code,
    or damaged."""
    try:
        found = read_result(loaded.path, split.name, name)
        written = result_path(loaded.path, split.name, name).stat().st_mtime
    except (DataError, OSError):
        return None
    same = (
        found is not None
        and found.get("step") == checkpoint.state(loaded.path)["step"]
        and found.get("content", "") in ("", split.spec.content)  # the store may have grown
        and found.get("code") == scoring_code()
        and Path(str(found.get("cache"))).resolve() == loaded.store.path.resolve()
    )
    trained = (checkpoint.folder(loaded.path) / checkpoint.STATE).stat().st_mtime
    return found if same and written >= trained else None


def scales_of(runs: Sequence[RunData]) -> list[StoreReport]:
    """The scale reports of the taps that the runs were trained on, each once."""
    reports: dict[tuple[str, str], StoreReport] = {}
    for run in runs:
        split = run.config.data.train_split
        if run.tap in run.store.spec.taps and split in run.store.splits and run.store[split].complete:
            for report in store_reports(run.store.path, split):
                if report.tap == run.tap:
                    reports.setdefault((report.path, report.tap), report)
    return list(reports.values())


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that are all different."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(len(p) for p in parts) + 1):
        ends = ["/".join(p[-depth:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{end} ({number})" for number, end in enumerate(ends, 1)]  # a run given twice
