"""Predicted frames beside the truth, constant velocity and a copy of the last frame: as a strip, and as a film."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw
from torch import Tensor

from featcache.store.durable import write_output
from featcache.store.reading import Split
from featcache.text import printable
from slotlab.dynamics.measures import Truth
from slotlab.dynamics.rows import Clip, Predicted
from slotlab.masks.labels import masks_to_labels
from slotlab.models.dynamics.motion import on_grid
from slotlab.pictures.files import FILMS, Pictures
from slotlab.pictures.painted import painted
from slotlab.pictures.palette import slot_colours, truth_colours
from slotlab.pictures.sheet import over

HORIZONS = (0, 1, 2, 4, 6, 8, 12, 18)  # frames ahead; 0 is the last seen frame
SHOWN = {"rollout": "rollout", "velocity_masks": "constant velocity", "copy": "copy"}
VIDEOS = 3
FRAMES_A_SECOND = 6.0  # of films: half of MOVi's, as there is much to compare
HEADER = 18  # pixels of a film's titles

Picture = npt.NDArray[np.float64]  # (H, W, 3) in [0, 1]


@dataclass(frozen=True)
class Strip:
    """One video's predicted labels."""

    video: int
    last: int  # the last seen frame
    labels: Mapping[str, npt.NDArray[np.int64]]  # row -> (H, height, width)
    objects: Mapping[int, int]  # slot -> its object, 0 for label 1

    def truth(self, split: Split, at: int) -> Picture:
        """Frame ``at`` with the ground truth laid over it, if that is known."""
        frame = split.video(self.video)[at]
        if not split.has_truth:
            return np.asarray(frame / 255)
        known = truth_colours(split.segmentations(self.video)[at], split.ignored(self.video)[at])
        return over(frame, known / 255)

    def predicted(self, split: Split, row: str, at: int) -> Picture | None:
        """The masks that a row predicts, laid over the true frame ``at``; None for a frame that was seen."""
        ahead = at - self.last
        if ahead < 1 or row not in self.labels:
            return None
        slots = 1 + max(int(labels.max()) for labels in self.labels.values())
        colours = slot_colours(slots, self.objects if split.has_truth else None) / 255
        return over(split.video(self.video)[at], colours[self.labels[row][ahead - 1]])


class Strips:
    """Keeps the strips of some videos of a split as they are rolled out, of the first one in any case."""

    def __init__(self, split: Split, videos: Iterable[int]) -> None:
        self._split = split
        self._videos = tuple(videos)
        self._found: list[Strip] = []

    def add(self, clip: Clip, truth: Truth | None, predicted: Mapping[str, Predicted], video: int) -> None:
        if self._found and video not in self._videos:
            return

        def labelled(masks: Tensor) -> npt.NDArray[np.int64]:
            return np.asarray(masks_to_labels(on_grid(masks, clip.model.grid), self._split.spec.frame_size).numpy())

        labels = {row: labelled(of.masks) for row, of in predicted.items() if row in SHOWN and of.masks is not None}
        own = [] if truth is None else truth.own.tolist()
        objects = {slot: item for item, slot in enumerate(own) if slot >= 0}
        self._found.append(Strip(video, clip.last, labels, objects))

    def draw(self, path: Path) -> Path:
        """Write the strips as PNG. Objects and the slots that held them share a colour; muted slots hold none.

        Where the truth is not known, slots take all colours in turn.
        """
        return draw_strips(self._split, self._found, path)

    def film(self, path: Path, rate: float = FRAMES_A_SECOND) -> Path:
        """Write the strips as a film, one video below the other, in the form of the file's ending (``FILMS``)."""
        write_output(path, FILMS[path.suffix.lower()](film(self._split, self._found), rate))
        return path


def pick_strips(split: Split) -> tuple[int, ...]:
    """A few videos, spread over the split."""
    return split.spread(VIDEOS)


def draw_strips(split: Split, strips: Sequence[Strip], path: Path) -> Path:
    """Write the picture of some strips."""
    lines = 1 + len(SHOWN)
    figure, axes = plt.subplots(
        lines * len(strips), len(HORIZONS), figsize=(1.5 * len(HORIZONS), 1.58 * lines * len(strips)), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, strip in enumerate(strips):
        rows = axes[place * lines : (place + 1) * lines]
        for column, ahead in enumerate(HORIZONS):
            at = strip.last + ahead
            if at >= split.spec.lengths[strip.video]:
                continue
            rows[0][column].imshow(strip.truth(split, at))
            rows[0][column].set_title("last seen" if ahead == 0 else f"+{ahead}", fontsize=7)
            for line, row in enumerate(SHOWN, 1):
                if (shown := strip.predicted(split, row, at)) is not None:
                    rows[line][column].imshow(shown)
        for line, title in enumerate((printable(split.names[strip.video]), *SHOWN.values())):
            first = rows[line][0] if line == 0 else rows[line][1]
            first.text(
                -0.06, 0.5, title, transform=first.transAxes, rotation=90, va="center", ha="right", fontsize=7,
                parse_math=False,
            )  # fmt: skip
    figure.subplots_adjust(left=0.03, right=0.995, top=0.98, bottom=0.005, wspace=0.04, hspace=0.09)
    write_output(path, painted(figure, path.suffix[1:], dpi=120, facecolor="white"))
    plt.close(figure)
    return path


def film(split: Split, strips: Sequence[Strip]) -> Pictures:
    """The frames of some strips, videos below each other: the truth, then each row's predictions.

    Frames that were seen are shown as they are, in all columns; a video that has ended stays at its last frame.
    """
    width = split.spec.frame_size[1]
    titles = ("truth", *SHOWN.values())
    frames = []
    for at in range(max(split.spec.lengths[strip.video] for strip in strips)):
        lines = []
        for strip in strips:
            now = min(at, split.spec.lengths[strip.video] - 1)
            seen = split.video(strip.video)[now] / 255
            shown = [strip.predicted(split, row, now) for row in SHOWN]
            lines.append(np.hstack([strip.truth(split, now), *(seen if each is None else each for each in shown)]))
        head = Image.new("RGB", (width * len(titles), HEADER), "white")
        pen = ImageDraw.Draw(head)
        ahead = at - strips[0].last
        for column, title in enumerate(titles):
            then = "" if column else ", seen" if ahead < 1 else f", +{ahead}"
            pen.text((column * width + 4, 3), f"{title}{then}", fill="black")
        frames.append(np.vstack([np.asarray(head), (np.vstack(lines) * 255).round().astype(np.uint8)]))
    return np.stack(frames)
