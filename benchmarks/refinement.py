"""Scores of mask refinement: on the frames that its parameters were chosen on, and its gain on other frames.

    python -m benchmarks.refinement RUN [RUN ...] [--videos 30] [--frames 2] [--crf]

The grid below is scored on training videos of the first run; the gain of the defaults, on the whole validation split
of every run. ``--crf`` adds the dense CRF, which needs ``slotlab[crf]``.
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
from featcache.machine import pick_device
from slotlab.masks.refine import Crf, Guided, Parameters, refine
from slotlab.runs.loaded import LoadedRun, load_run
from slotlab.scoring.fine import outline_scores
from slotlab.scoring.metrics import adjusted_rand_index, mean_best_overlap
from slotlab.scoring.tables import count_labels, mask_tables
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


def frames_of(loaded: LoadedRun, videos: int, frames: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Masks on the grid, pictures and ground truth of frames spread over training videos, and the count of labels."""
    split = loaded.store[loaded.config.data.train_split]
    masks, pictures, truth = [], [], []
    for video in split.spread(videos):
        length = split.spec.lengths[video]
        at = torch.linspace(0, length - 1, frames + 2).round().long()[1:-1]
        masks.append(loaded.segment(split, video).masks_on_grid[at])
        pictures.append(torch.from_numpy(split.video(video))[at])
        truth.append(torch.from_numpy(split.segmentations(video))[at])
    return torch.cat(masks), torch.cat(pictures), torch.cat(truth), count_labels(split)


def score(masks: Tensor, truth: Tensor, labels: int) -> dict[str, float]:
    table = mask_tables(masks.cpu(), truth, labels)
    fg_ari, mbo = adjusted_rand_index(table, foreground=True), mean_best_overlap(table)
    return {"fg_ari": round(float(fg_ari.nanmean()), 4), "mbo": round(float(mbo.nanmean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--videos", type=int, default=30)
    parser.add_argument("--frames", type=int, default=2, help="number of frames of each video")
    parser.add_argument("--crf", action="store_true")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    runs = [load_run(run, None, pick_device(args.device)) for run in args.runs]
    masks, pictures, truth, labels = frames_of(runs[0], args.videos, args.frames)
    methods: dict[Refinement, Parameters] = {"guided": Guided(), **({"crf": Crf()} if args.crf else {})}
    tried: list[dict[str, Any]] = [{"parameters": "plain", **score(masks, truth, labels)}]
    for method, default in methods.items():
        others = [
            dataclasses.replace(default, **{name: value})
            for name, values in CHANGES[type(default)].items()
            for value in values
        ]
        for parameters in (default, *others):
            began = time.perf_counter()
            refined = refine(masks, pictures, method, parameters)
            milliseconds = 1e3 * (time.perf_counter() - began) / len(masks)
            found = score(refined, truth, labels)
            tried.append({"parameters": str(parameters), **found, "ms_per_frame": round(milliseconds, 1)})
    gains = [
        {"run": str(run.path), "plain_boundary_f": found["boundaries"]["boundary_f"], **found["refined"]}
        for run in runs
        for method in methods
        for found in [outline_scores(run, None, method)]
    ]
    report("refinement", {"tuning_frames": len(masks), "tried": tried, "validation": gains})


if __name__ == "__main__":
    main()
