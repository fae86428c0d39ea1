"""A sheet of a model's masks: frame, ground truth, slots, the same along the frame's edges, and each slot's mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from featcache.store.durable import write_output
from featcache.store.reading import Split
from featcache.text import printable
from slotlab.masks.labels import fine_labels, masks_to_labels
from slotlab.pictures.painted import painted
from slotlab.pictures.palette import slot_colours, truth_colours
from slotlab.pictures.still import Still
from slotlab.scoring.entropy import entropy_maps

HEADER = 0.67  # inches above the first row, for the titles
TITLES = ("frame", "ground truth", "slots", "slots, along edges")
SINGLE_SLOTS = 6
PART = 0.25  # of the entropy, that is white in the map of a single slot


def draw_sheet(split: Split, stills: Sequence[Still], path: Path, entropy: bool = False) -> Path:
    """Write the sheet, as PNG or what else the suffix names, and return its path. Objects and their matched slots share
    a colour. The scores above the slots are of the masks as the model gives them. With ``entropy`` a second row for
    each still has the masks' entropy, and the part of each slot in it."""
    columns, each = len(TITLES) + SINGLE_SLOTS, 2 if entropy else 1
    height = HEADER + 1.75 * each * len(stills)
    figure, axes = plt.subplots(each * len(stills), columns, figsize=(1.72 * columns, height), squeeze=False)
    for index, still in enumerate(stills):
        row = axes[each * index]
        frame, truth = split.video(still.video)[still.frame], split.segmentations(still.video)[still.frame]
        colours = slot_colours(still.masks.shape[1], still.objects) / 255
        assigned = masks_to_labels(still.masks, truth.shape)[0].numpy()  # (H, W)
        known = truth_colours(truth, split.ignored(still.video)[still.frame]) / 255
        along = fine_labels(still.masks, frame[None], "guided")[0]
        pictures = [frame, over(frame, known), over(frame, colours[assigned]), over(frame, colours[along])]
        shown = sorted(still.objects, key=still.objects.__getitem__)
        if entropy:  # of slots that no object is matched with, too, the largest first
            by_size = still.masks[0].sum((1, 2)).argsort(descending=True).tolist()
            shown += [slot for slot in by_size if slot not in still.objects]
        shown = shown[:SINGLE_SLOTS]
        fine = F.interpolate(still.masks.float(), size=truth.shape, mode="bilinear")[0].numpy()  # (K, H, W)
        pictures += [(frame / 255.0) * fine[s][..., None] + 0.93 * (1 - fine[s][..., None]) for s in shown]
        for cell, picture in zip(row, [*pictures, *[None] * (columns - len(pictures))], strict=True):
            cell.axis("off")
            if picture is not None:
                cell.imshow(picture, interpolation="lanczos")
        if entropy:
            below = axes[each * index + 1]
            maps = entropy_maps(still.masks)[0]  # (K, rows, columns)
            whole, parts = maps.sum(0), maps[shown]
            for cell, values in zip(below, [None, None, whole, None, *parts, *[None] * columns], strict=False):
                cell.axis("off")
                if values is not None:
                    cell.imshow(values.numpy(), cmap="magma", vmin=0, vmax=1 if values is whole else PART)
            below[2].set_title(f"entropy, mean {float(whole.mean()):.2f}", fontsize=7, loc="left")
        kinds = {i.material for i in split.instances(still.video)} - {""}
        name = "all " + kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""
        title = printable(f"{name}  {split.names[still.video]}".strip())
        row[0].set_title(title, fontsize=7, loc="left", parse_math=False)
        scores = "  ".join(f"{title} {value:.2f}" for title, value in still.scores.items())
        row[2].set_title(scores, fontsize=7, loc="left")
    for cell, title in zip(axes[0], TITLES, strict=False):
        cell.text(0.5, 1.22, title, transform=cell.transAxes, ha="center", fontsize=9, weight="bold")
    single = axes[0][len(TITLES)]
    single.text(0.0, 1.22, "single slots, soft masks", transform=single.transAxes, fontsize=9, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - HEADER / height, bottom=0.01, wspace=0.03, hspace=0.14)
    write_output(path, painted(figure, path.suffix[1:], dpi=130, facecolor="white"))
    plt.close(figure)
    return path


def over(frame: npt.NDArray[np.uint8], colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Colours (H, W, 3) laid over the frame's brightness, so that shapes stay readable."""
    grey = frame.mean(-1, keepdims=True) / 255.0
    return np.asarray(np.clip(colours * (0.45 + 0.75 * grey), 0, 1))
