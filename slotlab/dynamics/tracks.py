"""The slots that a run follows through the videos of its store, as a store of their own.

It has two taps of a grid of K x 1, one token a slot, so that the stream feeds them as it feeds features: ``slots``, the
run's own vectors; and ``tracks``, from which slots of all videos and of all kinds of models are predicted alike: the
mean feature of what each slot holds (D), its mask on the grid of the features (N), the action of its frame where the
videos have actions (A), and its place by the frame's edges (2). Frames, masks and tables of the ground truth are
copied, and with the statistics of the taps those of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from featcache.sources.video import Video
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore, Split
from featcache.store.spec import StoreSpec, TapSpec
from featcache.store.writing import SplitWriter, StoreWriter
from featcache.stream.stream import VIDEO
from slotlab.config.model import ForecastConfig
from slotlab.dynamics.actions import Actions
from slotlab.masks.refine import refine
from slotlab.models.base import Model, Output
from slotlab.models.dynamics.motion import on_grid
from slotlab.models.dynamics.state import places
from slotlab.models.inputs import TRACKS, Tracks
from slotlab.runs import checkpoint
from slotlab.runs.loaded import LoadedRun
from slotlab.scoring.follow import follow
from slotlab.scoring.metrics import MATCHED_IOU, matched_slots
from slotlab.scoring.tables import count_labels, ground_truth, mask_tables

SLOTS = "slots"  # the tap of the run's own vectors
LEAST = 1e-6  # patches; divisor of a mean is at least this
FINE = 8  # pixels a patch at which places are measured, at most: 16 take four times as long and tell little more
AT_ONCE = 8  # frames

Progress = Callable[[str, int, int], None]  # split, frames done, frames in all


def features_tap(loaded: LoadedRun) -> str:
    """The tap whose features the slots are means of: the run's, or the store's first where the run reads frames."""
    return loaded.store.tap(None) if loaded.tap == VIDEO else loaded.tap


def tracks_of(
    masks: Tensor,
    tokens: Tensor,
    grid: tuple[int, int],
    actions: Tensor | None = None,
    frames: npt.NDArray[np.uint8] | None = None,
) -> Tensor:
    """Tokens of the tap ``tracks``, (T, K, D + N + A + 2): mean features, masks, and what is given of the rest.

    tokens (T, N, D) are the features on their ``grid``; masks (T, K, rows, columns) of another are averaged to it.
    ``actions`` are (T, A); of ``frames`` (T, H, W, 3) come the places.
    """
    masks = masks.float().cpu()
    if tuple(masks.shape[-2:]) != grid:
        masks = F.interpolate(masks, size=grid, mode="area")
    flat = masks.flatten(2)
    parts = [flat @ tokens.float() / flat.sum(-1, keepdim=True).clamp_min(LEAST), flat]
    if actions is not None:
        parts.append(actions.unsqueeze(1).expand(-1, masks.shape[1], -1).to(masks))
    if frames is not None:
        parts.append(refined_places(masks, frames))
    return torch.cat(parts, -1)


def refined_places(masks: Tensor, frames: npt.NDArray[np.uint8]) -> Tensor:
    """Rows and columns of slots' centres from the frame's middle, in patches, (T, K, 2) float32.

    Masks (T, K, h, w) are refined along the edges of their frames (T, H, W, 3), and each pixel goes to one slot: so it
    is known several times as well how far an object goes in a frame, which is often less than a patch. A slot without a
    pixel has the centre of its mask.
    """
    found, grid = [], masks.shape[-2:]
    for some, shown in zip(torch.split(masks, AT_ONCE), torch.split(torch.from_numpy(frames), AT_ONCE), strict=True):
        size = [min(FINE * cells, pixels) for cells, pixels in zip(grid, shown.shape[1:3], strict=True)]
        small = F.interpolate(shown.movedim(-1, 1).float(), size=size, mode="area").round().byte().movedim(1, -1)
        fine = refine(some, small, "guided")
        whole = torch.zeros_like(fine).scatter_(1, fine.argmax(1, keepdim=True), 1.0)
        place = _centres(whole) * (torch.tensor(grid) / torch.tensor(size))
        found.append(torch.where(whole.sum((2, 3)).unsqueeze(-1) > 0, place, _centres(some)))
    return torch.cat(found)


def _centres(masks: Tensor) -> Tensor:
    """Mean row and column of masks (T, K, h, w) from the frame's middle, in their cells, (T, K, 2)."""
    area = masks.sum((2, 3)).clamp_min(LEAST).unsqueeze(-1)
    centres: Tensor = masks.flatten(2) @ places((masks.shape[2], masks.shape[3])) / area
    return centres


