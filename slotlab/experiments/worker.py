"""The worker process, which trains and evaluates runs one after the other on one device."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from featcache.errors import FeatcacheError
from featcache.machine import share_memory
from featcache.store.reading import FeatureStore
from slotlab.experiments.outcome import scoring_of
from slotlab.experiments.plan import ERROR, Run
from slotlab.runs import checkpoint
from slotlab.runs.folder import write_result
from slotlab.scoring.references import KnownReferences
from slotlab.training.train import train

OUTPUT = "output.txt"  # what a run printed, if anything


def work(link: Connection, device: str, sharers: int) -> None:
    """Carry out the runs that arrive through ``link`` until it closes; ``sharers`` processes use the device.

    Sends ``("row", row)`` for each logged row and ``("ended", error or None)`` for each run. A run that fails
    leaves its error in its folder; this process goes on with the next.
    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)  # many processes share the cores, and one thread makes a run repeatable
    share_memory(torch.device(device), sharers)  # else two that start together count on the same free memory
    known: KnownReferences = {}  # ceilings and floors, which many runs share
    while True:
        try:
            run: Run = link.recv()
        except EOFError:
            return
        _send(link, ("ended", attempt(run, device, link, known)))
        gc.collect()  # a model and its compiled graphs hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def attempt(run: Run, device: str, link: Connection, known: KnownReferences) -> str | None:
    """Carry out a run; write its output and its error to its folder, and return the error in one line, or None."""
    if not checkpoint.exists(run.path):  # an interrupted start may have left an incomplete folder
        shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / ERROR).unlink(missing_ok=True)
    _redirect(run.path / OUTPUT)
    error = None
    try:
        carry_out(run, device, link, known)
    except Exception as failure:  # any error concerns this run alone
        lines = str(failure).strip().splitlines() or [""]
        error = lines[-1].removeprefix(f"{run.path}: ")
        if not isinstance(failure, FeatcacheError):
            error = f"{type(failure).__name__}: {error}"
        run.fail(error, None if isinstance(failure, FeatcacheError) else traceback.format_exc())
    _redirect(Path(os.devnull))
    if (run.path / OUTPUT).stat().st_size == 0:
        (run.path / OUTPUT).unlink()
    return error


def carry_out(run: Run, device: str, link: Connection, known: KnownReferences) -> None:
    """Train a run, from its last checkpoint if there is one, and evaluate it.

    ``known`` keeps ceilings and floors between the runs of one process.
    """
    where, store, resume = torch.device(device), FeatureStore.open(run.cell.cache), checkpoint.exists(run.path)
    train(run.config, store, run.path, resume=resume, device=where, report=lambda row: _send(link, ("row", row)))
    write_result(run.path, scoring_of(run.config).score(run, where, known), run.config.model.scored_by)


def _send(link: Connection, message: tuple[str, Any]) -> None:
    try:
        link.send(message)
    except OSError:  # the parent is gone, which is not the run's error
        os._exit(1)


def _redirect(path: Path) -> None:
    """Send everything that this process prints to a file, because the parent uses stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)


def _die_with_parent() -> None:
    """End this process when its parent ends, so that a restart finds no run still writing."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
