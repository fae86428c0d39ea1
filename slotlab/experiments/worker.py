"""The process that trains and evaluates runs, one after the other, on one device."""

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
from featcache.store.reading import FeatureStore
from slotlab.experiments.plan import ERROR, Run
from slotlab.runs import checkpoint
from slotlab.runs.folder import write_result
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.references import KnownReferences
from slotlab.training.train import train

OUTPUT = "output.txt"  # what a run printed, if anything


def work(link: Connection, device: str) -> None:
    """Carry out the runs that come through ``link``, until it closes.

    Sends ``("row", row)`` for each logged row and ``("ended", error or None)`` for each run. A run that fails
    leaves its error in its folder; this process goes on with the next.
    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)  # many processes share the cores, and one thread makes a run repeatable
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
    """Carry out a run; what it prints, and its error, are left in its folder. Returns the error."""
    if not checkpoint.exists(run.path):  # a start that was cut short may have left half a folder
        shutil.rmtree(run.path, ignore_errors=True)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / ERROR).unlink(missing_ok=True)
    _redirect(run.path / OUTPUT)
    error = None
    try:
        carry_out(run, device, link, known)
    except Exception as failure:  # whatever it is, it is this run's alone
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
    """Train, from the last checkpoint if there is one, and evaluate.

    ``known`` keeps the references between the runs of one process.
    """
    where, store, resume = torch.device(device), FeatureStore.open(run.cell.cache), checkpoint.exists(run.path)
    train(run.config, store, run.path, resume=resume, device=where, report=lambda row: _send(link, ("row", row)))
    write_result(run.path, evaluate(load_run(run.path, store.path, where), run.split, known).as_dict())


def _send(link: Connection, message: tuple[str, Any]) -> None:
    try:
        link.send(message)
    except OSError:  # the parent is gone: no fault of the run's
        os._exit(1)


def _redirect(path: Path) -> None:
    """Send all that this process prints to a file: stdout and stderr are the table's and the bar's."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)


def _die_with_parent() -> None:
    """End with the parent: a person who starts it again must find no run still writing."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