def make_tracks(
    loaded: LoadedRun, out: Path, progress: Progress = lambda *_: None, actions: Actions | None = None
) -> FeatureStore:
    """Follow every video of the run's store, and store its slots. What is finished is kept; a finished store is opened.

    ``UsageError`` for a run that predicts, ``IncompatibleError`` if ``out`` holds another run's, or other ``actions``;
    ``DataError`` if the store is incomplete or the disk full.
    """
    if isinstance(loaded.config.model, ForecastConfig):
        raise UsageError(
            f"{loaded.path}: finds no slots, it predicts (model.kind = {loaded.config.model.kind}); name a run of "
            "another kind, such as --preset default"
        )
    splits = [loaded.store[name].require_complete() for name in loaded.store.splits]
    if not splits:
        raise DataError(f"{loaded.store.path}: has no videos; extract some with slotlab extract")
    first = loaded.segment(splits[0], splits[0].videos[0])
    spec = tracks_spec(loaded, first, _noted(out, actions))
    with StoreWriter(out, spec) as writer:
        for split in splits:
            of = replace(split.spec, statistics_videos=0, shard_chunks=0)
            with closing(writer.split(split.name, of)) as target:
                _write_split(loaded, split, target, spec, progress, actions)
    return FeatureStore.open(out)


def _noted(out: Path, actions: Actions | None) -> dict[str, Any]:
    """What tokens have beside features and masks. A store of tracks that is there already keeps what it has."""
    there = (out / "zarr.json").exists()
    model = FeatureStore.open(out).spec.model if there else {"refined": True}
    noted = {key: model[key] for key in ("actions", "actions_digest", "refined") if key in model}
    return noted if actions is None else noted | {"actions": actions.size, "actions_digest": actions.digest}


def tracks_spec(loaded: LoadedRun, output: Output, noted: Mapping[str, Any]) -> StoreSpec:
    """The specification of a run's tracks; it names the run's weights, so that another run's do not pass for it, and
    what is ``noted`` of actions and places."""
    tap = features_tap(loaded)
    features = loaded.store.spec.taps[tap]
    slots, width = output.slots.shape[-2:]
    state = {"step": checkpoint.state(loaded.path)["step"], "weights": weights_digest(loaded.model)}
    model = {"library": "slotlab", "kind": loaded.config.model.kind, "tap": tap, "grid": list(features.grid), **state}
    width_of_tracks = features.dim + features.patches + noted.get("actions", 0) + (2 if noted.get("refined") else 0)
    return StoreSpec(
        backbone=loaded.store.spec.backbone,
        model=model | dict(noted) | {"features": dict(loaded.store.spec.model)},
        preprocessing=loaded.store.spec.preprocessing,
        taps={SLOTS: TapSpec((slots, 1), width), TRACKS: TapSpec((slots, 1), width_of_tracks)},
        frame_stride=loaded.store.spec.frame_stride,
        precision=loaded.store.spec.precision,
        source=str(loaded.path.resolve()),
        versions=loaded.store.spec.versions,
        exported_from=str(loaded.store.path.resolve()),
    )


