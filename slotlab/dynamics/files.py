"""Tracked slots in files that other programs read: NumPy's archives and HDF5."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from featcache.store.durable import write_output
from featcache.store.reading import FeatureStore, Split
from slotlab.dynamics.tracks import SLOTS
from slotlab.models.dynamics.motion import on_grid
from slotlab.models.dynamics.state import LEAST_AREA, places
from slotlab.models.inputs import Tracks
from slotlab.scoring.metrics import MATCHED_IOU, matched_slots
from slotlab.scoring.tables import count_labels, ground_truth, mask_tables
from slotlab.words import SlotFormat

Columns = dict[str, npt.NDArray[Any]]
NO_OBJECT = -1


def columns(tracks: Tracks, split: Split, video: int, labels: int) -> Columns:
    """One video's slots by column; T frames, K slots, grid of h x w patches.

    ``slots`` (T, K, S) float32, ``masks`` (T, K, h, w) float16, ``centroids`` (T, K, 2) and ``areas`` (T, K) in shares
    of the frame (rows, columns), ``active`` (T, K) whether a slot holds anything, ``identity`` (T, K) int16 the object
    that it holds by the ground truth (0 for label 1), -1 for none; ``actions`` (T, A) float32 where there are some.
    """
    height, width = tracks.grid
    tokens = tracks.read(split, video)
    masks = tracks.masks(tokens)  # (T, K, N)
    area = masks.sum(-1)
    centre = masks @ places(tracks.grid) / area.clamp_min(LEAST_AREA).unsqueeze(-1)
    if tracks.refined:
        centre = tokens[..., -2:].float()
    centre = centre / torch.tensor([height, width]) + 0.5
    identity = torch.full(area.shape, NO_OBJECT)
    maps = on_grid(masks, tracks.grid)
    if labels:
        slots = matched_slots(mask_tables(maps, ground_truth(split, video), labels), above=MATCHED_IOU)
        frame, item = torch.nonzero(slots >= 0, as_tuple=True)
        identity[frame, slots[frame, item]] = item
    return {
        "slots": split.tokens(SLOTS, video).float().numpy(),
        "masks": maps.half().numpy(),
        "centroids": centre.numpy(),
        "areas": (area / (height * width)).numpy(),
        "active": (area >= LEAST_AREA).numpy(),
        "identity": identity.to(torch.int16).numpy(),
        **({"actions": tracks.actions_of(tokens).numpy()} if tracks.actions else {}),
    }


def write_file(store: FeatureStore, path: Path, form: SlotFormat) -> None:
    """Write the slots of all splits of a store of tracks to one file, whole or not at all.

    ``npz``: ``SPLIT/VIDEO/COLUMN`` each, which numpy opens without pickle. ``hdf5``: a group for each split with the
    columns of :func:`columns`, frames of all videos in order, and ``ep_len`` and ``ep_offset`` of each video, as
    stable-worldmodel keeps episodes; the videos' names are in ``names``. ``DataError`` where it cannot be written.
    """
    tracks = Tracks.in_store(store)
    videos = (
        (name, split.names[video], of)
        for name in store.splits
        for split in [store[name].require_complete()]
        for video, of in _of_split(tracks, split)
    )
    packed = io.BytesIO()
    if form == "npz":
        arrays = {f"{split}/{video}/{key}": values for split, video, of in videos for key, values in of.items()}
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    else:
        with h5py.File(packed, "w") as file:
            for name in store.splits:
                _write_group(file.create_group(name), tracks, store[name].require_complete())
    write_output(path, packed.getvalue())


def _of_split(tracks: Tracks, split: Split) -> Iterator[tuple[int, Columns]]:
    labels = count_labels(split) if split.has_truth else 0
    for video in split.videos:
        yield video, columns(tracks, split, video, labels)


def _write_group(group: Any, tracks: Tracks, split: Split) -> None:
    videos = [of for _, of in _of_split(tracks, split)]
    lengths = np.array([len(of["slots"]) for of in videos], np.int64)
    for key in videos[0]:
        group[key] = np.concatenate([of[key] for of in videos])
    group["ep_len"], group["ep_offset"] = lengths, np.cumsum(lengths) - lengths
    group["names"] = [split.names[video] for video in split.videos]
