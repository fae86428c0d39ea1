"""Scores of mask refinement: on the frames that its parameters were chosen on, and its gain on other frames.

    python -m benchmarks.refinement RUN [RUN ...] [--on STORE[:SPLIT]] [--videos 30] [--frames 2] [--crf]

The grid below is scored on training videos of the first run, or on videos or pictures of another store; the gain of the
defaults, without ``--on``, on the whole validation split of every run. ``--crf`` adds the dense CRF, which needs
``slotlab[crf]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import report
from benchmarks.sets import mean_scores, split_of
from featcache.machine import pick_device
from featcache.store.reading import Split
from slotlab.masks.refine import Crf, Guided, Parameters, refine
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.fine import outline_scores
from slotlab.scoring.tables import count_labels, ground_truth, mask_tables, require_truth
from slotlab.words import Refinement

CHANGES: dict[type[Guided] | type[Crf], dict[str, tuple[Any, ...]]] = {
    Guided: {
        "scales": ((3,), (3, 3), (4, 4), (3, 3, 3), (3, 6, 6), (3, 3, 6, 12)),
        "radius": (0.67, 1.33),
        "epsilon": (1e-6, 1e-4, 1e-3),
        "flat": (0.0, 1e-4, 1e-3),
        "sharpening": (1.0, 2.0, 8.0),
        "votes": (0.0, 0.2),
    },
    Crf: {
        "position": (0.6, 1.9),
        "colour": (8.0, 20.0),
        "weight": (5.0, 20.0),
        "smooth_weight": (3.0, 6.0),
        "iterations": (10,),
    },
}


Frames = list[tuple[Tensor, Tensor, Tensor]]  # masks on the grid (T, K, h, w), pictures and truth of each video


def frames_of(loaded: LoadedRun, split: Split, videos: int, frames: int) -> Frames:
    """Some frames of videos that are spread over a split."""
    found = []
    for video in split.spread(videos):
        length = split.spec.lengths[video]
        at = torch.linspace(0, length - 1, frames + 2).round().long()[1:-1].unique()
        masks = loaded.segment(split, video).masks_on_grid[at]
        found.append((masks, torch.from_numpy(split.video(video))[at], ground_truth(split, video)[at]))
    return found


def score(masks: list[Tensor], frames: Frames, labels: int) -> dict[str, float]:
    """FG-ARI over frames of two objects or more, mBO over all, of the masks of each video."""
    tables = [
        table
        for found, (_, _, truth) in zip(masks, frames, strict=True)
        for table in mask_tables(found.cpu(), truth, labels)
    ]
    fg_ari, mbo = mean_scores(tables)
    return {"fg_ari": round(fg_ari, 4), "mbo": round(mbo, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--on", metavar="STORE[:SPLIT]")
    parser.add_argument("--videos", type=int, default=30)
    parser.add_argument("--frames", type=int, default=2, help="number of frames of each video")
    parser.add_argument("--crf", action="store_true")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device = pick_device(args.device)
    runs = [load_run(run, None, device) for run in args.runs]
    tuned, split = runs[0], runs[0].store[runs[0].config.data.train_split]
    if args.on:
        split = split_of(args.on)
        tuned = load_run(args.runs[0], split.store.path, device)
    frames, labels = frames_of(tuned, require_truth(split), args.videos, args.frames), count_labels(split)
    count = sum(len(truth) for _, _, truth in frames)
    methods: dict[Refinement, Parameters] = {"guided": Guided(), **({"crf": Crf()} if args.crf else {})}
    tried: list[dict[str, Any]] = [{"parameters": "plain", **score([masks for masks, *_ in frames], frames, labels)}]
    for method, default in methods.items():
        others = [
            dataclasses.replace(default, **{name: value})
            for name, values in CHANGES[type(default)].items()
            for value in values
        ]
        for parameters in (default, *others):
            began = time.perf_counter()
            refined = [refine(masks, pictures, method, parameters) for masks, pictures, _ in frames]
            milliseconds = 1e3 * (time.perf_counter() - began) / count
            found = score(refined, frames, labels)
            tried.append({"parameters": str(parameters), **found, "ms_per_frame": round(milliseconds, 1)})
    gains = [
        {"run": str(run.path), "plain_boundary_f": found["boundaries"]["boundary_f"], **found["refined"]}
        for run in ([] if args.on else runs)
        for method in methods
        for found in [outline_scores(run, None, method)]
    ]
    report("refinement", {"tuning_frames": count, "tried": tried, "validation": gains})


if __name__ == "__main__":
    main()
