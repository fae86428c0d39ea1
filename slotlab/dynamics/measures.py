"""What is measured of predicted frames: features, masks and places, against what came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.store.reading import Split
from slotlab.dynamics.rows import Clip, Predicted
from slotlab.dynamics.tracks import own_slots
from slotlab.models.dynamics.motion import on_grid
from slotlab.scoring.metrics import MATCHED_IOU, best_overlap, foreground_ari, matched_iou, matched_slots
from slotlab.scoring.tables import UNKNOWN, ground_truth, mask_tables

HORIZONS = (1, 2, 4, 8, 12, 18)  # frames ahead that tables show
COMPARED_AT = (2, 4, 8)  # frames ahead that tables of several runs show
MOVED = 1.0  # patches from its last seen place beyond which an object has moved
HIT = 0.2  # patches a frame squared by which an acceleration changes where an object hits something


@dataclass(frozen=True)
class Measure:
    """One quantity of a predicted frame, as tables and charts show it."""

    key: str
    title: str
    why: str
    digits: int = 3
    higher_is_better: bool = True
    in_experiments: bool = False  # whether their tables show it


MEASURES: tuple[Measure, ...] = (
    Measure("mse", "feature MSE", "of features standardised by channel; 1: their overall mean", 3, False, True),
    Measure("cosine", "feature cosine", "between predicted and true features, standardised by channel"),
    Measure("mbo", "mBO", "of all objects, at each frame"),
    Measure(
        "mbo_moving", "mBO, moved objects", "of objects more than a patch from where they were last seen", 3, True, True
    ),
    Measure(
        "mbo_still", "mBO, other objects", "of objects at most a patch from where they were last seen", 3, True, True
    ),
    Measure("fg_ari", "FG-ARI", "at each frame"),
    Measure("miou", "FG-mIoU", "of all objects, matched one to one"),
    Measure("centre", "centre error, px", "from an object to the slot that held it while it was seen", 1, False, True),
    Measure("identity", "identity", "share of held objects that are held by the slot they had while they were seen"),
)
SKILL = Measure("skill", "skill", "1 - E / E of the copied frame, E the feature MSE; 0: no better than a copy")


@dataclass(frozen=True)
class Truth:
    """The ground truth of one video's predicted frames."""

    labels: Tensor  # (H, height, width)
    count: int  # labels, background included
    centres: Tensor  # (H, objects, 2) pixels; NaN where an object is absent
    own: Tensor  # (objects,) slot that held each object in the seen frames; -1 for none
    groups: Mapping[str, Tensor]  # name -> (H, objects) bool
    enters: bool  # whether an object is first visible in a predicted frame

    @classmethod
    def of(cls, split: Split, clip: Clip, video: int, named: Mapping[str, Tensor], labels: int) -> Truth:
        truth, burn_in, grid = ground_truth(split, video), clip.burn_in, clip.model.grid
        seen = mask_tables(on_grid(clip.seen.masks[0, :burn_in], grid), truth[:burn_in], labels)
        centres = object_centres(truth, labels)
        patch = truth.shape[1] / grid[0]
        # An object that was away in the last seen frame counts from where it was before.
        moved = (centres[burn_in:] - last_known(centres[:burn_in])).norm(dim=-1) > MOVED * patch
        steps = len(truth) - burn_in
        hit = hits(centres / patch)[burn_in:].cummax(0).values
        groups = {"moving": moved, "still": ~moved, "hit": moved & hit, "free": moved & ~hit}
        groups |= {name: of[video].expand(steps, -1) for name, of in named.items()}
        shown = ~centres[..., 0].isnan()  # (T, objects)
        enters = bool((shown[burn_in:].any(0) & ~shown[:burn_in].any(0)).any())
        return cls(truth[burn_in:], labels, centres[burn_in:], own_slots(seen), groups, enters)

    def shares(self, grid: tuple[int, int]) -> Tensor:
        """How much of each patch each object covers, (H, objects, N) float64."""
        each = self.labels.unsqueeze(1) == torch.arange(1, self.count, device=self.labels.device).view(-1, 1, 1)
        return F.interpolate(each.double(), size=grid, mode="area").flatten(2)


