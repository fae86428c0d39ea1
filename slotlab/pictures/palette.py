"""The colours of pictures, charts and pages, chosen so that colour-blind readers can distinguish them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt

Rgb = tuple[int, int, int]

# Colours of objects and their matched slots: Okabe and Ito's palette and similar ones.
OBJECTS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C6BB1", "#66C2A5", "#A6761D",
    "#E7298A",
)  # fmt: skip
# Colours of slots without an object, and of the background.
OTHERS = (
    "#3b3f46", "#5a606b", "#7a828f", "#9aa2ae", "#b4bac4", "#c9ced6", "#2a2e35", "#6b5f57", "#8a7d73",
)  # fmt: skip
# Stripes where the truth of pixels is not known.
IGNORED = ("#ffffff", "#9aa2ae")
STRIPE = 4  # pixels, along a row
# Lines on white and on near-black: similar hues, each with a contrast of at least 3:1, and 10 apart in Lab for readers
# with either kind of colour blindness.
LINES = ("#0072B2", "#C65200", "#008660", "#B0578D", "#3A2F9E", "#6B4E00", "#5B5B5B")
LINES_ON_DARK = ("#56B4E9", "#F0883E", "#2FC79A", "#E0A0C4", "#6C6CE8", "#FFE08A", "#8A8A8A")
# Custom properties of light pages, also used by charts in files.
LIGHT = {
    "ground": "#fbfbfa", "surface": "#ffffff", "raised": "#ffffff", "sunken": "#f3f3f1",
    "ink": "#16181d", "ink-2": "#4d525b", "ink-3": "#6b717b", "rule": "#e6e6e3", "rule-2": "#d2d2ce",
    "accent": "#1f5fd0", "accent-ground": "#e9f0fd",
    "warn": "#7a5200", "warn-ground": "#fdf5e2", "good": "#0f6b45", "bad": "#a8401f",
    **{f"line-{n}": colour for n, colour in enumerate(LINES)},
}  # fmt: skip
DARK = {
    "ground": "#101113", "surface": "#17191c", "raised": "#1e2125", "sunken": "#0b0c0d",
    "ink": "#eceef1", "ink-2": "#b3b8c0", "ink-3": "#8b919b", "rule": "#2a2d32", "rule-2": "#3a3e45",
    "accent": "#8fb8ff", "accent-ground": "#1c2a42",
    "warn": "#f0c674", "warn-ground": "#2b2415", "good": "#7fd6a8", "bad": "#f2a08a",
    **{f"line-{n}": colour for n, colour in enumerate(LINES_ON_DARK)},
}  # fmt: skip
# From low to high with even steps of lightness: stops of matplotlib's cividis.
CONFIDENCE = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip


def rgb(colour: str) -> Rgb:
    """``#rrggbb`` as three bytes."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def slot_colours(slots: int, matched: Mapping[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Colours of the slots, (K, 3) uint8.

    With ``matched`` (slot -> object) a slot has its object's colour, and the other slots have muted colours. Without it
    slots take all colours in turn.
    """
    if matched is None:
        colours = list(islice(cycle((*OBJECTS, *OTHERS)), slots))
    else:
        muted = cycle(OTHERS)
        colours = [OBJECTS[matched[s] % len(OBJECTS)] if s in matched else next(muted) for s in range(slots)]
    return np.array([rgb(colour) for colour in colours], np.uint8).reshape(-1, 3)


def truth_colours(numbers: npt.NDArray[np.uint8], ignored: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Colours of ground truth (H, W, 3): the objects', a muted one of the background, stripes in ignored pixels.

    numbers (H, W): 0 background, k for object k - 1; ignored (H, W).
    """
    labels = int(numbers.max()) + 1
    colours = slot_colours(labels, {k: k - 1 for k in range(1, labels)})[numbers]
    y, x = np.indices(numbers.shape)
    stripes = np.array([rgb(colour) for colour in IGNORED], np.uint8)[(x + y) // STRIPE % len(IGNORED)]
    return np.where(ignored[..., None], stripes, colours)
