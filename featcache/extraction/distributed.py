"""Extraction on dask workers: this machine's processes, or those of a running scheduler.

A task is one of the fixed groups of videos that the local extractor cuts. The worker decodes it, runs its copy of the
backbone, and makes the chunks durable on a file system that all share; it returns the manifest rows and the group's
moments, never the features. The client alone holds the store's lock, appends the rows as they arrive and merges the
moments in the order of the groups, so that the store equals a local one.

A task may run twice, if its worker dies or only seems to: it writes the same bytes under the same names, each time by
renaming a temporary file. A worker that loses the file system waits for it, and in the end gives its videos to others.
"""

# dask.distributed leaves most of its functions without types
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import logging
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, as_completed, get_worker
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.registry import input_size
from featcache.errors import DataError, FeatcacheError, IncompatibleError, UsageError
from featcache.extraction.extract import Progress
from featcache.extraction.job import SplitJob, merge
from featcache.extraction.plan import ExtractPlan, require_space
from featcache.machine import pick_device
from featcache.moments import Moments
from featcache.sources import open_source, place_of
from featcache.sources.video import Source
from featcache.store.durable import TEMPORARY, write_durably
from featcache.store.layout import METADATA
from featcache.store.manifest import Row
from featcache.store.reading import FeatureStore
from featcache.store.spec import flatten
from featcache.store.writing import SplitWriter, StoreWriter

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
# Groups submitted beyond the first unfinished one, per worker thread. This bounds the moments that wait here for an
# earlier group, and keeps the workers busy while that group runs again.
WINDOW = 4
PATIENCE = 120.0  # seconds for which a worker waits for a file system that it has lost
ARRIVAL = 3.0  # and for one that it has not seen yet: it may be mounted at first use, or be away for a moment


@contextmanager
def connect(scheduler: str | None = None, workers: int | None = None) -> Iterator[Client]:
    """A dask client of the scheduler at that address, or of ``workers`` processes on this machine, one thread each.

    While it is open, it is dask's default client. ``UsageError`` if no scheduler answers.
    """
    if (scheduler is None) == (workers is None):
        raise UsageError("give --scheduler ADDRESS or --workers N, one of the two")
    if scheduler is not None:
        # The message of a lost scheduler is one line; dask would add the traceback of its last attempt.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--scheduler {scheduler}: no dask scheduler answers ({str(error).splitlines()[0]}); "
                "start one with dask scheduler, and workers with dask worker ADDRESS"
            ) from error
        with client:
            yield client
        return
    assert workers is not None
    if workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    # No memory limit: a worker holds one group of videos at a time, and dask's limit could kill it for that.
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=0, dashboard_address=":0"
    )
    with cluster, Client(cluster) as client:
        client.register_plugin(_LocalWorker())
        try:
            yield client
        finally:  # hide dask's messages about workers that are slow to stop
            logging.getLogger("distributed.nanny").setLevel(logging.ERROR)


class _LocalWorker(WorkerPlugin):
    """Ignores Ctrl-C, which a terminal sends to every process: the client keeps what the workers finished, then stops
    them. Hides dask's cancellation messages."""

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logging.getLogger("distributed.worker").setLevel(logging.ERROR)


