"""What a person sees: rich tables on stdout, live progress and logs on stderr, and no motion without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console()
err = Console(stderr=True)

LOOKED_AT = ("fg_ari", "mbo", "fg_ari_video", "effective_slots", "mask_similarity", "kept_slots")
QUIET_SECONDS = 10.0  # between two lines of progress where nothing may animate


class FrameRate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} frames/s" if task.speed else "", style="cyan")


class ExtractProgress:
    """Frames done by split, with rate and time left; plain lines when stderr is no terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), FrameRate(), TimeRemainingColumn(),
            console=err, disable=not err.is_terminal,
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
            self._tasks[split] = self._bars.add_task(split, total=total)
            self._began = self._last  # a split begins where the one before ended
        self._bars.update(self._tasks[split], completed=done)
        now = self._last = time.monotonic()
        if not err.is_terminal and (now - self._said > QUIET_SECONDS or done == total):
            self._said = now
            rate = done / max(now - self._began, 1e-9)
            print(f"{split}: {done}/{total} frames, {rate:.1f} frames/s", file=sys.stderr, flush=True)


@contextmanager
def training_display(steps: int) -> Iterator[Any]:
    """A callable that takes each logged row: a live table on a terminal, else a line now and then.

    A look at the masks is told whenever there is one, with its warnings.
    """
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
            scores = (f"{name} {row[f'eval_{name}']:.3f}" for name in LOOKED_AT if row.get(f"eval_{name}") is not None)
            err.print(f"step {row['step']}/{steps}  masks: {'  '.join(scores)}", soft_wrap=True)
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
        err.print(f"warning: {warning}", style="yellow", soft_wrap=True)


def number(value: Any) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def scores_table(result: Mapping[str, Any]) -> Table:
    """The evaluation of one run, with its ceiling and floors as rows beside it."""
    keys = ("fg_ari", "mbo", "miou", "ari")
    table = Table(title=f"{result['run']} on {result['split']}", title_justify="left")
    table.add_column("masks")
    for key in keys:
        table.add_column({"fg_ari": "FG-ARI", "mbo": "mBO", "miou": "mIoU", "ari": "ARI"}[key], justify="right")

    def add(name: str, values: Mapping[str, Any], style: str | None = None) -> None:
        table.add_row(name, *(number(values.get(key)) for key in keys), style=style)

    add("this run, per frame", result, "bold")
    sure = result["confidence"]
    table.add_row(f"  {sure['level']:.0%} interval", *(interval(sure.get(key)) for key in keys))
    films = result["frames"] > result["videos"]  # else single images, whose scores are those of their frames
    if films:
        add("this run, per video", {key: result.get(f"{key}_video") for key in keys})
    other = "attention" if result["published_masks"] == "decoder" else "decoder"
    if any(result[other][key] != result[key] for key in keys):
        add(f"  of the {other}", result[other])
    for name, values in (result["by_material"] | result["by_size"]).items():
        add(f"  {name} objects", values)
    for count, values in result["by_objects"].items():
        if count != "0":
            add(f"  {count} in sight", values)
    add("ceiling of the patch grid", result["reference"], "dim")
    if films:
        add("  per video", {key: result["reference"].get(f"{key}_video") for key in keys}, "dim")
    add("floor: k-means, raw tokens", result["floor"]["kmeans_raw"], "dim")
    add("floor: k-means, whitened", result["floor"]["kmeans_whitened"], "dim")
    seen = f"{result['frames']} frames of {result['videos']} videos" if films else f"{result['frames']} images"
    table.caption = (
        f"{seen}, {result['skipped_frames']} without objects skipped; "
        f"{result['effective_slots']:.1f} effective slots, mask similarity {result['mask_similarity']:.2f}"
    )
    return table


def paired_table(compared: Mapping[str, Any]) -> Table:
    """Whether two runs differ, score by score."""
    table = Table(title=f"{compared['run']} against {compared['against']} on {compared['split']}", title_justify="left")
    for title in ("score", "this run", "the other", "difference", "interval", "p", "ahead"):
        table.add_column(title, justify="left" if title == "score" else "right")
    for name, of in compared["scores"].items():
        bounds = "–" if of["low"] is None else f"{of['low']:+.3f} to {of['high']:+.3f}"
        ahead = f"{of['ahead']} of {of['videos']}"
        means = (number(of["run"]), number(of["against"]), f"{of['difference']:+.3f}")
        table.add_row(name.replace("_", " "), *means, bounds, f"{of['p']:.2g}", ahead)
    table.caption, table.caption_justify = f"{compared['test']}; {compared['interval']}", "left"
    return table


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(number(cell) for cell in row))
    return table
