"""Output for people: tables on stdout, progress and logs on stderr, and no animation without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from featcache.text import printable


class Terminal(Console):
    """Shows each text as it is, on lines of its own making alone: names may hold markup, line breaks, or anything."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def print(self, *objects: Any, **how: Any) -> None:
        if all(isinstance(o, str | Path) for o in objects):
            how.setdefault("soft_wrap", True)  # a path or a command that is broken up cannot be pasted
        super().print(*(printable(str(o)) if isinstance(o, str | Path) else o for o in objects), **how)


out = Terminal()

err = Terminal(stderr=True)

LOOKED_AT = ("effective_slots", "mask_similarity", "kept_slots")  # keys that a look shows beside the scores

QUIET_SECONDS = 10.0  # between two lines of progress without a terminal


class FrameRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} frames/s" if task.speed else "", style="cyan")


class ExtractProgress:
    """Progress of an extraction by split, with rate and time left; plain lines if stderr is not a terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<12}", markup=False), BarColumn(), MofNCompleteColumn(), FrameRate(),
            TimeRemainingColumn(), console=err, disable=not err.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._said = self._began = self._last = time.monotonic()

    def __enter__(self) -> ExtractProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, split: str, done: int, total: int) -> None:
        if split not in self._tasks:
            self._tasks[split] = self._bars.add_task(printable(split), total=total)
            self._began = self._last  # a split begins when the last one ended
        self._bars.update(self._tasks[split], completed=done)
        now = self._last = time.monotonic()
        if not err.is_terminal and (now - self._said > QUIET_SECONDS or done == total):
            self._said = now
            rate = done / max(now - self._began, 1e-9)
            print(f"{split}: {done}/{total} frames, {rate:.1f} frames/s", file=sys.stderr, flush=True)


@contextmanager
def training_display(steps: int) -> Iterator[Any]:
    """A function that shows each logged row: in a live table on a terminal, else by an occasional line.

    Every look at the masks is printed, with its warnings.
    """
    from slotlab.scoring.metrics import shown, shown_of_videos  # imports torch, which only commands that train need

    looked_at = (*shown("headline"), *shown_of_videos("headline"), *LOOKED_AT)
    began = said = time.monotonic()
    history: list[Mapping[str, Any]] = []

    def table() -> Table:
        grid = Table(title=f"training, {steps} steps", title_justify="left", expand=False)
        row = history[-1]
        names = [name for name in row if not name.startswith("eval_") and name != "warnings"]
        for name in names:
            grid.add_column(name.replace("_", " "), justify="right")
        for item in history[-8:]:
            grid.add_row(*(f"{item[n]:d}" if isinstance(item[n], int) else f"{item[n]:.4g}" for n in names))
        left = (time.monotonic() - began) / max(row["step"], 1) * (steps - row["step"])
        grid.caption = f"{row['step'] / steps:.0%} done, about {left:.0f} s left"
        return grid

    def tell(row: Mapping[str, Any]) -> None:
        nonlocal said
        now = time.monotonic()
        if not err.is_terminal and (row["step"] in (1, steps) or now - said > QUIET_SECONDS):
            said = now
            err.print(
                f"step {row['step']}/{steps}  loss {row['loss']:.4f}  "
                f"{row['samples_per_second']:.0f} samples/s  waiting for data {row['wait_share']:.1%}",
                soft_wrap=True,
            )
        if "warnings" in row:
            scores = (f"{name} {row[f'eval_{name}']:.3f}" for name in looked_at if row.get(f"eval_{name}") is not None)
            err.print(f"step {row['step']}/{steps}  masks: {'  '.join(scores)}")
            warn(row["warnings"])

    if not err.is_terminal:
        yield tell
        return
    with Live(console=err, refresh_per_second=4) as live:

        def show(row: Mapping[str, Any]) -> None:
            history.append(row)
            live.update(table())
            tell(row)

        yield show


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        err.print(f"warning: {warning}", style="yellow")
