"""Progress of an experiment's runs on stderr: bars on a terminal, else a line for each run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from slotlab.commands.terminal import err
from slotlab.experiments.plan import Run


class RunsProgress:
    """A :class:`~slotlab.experiments.pool.Watcher` that shows each run's steps and the number of finished runs."""

    def __init__(self) -> None:
        self._total = self._done = 0
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=err, disable=not err.is_terminal,
        )  # fmt: skip
        self._all = self._bars.add_task("all runs", total=None, note="")
        self._running: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> RunsProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begun(self, runs: Sequence[Run], finished: int) -> None:
        self._total, self._done = finished + len(runs), finished
        self._bars.update(self._all, total=self._total, completed=finished)
        self._bars.start()
        self._say(f"{finished} of {self._total} runs are finished")

    def started(self, run: Run) -> None:
        task = self._bars.add_task(run.path.name, total=run.config.optim.steps, note="")
        self._running[run.path.name] = task, time.monotonic()

    def row(self, run: Run, row: dict[str, Any]) -> None:
        steps = run.config.optim.steps
        note = f"loss {row['loss']:.4f}" if row["step"] < steps else "evaluating"
        self._bars.update(self._running[run.path.name][0], completed=row["step"], note=note)

    def ended(self, run: Run, error: str | None) -> None:
        task, began = self._running.pop(run.path.name)
        self._bars.remove_task(task)
        self._done += 1
        self._bars.update(self._all, completed=self._done)
        took = f"{time.monotonic() - began:.0f} s"
        self._say(f"[{self._done}/{self._total}] {run.path.name}: {f'failed: {error}' if error else took}", always=True)

    def _say(self, text: str, always: bool = False) -> None:
        if not err.is_terminal:
            print(text, file=sys.stderr, flush=True)
        elif always:
            err.print(text, markup=False, highlight=False)
