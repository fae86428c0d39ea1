"""Writes a report of run folders: the page, its Markdown version, the figures, and a summary for JSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from featcache.errors import UsageError
from featcache.store.durable import write_output
from slotlab.report.figures import write_figures
from slotlab.report.gather import Gathered, RunData, Say, gather
from slotlab.report.markdown import render_markdown
from slotlab.report.options import PageOptions
from slotlab.report.page import default_title, render
from slotlab.report.provenance import report_command


@dataclass(frozen=True)
class Extras:
    """Optional outputs beside the page."""

    markdown: Path | None = None
    figures: Path | None = None


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    split: str | None = None,
    cache: Path | None = None,
    options: PageOptions | None = None,
    extras: Extras | None = None,
    device: torch.device | str = "cpu",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the report of some runs to ``out`` and return its summary; JSON-able.

    A run without current scores is scored, and its ``eval-SPLIT.json`` written, as ``slotlab eval`` does. Errors
    are those of :func:`slotlab.report.gather.gather`, and ``DataError`` for a file that cannot be written.
    """
    if not runs:
        raise UsageError("nothing to report; name at least one run folder, for example: slotlab report runs/demo")
    options, extras = options or PageOptions(), extras or Extras()
    gathered = gather(runs, split, cache, options, device, say)
    if not options.command:
        asked = [("cache", cache), ("split", split), ("markdown", extras.markdown), ("figures", extras.figures)]
        defaults = PageOptions()
        asked += [
            (name, value)
            for name in ("title", "videos", "rank", "frames")
            if (value := getattr(options, name)) != getattr(defaults, name)
        ]
        options = replace(options, command=report_command(runs, out, asked))
    say("drawing")
    page = render(gathered, options)
    write_output(out, page)
    figures = write_figures(gathered, extras.figures) if extras.figures else []
    if extras.markdown:
        links = {name: os.path.relpath(path, extras.markdown.parent) for name, path in figures}
        title = options.title or default_title(gathered.runs)
        write_output(extras.markdown, render_markdown(gathered, title, links, options.command))
    return {
        "report": str(out),
        "bytes": len(page.encode()),
        "markdown": str(extras.markdown) if extras.markdown else None,
        "figures": [str(path) for _, path in figures],
        "runs": summaries(gathered),
    }


def summaries(gathered: Gathered) -> list[dict[str, Any]]:
    """The numbers of every run, JSON-able."""
    return [summary_of(run) for run in gathered.runs]


def summary_of(run: RunData) -> dict[str, Any]:
    """The numbers of one run, JSON-able; ``evaluation`` is the output of ``slotlab eval --json``."""
    return {
        "name": run.name,
        "run": str(run.path),
        "cache": str(run.store.path),
        "split": run.split.name,
        "step": run.step,
        "steps": run.config.optim.steps,
        "finished": run.finished,
        "seed": run.config.seed,
        "warnings": list(run.warnings),
        "evaluation": run.evaluation and run.evaluation.as_dict(),
        "rollout": run.rollout,
        "by_frame": {
            name: {
                "mean": [None if value != value else value for value in curve.mean.tolist()],
                "videos": curve.videos.tolist(),
            }
            for name, curve in run.curves.items()
        },
    }
