"""Everything that a report says of its runs, read from their folders and stores or computed from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcache.errors import DataError
from featcache.scale.report import StoreReport, store_reports
from featcache.store.reading import FeatureStore, Split
from slotlab.config.schema import Config
from slotlab.runs import checkpoint
from slotlab.runs.folder import LOG, keep_result, read_result, read_rows, result_path, store_path
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.evaluate import evaluate, scoring_code
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.over_frames import Curve, VideoTrace, over_videos, trace
from slotlab.scoring.references import References
from slotlab.scoring.tables import count_labels

Say = Callable[[str], None]
KnownReferences = dict[tuple[Any, ...], References]  # by store, split, tap, grid and slots


@dataclass(frozen=True)
class Logged:
    """What a run has written while it trained."""

    name: str  # tells it from the report's other runs
    rows: tuple[dict[str, Any], ...]  # of metrics.jsonl

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the last look at the masks."""
        looks = [row["warnings"] for row in self.rows if "warnings" in row]
        return tuple(looks[-1]) if looks else ()


@dataclass(frozen=True)
class RunData(Logged):
    """One run, as far as it has come: without a checkpoint there are its configuration and curves only."""

    path: Path
    config: Config
    store: FeatureStore
    split: Split
    step: int | None = None  # of the checkpoint
    loaded: LoadedRun | None = None
    evaluation: Evaluation | None = None  # None without ground truth
    traces: dict[int, VideoTrace] = field(default_factory=dict)  # by video
    curves: dict[str, Curve] = field(default_factory=dict)  # by quantity, over the frames

    @property
    def finished(self) -> bool:
        return self.step == self.config.optim.steps

    @property
    def tap(self) -> str:
        return self.loaded.tap if self.loaded else (self.config.data.tap or next(iter(self.store.spec.taps)))


@dataclass(frozen=True)
class Gathered:
    """What a report is made of."""

    runs: tuple[RunData, ...]
    scales: tuple[StoreReport, ...]  # of the taps that the runs were trained on


def gather(
    paths: Sequence[Path],
    split: str | None = None,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
    known: KnownReferences | None = None,
) -> Gathered:
    """Read runs, score those whose score is missing or older than their checkpoint, and follow their frames.

    ``known`` collects ceilings and floors, so that runs that share them, and later calls, need not wait again.

    Raises ``DataError`` for a folder that is no run, ``IncompatibleError`` for a store that is not a run's,
    ``UsageError`` for a split that a store does not have.
    """
    known = {} if known is None else known
    runs = tuple(
        gather_run(path, name, split, cache, device, say, known) for path, name in zip(paths, names(paths), strict=True)
    )
    return Gathered(runs, tuple(scales_of(runs)))


def logged(paths: Sequence[Path]) -> list[Logged]:
    """The logs of some runs alone; quick enough to ask while they train."""
    return [Logged(name, tuple(read_rows(path / LOG))) for path, name in zip(paths, names(paths), strict=True)]


def gather_run(
    path: Path,
    name: str,
    split_name: str | None,
    cache: Path | None,
    device: torch.device | str,
    say: Say,
    known: KnownReferences,
) -> RunData:
    """One run; see :func:`gather`."""
    config = checkpoint.load_run_config(path)
    rows = tuple(read_rows(path / LOG))
    if not checkpoint.exists(path):
        store = FeatureStore.open(cache or store_path(path))
        return RunData(name, rows, path, config, store, choose_split(config, store, split_name))
    loaded = load_run(path, cache, device)
    split = choose_split(config, loaded.store, split_name).require_complete()
    step = checkpoint.state(path)["step"]
    evaluation = evaluation_of(loaded, split, step, say, known)
    say(f"{name}: following {len(split.videos)} videos of {split.name}")
    labels = count_labels(split) if split.spec.masks else 0
    traces = {}
    for video in split.videos:
        truth = torch.from_numpy(split.segmentations(video)) if labels else None
        traces[video] = trace(loaded.segment(split, video), loaded.model.grid, truth, labels)
    curves = over_videos(list(traces.values()))
    return RunData(name, rows, path, config, loaded.store, split, step, loaded, evaluation, traces, curves)


def choose_split(config: Config, store: FeatureStore, name: str | None) -> Split:
    """The split asked for; else the configuration's for evaluation, or for training where that is not there."""
    fallback = config.data.eval_split if config.data.eval_split in store.splits else config.data.train_split
    return store[name or fallback]


def evaluation_of(loaded: LoadedRun, split: Split, step: int, say: Say, known: KnownReferences) -> Evaluation | None:
    """The scores of a run: from its folder where they are current, else computed and written there."""
    if not split.spec.masks:
        return None
    key = (loaded.store.path.resolve(), split.name, loaded.tap, loaded.model.grid, loaded.model.slots)
    found = current_evaluation(loaded, split, step)
    if found is None:
        say(f"{loaded.path}: scoring {len(split.videos)} videos of {split.name}")
        found = evaluate(loaded, split.name, known.get(key))
        for warning in keep_result(loaded.path, loaded.store, found.as_dict()):
            say(warning)
    known[key] = found.references
    return found


def current_evaluation(loaded: LoadedRun, split: Split, step: int) -> Evaluation | None:
    """The scores in a run's folder, or None if they are of an earlier checkpoint, another store, or other sources."""
    try:
        raw = read_result(loaded.path, split.name)
        if raw is None:
            return None
        found = Evaluation.from_dict(raw)
        written = result_path(loaded.path, split.name).stat().st_mtime
    except (DataError, OSError):
        return None
    same = (
        found.step == step
        and found.code == scoring_code()
        and found.published_masks == loaded.config.published_masks
        and Path(found.cache).resolve() == loaded.store.path.resolve()
    )
    trained = (checkpoint.folder(loaded.path) / checkpoint.STATE).stat().st_mtime
    return found if same and written >= trained else None


def scales_of(runs: Sequence[RunData]) -> list[StoreReport]:
    """The scale reports of what the runs were trained on, each once."""
    reports: dict[tuple[str, str], StoreReport] = {}
    for run in runs:
        split = run.config.data.train_split
        if run.tap in run.store.spec.taps and split in run.store.splits and run.store[split].complete:
            for report in store_reports(run.store.path, split):
                if report.tap == run.tap:
                    reports.setdefault((report.path, report.tap), report)
    return list(reports.values())


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(len(p) for p in parts) + 1):
        ends = ["/".join(p[-depth:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{end} ({number})" for number, end in enumerate(ends, 1)]  # one run named twice
