"""One picture that shows what a model does: frame, ground truth, slots, and each slot's own mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from scipy.optimize import linear_sum_assignment

from featcache.store.reading import Split
from slotlab.masks.labels import masks_to_labels
from slotlab.models.base import on_grid
from slotlab.pictures.palette import OBJECTS, OTHERS
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring import metrics
from slotlab.scoring.tables import count_labels, mask_tables

OBJECT_COLOURS, OTHER_COLOURS = ([to_rgb(colour) for colour in names] for names in (OBJECTS, OTHERS))
HEADER = 0.67  # inches above the first row, for the titles
SINGLE_SLOTS = 6
SHOWN_IOU = 0.1  # below it a slot only grazes the object that the matching gave it


def pick_videos(split: Split, materials: Sequence[str] = ("metal",), each: int = 3) -> list[int]:
    """Videos whose objects are all of one material, then mixed ones: up to ``each`` of both."""
    pure = [v for v in split.videos if {i.material for i in split.instances(v)} in [{m} for m in materials]]
    mixed = [v for v in split.videos if v not in pure]
    return pure[:each] + mixed[:each]


def draw_sheet(loaded: LoadedRun, split: Split, path: Path, videos: Sequence[int] | None = None) -> Path:
    """Write the PNG. Objects and the slots matched to them (Hungarian, by IoU) share a colour."""
    videos = list(videos if videos is not None else pick_videos(split))
    labels, columns = count_labels(split), 3 + SINGLE_SLOTS
    height = HEADER + 1.75 * len(videos)
    figure, axes = plt.subplots(len(videos), columns, figsize=(1.72 * columns, height), squeeze=False)
    for row, video in zip(axes, videos, strict=True):
        frames, truth = split.video(video), split.segmentations(video)
        t = len(frames) // 2
        masks = on_grid(loaded.segment(split, video).masks, loaded.model.grid)[t : t + 1].cpu()  # (1, K, h, w)
        table = mask_tables(masks, torch.from_numpy(truth[t : t + 1]), labels)  # (1, n_true, K)
        fg_ari = float(metrics.adjusted_rand_index(table, foreground=True)[0])
        mbo = float(metrics.mean_best_overlap(table)[0])
        iou = metrics.object_iou(table)[0].nan_to_num().numpy()  # (objects, K)
        objects, slots = linear_sum_assignment(iou, maximize=True)
        matched = {s: o for o, s in zip(objects, slots, strict=True) if iou[o, s] > SHOWN_IOU}
        colours = slot_colours(masks.shape[1], matched)
        assigned = masks_to_labels(masks, truth.shape[1:])[0].numpy()  # (H, W)
        truth_colours = np.array([OTHER_COLOURS[0], *(OBJECT_COLOURS[k % len(OBJECT_COLOURS)] for k in range(labels))])
        pictures = [frames[t], over(frames[t], truth_colours[truth[t]]), over(frames[t], colours[assigned])]
        shown = [s for _, s in sorted((o, s) for s, o in matched.items())][:SINGLE_SLOTS]
        fine = F.interpolate(masks.float(), size=truth.shape[1:], mode="bilinear")[0].numpy()  # (K, H, W)
        pictures += [(frames[t] / 255.0) * fine[s][..., None] + 0.93 * (1 - fine[s][..., None]) for s in shown]
        for cell, picture in zip(row, [*pictures, *[None] * (columns - len(pictures))], strict=True):
            cell.axis("off")
            if picture is not None:
                cell.imshow(picture, interpolation="lanczos")
        kinds = {i.material for i in split.instances(video)} - {""}
        name = "all " + kinds.pop() if len(kinds) == 1 else "mixed" if kinds else ""
        row[0].set_title(f"{name}  {split.names[video]}".strip(), fontsize=7, loc="left")
        row[2].set_title(f"FG-ARI {fg_ari:.2f}  mBO {mbo:.2f}", fontsize=7, loc="left")
    for cell, title in zip(axes[0], ("frame", "ground truth", "slots"), strict=False):
        cell.text(0.5, 1.22, title, transform=cell.transAxes, ha="center", fontsize=9, weight="bold")
    axes[0][3].text(0.0, 1.22, "single slots, soft masks", transform=axes[0][3].transAxes, fontsize=9, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - HEADER / height, bottom=0.01, wspace=0.03, hspace=0.14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
    return path


def slot_colours(count: int, matched: dict[int, int]) -> npt.NDArray[np.float64]:
    """(K, 3): a matched slot has its object's colour, the others are muted."""
    others = iter(OTHER_COLOURS * (count // len(OTHER_COLOURS) + 1))
    return np.array(
        [OBJECT_COLOURS[matched[s] % len(OBJECT_COLOURS)] if s in matched else next(others) for s in range(count)]
    )


def over(frame: npt.NDArray[np.uint8], colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Colours (H, W, 3) laid over the frame's brightness, so that shapes stay readable."""
    grey = frame.mean(-1, keepdims=True) / 255.0
    return np.asarray(np.clip(colours * (0.45 + 0.75 * grey), 0, 1))
