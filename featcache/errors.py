"""Errors that a user can act on.

Each message is one line: what is wrong, where, and what to do next. The command line prints that line and exits with
the class's exit code; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featcache.text import printable

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it
_CELL = 40  # characters of a value that a table shows


class FeatcacheError(Exception):
    """Base of all errors that the user can fix. The message stays on one line, whatever names it holds."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    def render(self) -> str:
        """The text that the command line shows: the message, and details below it."""
        return str(self)


class UsageError(FeatcacheError):
    """The command, an option or a configuration value is wrong."""

    exit_code = 2


class DataError(FeatcacheError):
    """Input data or weights are missing, truncated or corrupt."""

    exit_code = 3


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means lack of memory: of Python, of the system, or (by torch's message) of a device."""
    if isinstance(error, RuntimeError):
        return "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of room: on the disk, in a quota, or below the largest size of a file."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Difference:
    """One setting that differs; None where one side lacks it."""

    setting: str
    present: Any
    asked: Any


class IncompatibleError(FeatcacheError):
    """A store or checkpoint is sound, but does not fit the request.

    ``differences`` lists the settings that differ; the message then reads ``what (differences); remedy``.
    """

    exit_code = 4

    def __init__(self, what: str, differences: Sequence[Difference] = (), remedy: str = "") -> None:
        listed = "; ".join(f"{d.setting}: store {d.present!r}, asked {d.asked!r}" for d in differences)
        super().__init__(what + (f" ({listed})" if listed else "") + (f"; {remedy}" if remedy else ""))
        self.what = printable(what)
        self.differences = tuple(differences)
        self.remedy = printable(remedy)

    def render(self) -> str:
        """The message without the differences, and a table of them below it."""
        if not self.differences:
            return str(self)
        rows = [("", "store", "asked")]
        rows += [(d.setting, _short(d.present), _short(d.asked)) for d in self.differences]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n  ".join(["; ".join(part for part in (self.what, self.remedy) if part), *table])


def compare_settings(present: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Difference]:
    """The settings that differ between two flat mappings, in order of their names."""
    return [
        Difference(key, present.get(key), asked.get(key))
        for key in sorted({*present, *asked})
        if present.get(key) != asked.get(key)
    ]


def _short(value: Any) -> str:
    text = "-" if value is None else printable(str(value))
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."
