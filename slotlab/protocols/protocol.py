"""What a protocol is: a name, and for each data set the terms on which it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from featcache.words import Fit

Unit = Literal["frame", "chunk", "video"]  # what one value of a score is of; scores are means over units

# Pixels whose truth is not known: in no count; background; or in no object, but in the area of predicted masks.
Void = Literal["left out", "background", "in predictions"]

ANY = "any"  # in the place of a data set: whatever the store holds


@dataclass(frozen=True)
class Terms:
    """What a protocol asks of a store of one data set, and what it scores there."""

    scores: Mapping[Unit, tuple[str, ...]]  # keys of slotlab.protocols.scores.SCORES
    fit: Fit | None = None  # the part of a frame that the backbone sees; None: any, as where frames are square
    input: int | None = None  # side of the backbone's square input in pixels; None: any
    masks: int | None = None  # shorter side of the masks that are scored, in pixels; None: as they are stored
    frame_size: str = ""  # to store frames at, where that is not the square of the masks
    chunk: int = 0  # frames of a chunk; those that are left over at a video's end are not scored
    void: Void = "left out"
    read: Mapping[str, str] = field(default_factory=dict)  # options that the source was read with
    editions: tuple[str, ...] = ()  # years, letters or variants that papers score; nothing stands beside others
    data: str = ""  # the split that papers score
    slots: str = ""  # numbers of slots that papers use
    beside: str = ""  # papers whose numbers it may stand beside; empty: none is published


@dataclass(frozen=True)
class Protocol:
    """A way to score that papers share. The pages say more: docs/protocols.md."""

    name: str
    of: str  # the code that it is read from: repository and commit
    on: Mapping[str, Terms]  # by layout of the data, or ``ANY``
