"""Carries out a plan: trains and evaluates unfinished runs, and makes the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcache.errors import DataError, FeatcacheError
from featcache.store.reading import FeatureStore
from slotlab.experiments.outcome import check_scores
from slotlab.experiments.plan import Plan, Run, opened
from slotlab.experiments.pool import Watcher, carry_out, places
from slotlab.experiments.table import build_table, write_table
from slotlab.models.inputs import ModelInput
from slotlab.scoring.digest import scoring_code


def conduct(
    plan: Plan, out: Path, watcher: Watcher, devices: str = "auto", workers: int | None = None
) -> dict[str, Any]:
    """Carry out the rest of the plan in ``out``, write its table there, and return it.

    Finished runs stay, unfinished ones resume from their checkpoints, failed ones are tried again, and runs that other
    versions of the code scored are scored again. A run that fails stays in the table with its error. Raises, before
    any training, what :func:`~slotlab.experiments.plan.opened` and :func:`check_stores` raise.
    """
    check_stores(plan)
    places(devices, workers, 1)  # raises for devices that do not exist
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
    """Whether a run has scores, and the present code made them."""
    if not run.finished:
        return False
    try:
        return (run.result() or {}).get("code") == scoring_code()
    except DataError:  # damaged: the table names the remedy
        return True


def check_stores(plan: Plan) -> None:
    """Raise ``DataError`` or ``IncompatibleError`` unless each cell's store has its tap, its splits and masks."""
    for cell in plan.cells:
        try:
            store = FeatureStore.open(cell.cache)
            ModelInput.of(cell.config, store)
            store[cell.config.data.train_split].require_complete()
            check_scores(cell.config, store)
        except FeatcacheError as error:
            raise type(error)(f"cell {cell.name}: {error}") from error