def weights_digest(model: Model) -> str:
    """A short hash of a model's parameters and buffers."""
    tensors = model.state_dict()
    data = b"".join(tensors[name].detach().cpu().contiguous().numpy().tobytes() for name in sorted(tensors))
    return f"{google_crc32c.value(data):08x}"


def _write_split(
    loaded: LoadedRun, split: Split, target: SplitWriter, spec: StoreSpec, progress: Progress, actions: Actions | None
) -> None:
    total, done = sum(split.spec.lengths), 0
    if target.complete:
        progress(split.name, total, total)
        return
    rounded = ENCODINGS[spec.dtype].rounded
    tap = features_tap(loaded)
    moments = {name: Moments.empty(of.patches, of.dim) for name, of in spec.taps.items()}
    for followed in follow(loaded, split):
        features = split.tokens(tap, followed.video)
        if spec.model.get("actions") and actions is None:
            raise UsageError(f"{target.path}: unfinished, and has actions; name them again with slots --actions FILE")
        pushes = None if actions is None else actions.of[split.name][followed.video]
        frames = split.video(followed.video) if spec.model.get("refined") else None
        tracks = tracks_of(followed.shown.masks_on_grid, features, loaded.store.spec.taps[tap].grid, pushes, frames)
        tokens = {SLOTS: followed.shown.slots.float().cpu(), TRACKS: tracks}
        if followed.video not in target.done:
            target.write(followed.video, stored_video(split, followed.video), tokens)
        for name, values in tokens.items():
            moments[name] = moments[name] + Moments.from_tokens(rounded(values))
        done += len(followed)
        progress(split.name, done, total)
    target.finish(moments | {tap: split.statistics(tap)})


def stored_video(split: Split, video: int) -> Video:
    """A video of a store, as a source gives it."""
    masks = split.segmentations(video) if split.spec.masks else None
    ignored = split.ignored(video) if split.spec.ignored else None
    return Video(split.names[video], split.video(video), masks, split.instances(video), ignored)


# -- identity ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """How well slots keep their objects: counts of visible objects, summed over frames.

    An object's own slot is the one that it is matched with over the whole video (Hungarian algorithm, IoU above
    MATCHED_IOU).
    """

    visible: int = 0
    held: int = 0  # of them, those that a slot holds in that frame: matched one to one, with an IoU above MATCHED_IOU
    own: int = 0  # of them, those that their own slot holds

    def __add__(self, other: Identity) -> Identity:
        return Identity(self.visible + other.visible, self.held + other.held, self.own + other.own)

    @property
    def accuracy(self) -> float | None:
        """Share of held objects that their own slot holds; None if no object is held."""
        return self.own / self.held if self.held else None

    @property
    def covered(self) -> float | None:
        """Share of visible objects that a slot holds; None without objects."""
        return self.held / self.visible if self.visible else None

    @classmethod
    def of_tables(cls, tables: Tensor) -> Identity:
        """The counts of a video's contingency tables (T, n_true, K)."""
        visible = tables[:, 1:].sum(-1) > 0  # (T, objects)
        slots = matched_slots(tables, above=MATCHED_IOU)
        held = (slots >= 0) & visible
        own = held & (slots == own_slots(tables))
        return cls(int(visible.sum()), int(held.sum()), int(own.sum()))


def own_slots(tables: Tensor) -> Tensor:
    """The slot of each object of a video, (objects,) int64, from its tables (T, n_true, K); -1 for none."""
    return matched_slots(tables.sum(0, keepdim=True), above=MATCHED_IOU)[0]


def store_identity(split: Split) -> Identity | None:
    """The identity of the tracks of a split; None if its truth is not known."""
    if not split.has_truth:
        return None
    tracks, labels, found = Tracks.in_store(split.store), count_labels(split), Identity()
    for video in split.videos:
        masks = on_grid(tracks.masks(tracks.read(split, video)), tracks.grid)
        found += Identity.of_tables(mask_tables(masks, ground_truth(split, video), labels))
    return found
