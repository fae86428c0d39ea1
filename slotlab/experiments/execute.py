"""Carrying out a plan: what is not finished is trained and evaluated, and the table is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcache.errors import DataError, FeatcacheError
from featcache.store.reading import FeatureStore
from slotlab.experiments.plan import Plan, Run, opened
from slotlab.experiments.pool import Watcher, carry_out, places
from slotlab.experiments.table import build_table, write_table
from slotlab.models.inputs import ModelInput
from slotlab.runs.folder import read_result
from slotlab.scoring.digest import scoring_code


def conduct(
    plan: Plan, out: Path, watcher: Watcher, devices: str = "auto", workers: int | None = None
) -> dict[str, Any]:
    """Carry out what is left of the plan in ``out``; returns the table, which also lies there.

    Finished runs are left alone, unfinished ones resume from their checkpoints, failed ones are tried again; what was
    scored by other sources is scored again. A run that fails stays in the table with its error. Raises, before
    anything is trained, what :func:`~slotlab.experiments.plan.opened` and :func:`check_stores` raise.
    """
    check_stores(plan)
    places(devices, workers, 1)  # refuses what is not there
    with opened(plan, out):
        runs = plan.runs(out)
        left = [run for run in runs if not _stands(run)]
        if left:
            where = places(devices, workers, len(left))
            watcher.begun(left, len(runs) - len(left))
            carry_out(left, where, watcher)
        table = build_table(out)
        write_table(table, out)
    return table


def _stands(run: Run) -> bool:
    """Whether a run's scores are there, and made by the sources that would make them today."""
    if not run.finished:
        return False
    try:
        return (read_result(run.path, run.split) or {}).get("code") == scoring_code()
    except DataError:  # damaged: the table says what to do
        return True


def check_stores(plan: Plan) -> None:
    """``DataError`` or ``IncompatibleError`` unless every cell's store has its tap, its splits and masks to score."""
    for cell in plan.cells:
        try:
            store = FeatureStore.open(cell.cache)
            data = cell.config.data
            ModelInput.of(cell.config, store)
            store[data.train_split].require_complete()
            if not store[data.eval_split].require_complete().spec.masks:
                raise DataError(f"{cell.cache}: {data.eval_split} has no masks, so there is nothing to score against")
        except FeatcacheError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error
