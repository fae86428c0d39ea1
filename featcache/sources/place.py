"""Where a source lies, as it is written: ``[LAYOUT:]PATH[?option[=value]&...]``; and what a layout says of itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from featcache.errors import UsageError
from featcache.sources.reading import Reading
from featcache.sources.video import Source


@dataclass(frozen=True)
class Place:
    """A location taken apart."""

    location: str  # as it was written
    layout: str  # the layout that it names, or empty
    path: Path
    options: Mapping[str, str] = field(default_factory=dict)  # those without a value have the empty string

    @classmethod
    def of(cls, location: str, layouts: Collection[str]) -> Place:
        """``layouts`` are the names that may stand before a colon."""
        before, colon, after = location.partition(":")
        layout, rest = (before, after) if colon and before in layouts else ("", location)
        path, mark, options = ("", "", "") if Path(rest).expanduser().exists() else rest.rpartition("?")
        parts = (option.partition("=") for option in options.split("&") if option and mark)
        return cls(
            location, layout, Path(path if mark else rest).expanduser(), {name: value for name, _, value in parts}
        )

    def absolute(self) -> str:
        """The same location for a process with another working directory."""
        return self._written(self.path.absolute(), self.options)

    def adding(self, options: Mapping[str, str]) -> str:
        """The same location, read with these options, too."""
        return self._written(self.path, {**self.options, **options})

    def _written(self, path: Path, options: Mapping[str, str]) -> str:
        before = f"{self.layout}:" if self.layout else ""
        written = "&".join(f"{name}={value}" if value else name for name, value in options.items())
        return f"{before}{path}{'?' if written else ''}{written}"

    def choice(self, option: str, known: Collection[str], default: str) -> str:
        """The value of an option. ``UsageError`` where it is none of the known ones."""
        value = self.options.get(option, default)
        if value not in known:
            raise UsageError(f"{self.location}: no {option} {value!r}; there is: {', '.join(known) or 'none'}")
        return value

    def number(self, option: str) -> int | None:
        """The value of an option that counts. ``UsageError`` where it is no number of at least 1."""
        if (value := self.options.get(option)) is None:
            return None
        if not value.isdigit() or int(value) < 1:
            raise UsageError(f"{self.location}: {option}={value}: give a number of at least 1")
        return int(value)


@dataclass(frozen=True)
class Layout:
    """One way in which videos and their truth lie in files."""

    name: str  # names the layout before a colon
    of: str  # what comes in it, in messages
    fits: Callable[[Path], bool]  # whether a folder or a file is in it; looks at names, and decodes nothing
    open: Callable[[Place, Reading], Source]
    options: tuple[str, ...] = ()  # after the question mark
    colours: bool = False  # whether masks may show objects in colours
    local: bool = True  # whether a location is a path on this machine