def object_centres(truth: Tensor, labels: int) -> Tensor:
    """Mean row and column of each object's pixels, (T, labels - 1, 2); NaN where it has none. truth (T, H, W)."""
    frames, height, width = truth.shape
    known = labels - UNKNOWN  # of each frame, pixels of unknown truth first
    cell = truth.long() - UNKNOWN + known * torch.arange(frames).view(-1, 1, 1)

    def sums(of: Tensor) -> Tensor:
        return torch.bincount(cell.flatten(), of.double().expand(cell.shape).flatten(), known * frames)

    pixels, rows, columns = sums(torch.ones(())), sums(torch.arange(height).unsqueeze(1)), sums(torch.arange(width))
    return (torch.stack([rows, columns], -1) / pixels.unsqueeze(-1)).view(frames, known, 2)[:, 1 - UNKNOWN :]


def hits(centres: Tensor) -> Tensor:
    """Whether the acceleration of each object differs from that of the frame before, (T, objects) bool.

    Of centres (T, objects, 2) in patches, by their third differences: by more than gravity and perspective change it.
    """
    changed = torch.zeros(centres.shape[:2], dtype=torch.bool)
    changed[3:] = centres.diff(n=3, dim=0).norm(dim=-1) > HIT
    return changed


def last_known(centres: Tensor) -> Tensor:
    """The last centre of each object that is not NaN, (objects, 2), of centres (T, objects, 2)."""
    known = centres[0]
    for later in centres[1:]:
        known = torch.where(later.isnan(), known, later)
    return known


def frame_values(predicted: Predicted, clip: Clip, truth: Truth | None) -> dict[str, Tensor]:
    """Each measure of the predicted frames, (H,) float64, NaN where it is not defined; of groups, ``mbo_metal``.

    Errors of features are of those standardised by channel, over patches and channels; of an object, over its patches.
    """
    # The model's features are standardised about the mean of each place; here about that of all, as others' are.
    offset = clip.model.normaliser.shift
    offset = (offset - offset.mean(0)) * clip.model.normaliser.weight
    unit = (1 + offset.square().mean(0)).rsqrt()
    guess, target = ((x + offset) * unit for x in (predicted.features, clip.dense[clip.burn_in :]))
    errors = (guess - target).double().square().mean(2)  # (H, N)
    found = {
        "mse": errors.mean(1),
        "cosine": F.cosine_similarity(guess, target, dim=-1).double().mean(1),
    }
    if truth is None:
        return found
    grid = clip.model.grid
    covered = truth.shares(grid)
    of_objects = {"mse": (covered @ errors.unsqueeze(-1)).squeeze(-1) / covered.sum(-1)}
    if predicted.masks is None or predicted.places is None:
        return found | grouped(of_objects, truth)
    tables = mask_tables(on_grid(predicted.masks, grid), truth.labels, truth.count)
    slots = matched_slots(tables, above=MATCHED_IOU)
    visible = tables[:, 1:].sum(-1) > 0
    held = (slots >= 0) & visible & (truth.own >= 0)
    size = torch.tensor(truth.labels.shape[1:]) / torch.tensor(grid)  # pixels of a patch
    middle = (torch.tensor(truth.labels.shape[1:]) - 1) / 2
    places = predicted.places[:, truth.own.clamp_min(0)] * size + middle
    away = (places - truth.centres).norm(dim=-1)
    found["fg_ari"] = foreground_ari(tables)
    of_frames = {
        "mbo": best_overlap(tables),
        "miou": matched_iou(tables),
        "centre": torch.where((truth.own >= 0) & visible, away, torch.nan),
        "identity": torch.where(held, (slots == truth.own).double(), torch.nan),
    }
    found |= {key: values.nanmean(-1) for key, values in of_frames.items()}
    return found | grouped(of_objects | {key: of_frames[key] for key in ("mbo", "centre")}, truth)


def grouped(of_objects: Mapping[str, Tensor], truth: Truth) -> dict[str, Tensor]:
    """Means (H,) of values of objects (H, objects), for each group of objects."""
    return {
        f"{key}_{name}": torch.where(chosen, values, torch.nan).nanmean(-1)
        for name, chosen in truth.groups.items()
        for key, values in of_objects.items()
    }
