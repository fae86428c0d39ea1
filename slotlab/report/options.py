"""The choices of a reader of a report."""

from __future__ import annotations

from dataclasses import dataclass

from featcache.errors import UsageError
from slotlab.scoring.metrics import SCORES


@dataclass(frozen=True)
class PageOptions:
    """Options of a page. ``UsageError`` for an unknown score to rank by."""

    title: str | None = None
    videos: int = 6  # videos in the gallery
    rank: str = "mbo"  # the score by which videos are worst and best
    frames: int = 48  # frames of a video, at most
    command: str = ""  # command that makes this page again
    live: bool = False  # served, and refreshed while a run trains

    def __post_init__(self) -> None:
        if self.rank not in (known := [score.key for score in SCORES]):
            raise UsageError(f"--rank {self.rank}: no such score; choose one of {', '.join(known)}")
