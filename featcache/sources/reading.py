"""Choices on how to read a data set, where its files alone do not say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from featcache.errors import UsageError
from featcache.words import FramesAs


@dataclass(frozen=True)
class Reading:
    """Choices on how to read the files of a source. The defaults add nothing to what the files say."""

    mask_colours: bool = False  # masks show each object in a colour
    ignore_label: int | None = None  # the number, or the colour 0xRRGGBB, of pixels whose truth is not known
    frames_as: FramesAs | None = None  # images directly in a folder: one video, or one each; None: ask if unclear

    @classmethod
    def of(
        cls, mask_colours: bool = False, ignore_label: str | None = None, frames_as: FramesAs | None = None
    ) -> Reading:
        """From option values: ``ignore_label`` is a number, or with ``mask_colours`` a colour #rrggbb."""
        if ignore_label is None:
            return cls(mask_colours, frames_as=frames_as)
        pattern, example = (r"#([0-9a-fA-F]{6})", "a colour #rrggbb") if mask_colours else (r"(\d+)", "0 to 255")
        match = re.fullmatch(pattern, ignore_label)
        label = int(match[1], 16 if mask_colours else 10) if match else -1
        if not match or (label > 255 and not mask_colours):
            raise UsageError(f"--ignore-label {ignore_label}: give {example}")
        return cls(mask_colours, label, frames_as)

    def of_masks(self) -> str:
        """The settings that change masks, for a fingerprint; empty by default."""
        return "" if self == Reading(frames_as=self.frames_as) else f"{self.mask_colours} {self.ignore_label}"
