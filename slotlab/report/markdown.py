"""The report as Markdown: the page's tables, for papers and issues."""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import quote

from featcache.text import printable
from slotlab.report import tables
from slotlab.report.gather import Gathered
from slotlab.report.provenance import environment, provenance
from slotlab.report.tables import Row, Table


def render_markdown(gathered: Gathered, title: str, figures: Mapping[str, str], command: str = "") -> str:
    """The report's tables as Markdown; ``figures`` maps the title of a picture to its path from the file's folder."""
    runs = gathered.runs
    states = (f"- **{escaped(run.name)}**: {tables.description(run)}; {tables.state(run)}" for run in runs)
    parts = [f"# {escaped(title)}", *states, ""]
    shown = [
        tables.summary(runs),
        tables.paired_runs(runs),
        *tables.groups(runs),
        tables.masks_of(runs),
        *tables.predictions(runs),
        tables.time_table(runs),
        tables.scale(gathered.scales),
        tables.configuration(runs),
        tables.videos(runs),
    ]
    for table in shown:
        if table is not None:
            parts += [f"## {table.title}", "", render_table(table), ""]
            parts += [escaped(table.note), ""] if table.note else []
    if figures:
        links = (f"![{escaped(name)}]({quote(os.fsencode(path))})" for name, path in figures.items())
        parts += ["## Figures", "", *links, ""]
    parts += ["## Provenance", ""]
    for run in runs:
        found = provenance(run)
        parts += [f"**{escaped(run.name)}**", "", *(f"- {name}: {escaped(value)}" for name, value in found.facts)]
        parts += [f"- {s.numbers}: {escaped(s.file)}; `{printable(s.command)}`" for s in found.sources] + [""]
    parts += [f"- {name}: {value}" for name, value in environment()]
    parts += [f"- this report: `{printable(command)}`"] if command else []
    return "\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """A pipe table; the best of a column is bold, intervals are in brackets."""
    head = f"| {escaped(table.label)} | {' | '.join(map(escaped, table.columns))} |"
    rule = "|---|" + ("---:|" if table.numeric else "---|") * len(table.columns)
    return "\n".join([head, rule, *map(render_row, table.rows)])


def render_row(row: Row) -> str:
    """One line of a pipe table."""
    cells = []
    for cell in row.cells:
        text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
        cells.append(f"{text} ({cell.detail})" if cell.detail else text)
    return f"| {escaped(row.label)} | {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Text on one line, without the characters that would end its cell or begin a tag."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")
