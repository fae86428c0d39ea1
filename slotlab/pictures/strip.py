"""A strip of predicted frames: the truth, the rollout and a copy of the last frame, side by side over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt
from torch import Tensor

from featcache.store.durable import write_output
from featcache.store.reading import Split
from featcache.text import printable
from slotlab.dynamics.rollout import Truth
from slotlab.dynamics.rows import Clip, Predicted
from slotlab.masks.labels import masks_to_labels
from slotlab.models.dynamics.motion import on_grid
from slotlab.pictures.painted import painted
from slotlab.pictures.palette import slot_colours, truth_colours
from slotlab.pictures.sheet import over

HORIZONS = (0, 1, 2, 4, 6, 8, 12, 18)  # frames ahead; 0 is the last seen frame
SHOWN = {"rollout": "rollout", "velocity_masks": "constant velocity", "copy": "copy"}
VIDEOS = 3


@dataclass(frozen=True)
class Strip:
    """One video's predicted labels."""

    video: int
    last: int  # the last seen frame
    labels: Mapping[str, npt.NDArray[np.int64]]  # row -> (H, height, width)
    objects: Mapping[int, int]  # slot -> its object, 0 for label 1


class Strips:
    """Keeps the strips of some videos as they are rolled out."""

    def __init__(self, videos: Iterable[int]) -> None:
        self._videos = tuple(videos)
        self._found: list[Strip] = []

    def add(self, clip: Clip, truth: Truth | None, predicted: Mapping[str, Predicted], video: int) -> None:
        if video not in self._videos or truth is None:
            return
        size = (truth.labels.shape[1], truth.labels.shape[2])

        def labelled(masks: Tensor) -> npt.NDArray[np.int64]:
            return np.asarray(masks_to_labels(on_grid(masks, clip.model.grid), size).numpy())

        labels = {row: labelled(of.masks) for row, of in predicted.items() if row in SHOWN and of.masks is not None}
        objects = {slot: item for item, slot in enumerate(truth.own.tolist()) if slot >= 0}
        self._found.append(Strip(video, clip.last, labels, objects))

    def draw(self, split: Split, path: Path) -> Path:
        """Write the strips as PNG. Objects and the slots that held them share a colour; muted slots hold none."""
        return draw_strips(split, self._found, path)


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
        video, truth = split.video(strip.video), split.segmentations(strip.video)
        ignored = split.ignored(strip.video)
        rows = axes[place * lines : (place + 1) * lines]
        slots = 1 + max(int(labels.max()) for labels in strip.labels.values())
        colours = slot_colours(slots, strip.objects) / 255
        for column, ahead in enumerate(HORIZONS):
            at = strip.last + ahead
            if at >= len(video):
                continue
            rows[0][column].imshow(over(video[at], truth_colours(truth[at], ignored[at]) / 255))
            rows[0][column].set_title("last seen" if ahead == 0 else f"+{ahead}", fontsize=7)
            for line, row in enumerate(SHOWN, 1):
                if ahead and row in strip.labels:
                    rows[line][column].imshow(over(video[at], colours[strip.labels[row][ahead - 1]]))
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
