"""The split that a command uses, with a note if it is not the configuration's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slotlab.commands import terminal

if TYPE_CHECKING:
    from featcache.store.reading import Split
    from slotlab.runs.loaded import LoadedRun


def chosen_split(loaded: LoadedRun, name: str | None) -> Split:
    """:meth:`LoadedRun.split`."""
    split, usual = loaded.split(name), loaded.config.data.eval_split
    if name is None and split.name != usual:
        note = f"note: {loaded.store.path} has no split {usual!r}; taking {split.name!r}"
        terminal.err.print(note)
    return split