def extract_distributed(
    plan: ExtractPlan,
    source: Source,
    client: Client,
    *,
    weights: str | None = None,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> FeatureStore:
    """Carry out a plan on a client's workers and return the finished store, which equals that of `extract`.

    Each worker passes ``weights`` and ``device`` to `load_backbone`; ``auto`` is the best device it has. The paths of
    the store and of the source's files must be the same on every worker.

    Raises ``DataError`` if the disk is too small, a video is damaged, the scheduler is lost, or a group's workers keep
    dying; ``IncompatibleError`` if the store or a worker's backbone is another one.
    """
    require_space(plan)
    if weights is not None and Path(weights).exists():
        weights = str(Path(weights).absolute())
    with StoreWriter(plan.path, plan.spec) as writer:
        for split in plan.splits:
            with closing(writer.split(split.name, split.spec, rearrange=True)) as split_writer:
                if split_writer.complete:
                    total = sum(split_writer.spec.lengths)
                    progress(split.name, total, total)
                    continue
                job = SplitJob.of(split_writer, split, plan, source)
                try:
                    with _shared(plan.path, _Work.of(job, source, weights, device)) as work:
                        _run_split(split_writer, job, work, client, progress)
                except Exception as error:
                    if isinstance(error, FeatcacheError) or not _lost(client, error):
                        raise
                    raise DataError(
                        f"{plan.path}: lost the dask scheduler; what was finished is kept, the same command resumes"
                    ) from error
    return FeatureStore.open(plan.path)


# -- the client ----------------------------------------------------------------------------------------------


def _run_split(writer: SplitWriter, job: SplitJob, work: Path, client: Client, progress: Progress) -> None:
    groups, done = job.groups(), frozenset(writer.done)
    pending: dict[Future[_GroupResult], int] = {}
    early: dict[int, Mapping[str, Moments]] = {}  # finished before a group that precedes them
    statistics: dict[str, Moments] = {}
    given = merged = frames_done = 0
    completed = as_completed([])

    def give(number: int) -> None:
        group = groups[number]
        # Not pure: dask must never reuse the result of an earlier run.
        future = client.submit(_run_group, work, group, done.intersection(group), pure=False)
        pending[future] = number
        completed.add(future)

    try:
        while merged < len(groups):
            threads = sum(client.nthreads().values())
            if not threads:
                logger.warning("no dask worker is connected; waiting for one")
            while given < min(len(groups), merged + WINDOW * max(1, threads)):
                give(given)
                given += 1
            results = {future: _result(future, job, groups[pending[future]]) for future in completed.next_batch()}
            writer.append(*(row for result in results.values() for row in result.rows))  # one wait for the disk
            for number, result in [(pending.pop(future), result) for future, result in results.items()]:
                if result.error:
                    raise result.error
                if result.lost:
                    logger.warning("%s: worker %s has lost it; others go on", work.parent, result.lost)
                    client.retire_workers([result.lost])
                    give(number)
                    continue
                early[number] = result.statistics
                frames_done += sum(job.spec.lengths[index] for index in groups[number])
                progress(job.name, frames_done, sum(job.spec.lengths))
            while merged in early:
                merge(statistics, early.pop(merged))
                merged += 1
    except BaseException:
        _keep_finished(pending, writer)
        with suppress(Exception):  # a lost scheduler cannot cancel anything
            client.cancel(list(pending))
        raise
    writer.finish(statistics)


def _result(future: Future[_GroupResult], job: SplitJob, group: range) -> _GroupResult:
    """The result of a group; an error that dask raises in place of one becomes the group's own."""
    try:
        result = future.result()
    except KilledWorker as error:
        return _GroupResult(
            error=DataError(
                f"{job.location}: the workers that ran {job.name} videos {group[0]} to {group[-1]} died "
                f"{error.allowed_failures + 1} times, most often for lack of memory; use a smaller --batch-size or "
                "fewer workers on a machine, the same command resumes"
            )
        )
    assert isinstance(result, _GroupResult)
    return result


def _keep_finished(pending: Mapping[Future[_GroupResult], int], writer: SplitWriter) -> None:
    """Append the rows of groups that were finished when the run was interrupted."""
    for future in pending:
        if future.status == "finished":
            with suppress(Exception):  # its worker or the scheduler may be gone; the group then runs again
                writer.append(*future.result(timeout=CONNECT_SECONDS).rows)


def _lost(client: Client, error: Exception) -> bool:
    return client.status != "running" or isinstance(error, CancelledError | CommClosedError)


@contextmanager
def _shared(store: Path, work: _Work) -> Iterator[Path]:
    """A file in the store with all that workers need for a split: tasks name it, and are small.

    While it is there, the run goes on, and a worker that reads it sees this store. The next run deletes it like all
    temporary files, so that workers of a killed client stop before they write.
    """
    path = store.absolute() / f".run-{uuid.uuid4().hex}{TEMPORARY}"
    write_durably(path, work.pickled())
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


# -- the workers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Everything that a worker needs for a split."""

    job: SplitJob
    source: Source | None  # None: open the one at the job's location
    weights: str | None
    device: str
    data: Path | None  # what must be there to read the source, if that is a file or folder

    @classmethod
    def of(cls, job: SplitJob, source: Source, weights: str | None, device: str) -> _Work:
        data = place_of(job.location).path
        return cls(job, source, weights, device, data.absolute() if data.exists() else None)

    def pickled(self) -> bytes:
        try:
            return pickle.dumps(self)
        except (pickle.PicklingError, TypeError, AttributeError):
            return pickle.dumps(replace(self, source=None))


@dataclass(frozen=True)
class _GroupResult:
    """The result of a group. A user's error is returned, not raised, so that dask logs no traceback and the rows of
    the videos before it are kept."""

    rows: Sequence[Row] = ()
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    error: FeatcacheError | None = None
    lost: str = ""  # address of the worker, if the files do not come back to it


# Threads of one worker share its backbone, whose taps are hooks, so one forward pass runs at a time. Other threads
# decode and write meanwhile.
_model_lock = threading.Lock()


def _run_group(run: Path, group: range, done: frozenset[int]) -> _GroupResult:
    """Make a group. An error counts when it comes a second time: the first one may come of files that were away."""
    task: _Work | None = None
    for last in (False, True):
        rows: list[Row] = []
        try:
            with _model_lock:
                task, source, backbone = _prepared(run)
            return _GroupResult(rows, _stored(run, task, source, backbone, group, done, rows))
        except (FeatcacheError, OSError) as error:
            if not (last or isinstance(error, IncompatibleError)):
                if _wait_for_files(run, task):
                    continue
                if run in _known:
                    return _GroupResult(rows, lost=_address())
            if isinstance(error, FeatcacheError):
                return _GroupResult(rows, error=error)
            return _GroupResult(rows, error=DataError(f"{run.parent}: worker {_address()}: {error}"))
    raise AssertionError("the second error returns")


def _stored(
    run: Path, task: _Work, source: Source, backbone: Backbone, group: range, done: frozenset[int], rows: list[Row]
) -> Mapping[str, Moments]:
    """Write a group's new videos, add their rows, and return the moments of the whole group."""
    job = task.job
    _require_run(run)
    videos = [] if done.issuperset(group) else [job.read(source, index, done) for index in group]
    with _model_lock:
        tokens = job.forward(backbone, videos) if videos else []
    _require_run(run)
    statistics = job.measure(group, done, tokens)
    for durable in job.store_group(group, done, videos, tokens):
        rows += durable
    return statistics


_known: set[Path] = set()  # runs that this worker has seen


def _wait_for_files(run: Path, task: _Work | None) -> bool:
    """Wait until this worker sees the store and the source; False if it does not."""
    patience = PATIENCE if run in _known else ARRIVAL
    until = time.monotonic() + patience
    while not _there(run, task.data if task else None):
        if (run.parent / METADATA).exists() and not run.exists():
            return True  # the run has ended, as the next attempt finds
        if time.monotonic() > until:
            return False
        time.sleep(min(1.0, patience / 10))
    return True


def _there(run: Path, data: Path | None) -> bool:
    return run.exists() and (data is None or data.exists())


@lru_cache(maxsize=2)
def _prepared(run: Path) -> tuple[_Work, Source, Backbone]:
    _require_run(run)
    task: _Work = pickle.loads(run.read_bytes())
    _known.add(run)
    store = task.job.store
    backbone = _backbone(
        store.backbone, task.weights, tuple(store.taps), input_size(store.preprocessing), str(pick_device(task.device))
    )
    _require_same_model(store.model, backbone.provenance)
    _require_same_versions(store.versions)
    return task, task.source or open_source(task.job.location), backbone


@lru_cache(maxsize=1)
def _backbone(name: str, weights: str | None, taps: tuple[str, ...], size: tuple[int, int], device: str) -> Backbone:
    return load_backbone(name, weights, taps, size, device)


def _require_run(run: Path) -> None:
    if not run.exists():
        raise DataError(
            f"{run.parent}: worker {_address()} does not see this store; it must be on a file system that every "
            "worker shares, under the same path"
        )


def _require_same_model(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    flat = [flatten({k: v for k, v in model.items() if k != "weights_origin"}) for model in (expected, found)]
    _refuse([(key, flat[0].get(key), flat[1].get(key)) for key in sorted({*flat[0], *flat[1]})])


def _require_same_versions(expected: Mapping[str, str]) -> None:
    from importlib.metadata import version

    # "+cu128" and "+cpu" are builds of one version: a client without a GPU may lead workers that have one.
    _refuse([(p, expected[p].partition("+")[0], version(p).partition("+")[0]) for p in ("torch", "slotlab")])


def _refuse(pairs: Sequence[tuple[str, Any, Any]]) -> None:
    if different := [f"{key}: here {found!r}, asked {wanted!r}" for key, wanted, found in pairs if wanted != found]:
        raise IncompatibleError(
            f"worker {_address()} would compute other features ({'; '.join(different)}); "
            "install the same packages and weights there"
        )


def _address() -> str:
    return str(get_worker().address)
