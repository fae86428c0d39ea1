"""Videos to look at: which ones, and their frames, ground truth and masks packed for the page.

Masks travel as the soft masks they are, on the model's grid, so that the page upsamples and decides them as the
evaluation does. Arrays are deflated (raw deflate, which browsers inflate themselves) and in base64.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featcache.store.reading import Split
from slotlab.report.gather import RunData
from slotlab.scoring.metrics import score_of, shown

LARGEST_SIDE = 320  # pixels of an embedded frame; larger ones are shrunk
FINE_GRID = 48  # from here on masks have 8 bits, as their number makes up for it; below 16
WEBP_QUALITY = 82


@dataclass(frozen=True)
class Choice:
    """A video of the gallery, and why it is there."""

    video: int
    why: str  # "worst", "best" or ""


@dataclass(frozen=True)
class Footage:
    """Videos that several runs may share: the same source, split and size."""

    key: str
    split: Split
    runs: tuple[int, ...]  # positions in the report
    choices: tuple[Choice, ...]


def footages(runs: Sequence[RunData], count: int, by: str) -> list[Footage]:
    """Group the runs by what they look at, and choose ``count`` videos for each group.

    Half of them are the worst by the score ``by`` of the group's first run, worst first, and half the best. Without
    scores they are spread evenly over the split.
    """
    groups: dict[str, list[int]] = {}
    for position, run in enumerate(runs):
        if run.loaded is not None:
            spec = run.split.spec
            key = f"{run.split.name}/{spec.source_fingerprint}/{spec.frame_size}/{spec.lengths}"
            groups.setdefault(key, []).append(position)
    return [
        Footage(f"f{n}", runs[members[0]].split, tuple(members), choose(runs[members[0]], count, by))
        for n, members in enumerate(groups.values())
    ]


def choose(run: RunData, count: int, by: str) -> tuple[Choice, ...]:
    """Videos of one run; see :func:`footages`."""
    videos = list(run.split.videos)
    scores, score = run.evaluation.by_video if run.evaluation else {}, score_of(by)
    scored = [(scores.get(run.split.names[v], {}).get(by), v) for v in videos]
    ranked = [v for _, v in sorted((score.order(s) if score else s, v) for s, v in scored if s is not None)]
    if not ranked:
        spread = np.linspace(0, len(videos) - 1, min(count, len(videos))).round().astype(int)
        return tuple(Choice(videos[i], "") for i in spread)
    count = min(count, len(ranked))
    worst, best = ranked[: -(-count // 2)], ranked[::-1][: count // 2]
    return tuple([Choice(v, "worst") for v in worst] + [Choice(v, "best") for v in best])


def frame_indices(frames: int, most: int) -> npt.NDArray[np.int64]:
    """Every ``n``-th frame, at most ``most`` of them."""
    return np.arange(0, frames, max(1, -(-frames // most)))


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
        "runs": [pack_run(runs[r], r, video, kept) for r in footage.runs],
    }
    if split.spec.masks:
        truth = torch.from_numpy(split.segmentations(video)[kept])
        if truth.shape[1:] != (height, width):
            truth = F.interpolate(truth[:, None], size=(height, width), mode="nearest")[:, 0]
        card["truth"] = packed(truth.numpy())
    return card


def pack_run(run: RunData, position: int, video: int, kept: npt.NDArray[np.int64]) -> dict[str, Any]:
    """One run's view of a video; its masks are (T, K, rows, columns) of 8 or 16 bits."""
    assert run.loaded is not None
    grid = run.loaded.model.grid
    masks = run.loaded.segment(run.split, video).masks[torch.from_numpy(kept)].float().cpu()  # (T, K, N)
    found = run.traces[video]
    scores = run.evaluation.by_video.get(run.split.names[video], {}) if run.evaluation else {}
    bits = 8 if max(grid) >= FINE_GRID else 16
    codes, ranges = quantised(masks, bits)
    return {
        "run": position,
        "slots": masks.shape[1],
        "grid": list(grid),
        "bits": bits,
        "masks": packed(codes),
        "ranges": ranges,
        "matches": found.matches[kept].tolist(),
        "mass": [[round(float(v), 4) for v in frame] for frame in masks.mean(-1)],
        "scores": {key: scores.get(key) for key in shown("headline")},
        "by_frame": {key: rounded(found.values[key][kept]) for key in shown("headline") if key in found.values},
    }


def quantised(masks: Tensor, bits: int) -> tuple[npt.NDArray[Any], list[list[float]]]:
    """Masks (T, ...) as unsigned integers of 8 or 16 bits (little-endian), and each frame's least and largest value.

    A frame's codes span its own range, so that masks that hardly differ (a softmax that is still flat) keep their
    order too; upsampling commutes with that, so the largest slot of a pixel is decided as if on the values.
    """
    flat = masks.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    share = (flat - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    codes: npt.NDArray[Any] = (share * (2**bits - 1)).round().numpy().reshape(masks.shape)
    return codes.astype("u1" if bits == 8 else "<u2"), torch.cat([low, high], 1).tolist()


def packed(values: npt.NDArray[Any]) -> str:
    """The bytes of an array, in C order, deflated, in base64."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(deflate.compress(np.ascontiguousarray(values).tobytes()) + deflate.flush()).decode()


def webp(frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> str:
    """A frame (H, W, 3) as the data URI of a WebP of ``size`` (height, width)."""
    image = Image.fromarray(frame)
    if frame.shape[:2] != size:
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an embedded frame."""
    shrink = min(1.0, LARGEST_SIDE / max(size))
    return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))


def rounded(values: npt.NDArray[np.float64]) -> list[float | None]:
    """For JSON: None for NaN."""
    return [None if np.isnan(v) else round(float(v), 4) for v in values]


def pack(runs: Sequence[RunData], count: int, by: str, most_frames: int) -> list[Mapping[str, Any]]:
    """All cards of the gallery."""
    return [
        pack_video(footage, choice, runs, most_frames)
        for footage in footages(runs, count, by)
        for choice in footage.choices
    ]
