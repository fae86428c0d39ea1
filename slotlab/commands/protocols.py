"""The table of a run's scores under published protocols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from featcache.text import printable
from slotlab.commands.tables import interval, number
from slotlab.protocols.scores import SCORES
from slotlab.scoring.evaluation import Evaluation

COLUMNS = ("protocol", "per", "score", "value", "95% interval", "may stand beside")


def protocols_table(found: Evaluation) -> Table:
    """A row for each protocol and score; below it, how many units were scored."""
    scored = {name: of for name, of in found.fine["protocols"].items() if "scores" in of}
    table = Table(title=printable(f"{found.run} on {found.split}, by protocol"), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("value", "95% interval") else "left")
    for name, of in scored.items():
        for row in _rows(name, of, of["beside"] or "nothing"):
            table.add_row(*row)
        if refined := of.get("refined"):
            for row in _rows(f"  {refined['method']}", of | refined, "nothing"):
                table.add_row(*row)
        table.add_section()
    table.caption = "\n".join(f"{name}: {printable('; '.join(_counts(of)))}" for name, of in scored.items())
    table.caption_justify = "left"
    return table


def _rows(name: str, of: Mapping[str, Any], beside: str) -> Iterator[tuple[str, ...]]:
    for unit, scores in of["scores"].items():
        per = f"{of['chunk']} frames" if unit == "chunk" else unit
        for key in filter(SCORES.__contains__, scores):
            bounds = interval(scores["intervals"].get(key))
            yield name, per, SCORES[key].title, number(scores[key]), bounds, printable(beside)


def _counts(of: Mapping[str, Any]) -> Iterator[str]:
    """What was scored, in words."""
    yield f"masks of {of['masks'][1]}x{of['masks'][0]}"
    for unit, scores in of["scores"].items():
        parts = [f"{scores['units']} {unit}s"]
        if "one_object" in scores:
            parts.append(f"{scores['one_object']} of them with one object, {scores['without_objects']} without")
        if "objects" in scores:
            parts.append(f"{scores['objects']} objects, {scores['tracks_left_out']} tracks left out")
        yield ", ".join(parts)
    if of["published_slots"]:
        yield f"{of['slots']} slots, in papers {of['published_slots']}"
    if of["published_on"]:
        yield f"papers score {of['published_on']}"
