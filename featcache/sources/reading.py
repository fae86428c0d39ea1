"""Choices on how to read a data set, where its files alone do not say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from featcache.errors import UsageError
from featcache.words import FramesAs

NO_LABEL = -1  # no pixel has it


@dataclass(frozen=True)
class Reading:
    """Choices on how to read the files of a source. The defaults add nothing to what the files say."""

    mask_colours: bool = False  # masks show each object in a colour
    # The number, or the colour 0xRRGGBB, of pixels whose truth is not known; `NO_LABEL` where there are none.
    ignore_label: int | None = None
    frames_as: FramesAs | None = None  # images of a folder: one video, or one each; None: ask if unclear

    @classmethod
    def of(
        cls, mask_colours: bool = False, ignore_label: str | None = None, frames_as: FramesAs | None = None
    ) -> Reading:
        """From option values: ``ignore_label`` is a number, with ``mask_colours`` a colour #rrggbb, or none."""
        if ignore_label is None:
            return cls(mask_colours, frames_as=frames_as)
        if ignore_label == "none":
            return cls(mask_colours, NO_LABEL, frames_as)
        pattern, example = (r"#([0-9a-fA-F]{6})", "a colour #rrggbb") if mask_colours else (r"(\d+)", "0 to 255")
        match = re.fullmatch(pattern, ignore_label)
        label = int(match[1], 16 if mask_colours else 10) if match else -1
        if not match or (label > 255 and not mask_colours):
            raise UsageError(f"--ignore-label {ignore_label}: give {example}, or none")
        return cls(mask_colours, label, frames_as)

    def of_masks(self) -> str:
        """The settings that change masks, for a fingerprint; empty by default."""
        return "" if self == Reading(frames_as=self.frames_as) else f"{self.mask_colours} {self.ignore_label}"
