"""The gallery's cards: a video's frames and ground truth, packed for the page, with each run's masks."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from featcache.store.reading import Split
from slotlab.report.gather import RunData
from slotlab.report.views import Choice, footage_key, frame_indices, packed
from slotlab.scoring.metrics import shown

LARGEST_SIDE = 320  # pixels of an embedded frame; larger ones are shrunk
WEBP_QUALITY = 82


@dataclass(frozen=True)
class Footage:
    """Videos of one source, split and size, which several runs may share."""

    key: str
    split: Split
    runs: tuple[int, ...]  # positions in the report
    choices: tuple[Choice, ...]


def footages(runs: Sequence[RunData]) -> list[Footage]:
    """The runs grouped by their videos; each group has the videos that were chosen for its first run."""
    groups: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        if run.views:
            groups.setdefault(footage_key(run.split), []).append(position)
    return [
        Footage(f"f{n}", runs[members[0]].split, tuple(members), runs[members[0]].choices)
        for n, members in enumerate(groups.values())
    ]


def pack_video(footage: Footage, choice: Choice, runs: Sequence[RunData], most_frames: int) -> dict[str, Any]:
    """One card of the gallery as JSON: frames, ground truth, and each run's masks, matches and frame scores."""
    split, video = footage.split, choice.video
    kept = frame_indices(split.spec.lengths[video], most_frames)
    frames = split.video(video)[kept]  # (T, H, W, 3)
    height, width = shown_size(frames.shape[1:3])
    kinds = sorted({i.material for i in split.instances(video)} - {""})
    card: dict[str, Any] = {
        "id": split.names[video],
        "footage": footage.key,
        "why": choice.why,
        "kind": "" if not kinds else f"all {kinds[0]}" if len(kinds) == 1 else "mixed",
        "size": [height, width],
        "indices": kept.tolist(),
        "total": split.spec.lengths[video],
        "frames": [webp(frame, (height, width)) for frame in frames],
        "truth": None,
        "ignored": None,  # pixels whose truth is not known, if there are any
        "runs": [seen_by(runs[position], position, video) for position in footage.runs],
    }
    if split.has_truth:
        truth, ignored = split.segmentations(video)[kept], split.ignored(video)[kept]
        card["truth"] = packed(shrunk(truth, (height, width)))
        if ignored.any():
            card["ignored"] = packed(shrunk(ignored.astype(np.uint8), (height, width)))
    return card


def shrunk(numbers: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Numbers (T, H, W) at another size, each pixel one of theirs."""
    if numbers.shape[1:] == size:
        return numbers
    return F.interpolate(torch.from_numpy(numbers)[:, None], size=size, mode="nearest")[:, 0].numpy()


def webp(frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> str:
    """A frame (H, W, 3) as the data URI of a WebP of ``size`` (height, width)."""
    image = Image.fromarray(frame)
    if frame.shape[:2] != size:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an embedded frame, from those of the stored one."""
    shrink = min(1.0, LARGEST_SIDE / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def seen_by(run: RunData, position: int, video: int) -> dict[str, Any]:
    """One run's masks of a video, with the video's scores."""
    scores = run.evaluation.by_video.get(run.split.names[video], {}) if run.evaluation else {}
    shown_scores = {key: scores.get(key) for key in shown("headline")}
    view = run.views[video].packed
    held = [slot for slot, masses in enumerate(zip(*view["mass"], strict=True)) if any(masses)]
    return {"run": position, **view, "held": held, "scores": shown_scores}


def scores_of(runs: Sequence[RunData]) -> dict[str, str]:
    """Key -> title of the scores beside a video: those that an evaluation defines, or all before there is one."""
    scored = [run.evaluation.values for run in runs if run.evaluation]
    defined = {key: title for key, title in shown("headline").items() if any(of[key] is not None for of in scored)}
    return defined or shown("headline")


def pack(runs: Sequence[RunData], most_frames: int) -> list[Mapping[str, Any]]:
    """All cards of the gallery as JSON."""
    return [pack_video(footage, choice, runs, most_frames) for footage in footages(runs) for choice in footage.choices]
