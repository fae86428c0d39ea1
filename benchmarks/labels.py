"""Time from soft masks to the slot of each pixel, against upsampling all of them and taking the largest.

    python -m benchmarks.labels RUN [--cache STORE] [--split NAME] [--videos 3] [--rounds 3]

Plain: :func:`slotlab.masks.labels.masks_to_labels` against a bilinear upsampling of all slots and an argmax. Guided:
``fine_labels``, which leaves out slots that hold nothing, against the refined masks of all slots and their argmax. On
one thread, alternating frame by frame; medians in ms a frame, and the share of pixels with the same label.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import report
from slotlab.masks.labels import fine_labels, masks_to_labels
from slotlab.masks.refine import refine
from slotlab.runs.loaded import load_run
from slotlab.scoring.follow import follow


def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    made = make()
    return 1e3 * (time.perf_counter() - began), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--videos", type=int, default=3, help="number of videos, of each the middle frame")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_run(args.run, args.cache)
    split = loaded.split(args.split)
    size = split.spec.frame_size
    times: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    for followed in follow(loaded, split, split.spread(args.videos)):
        at = slice(followed.middle, followed.middle + 1)
        masks, picture = followed.masks[at].float(), split.video(followed.video)[at]
        ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "plain": (
                lambda masks=masks: F.interpolate(masks, size, mode="bilinear").argmax(1),
                lambda masks=masks: masks_to_labels(masks, size),
            ),
            "guided": (
                lambda masks=masks, picture=picture: refine(masks, torch.from_numpy(picture), "guided").argmax(1),
                lambda masks=masks, picture=picture: torch.from_numpy(fine_labels(masks, picture, "guided")),
            ),
        }
        for _ in range(args.rounds):
            for name, (all_slots, ours) in ways.items():
                (slow, expected), (fast, found) = timed(all_slots), timed(ours)
                times.setdefault(f"{name}, all slots", []).append(slow)
                times.setdefault(f"{name}, ours", []).append(fast)
                same.setdefault(name, []).append(float((expected == found).float().mean()))
    figures = {name: round(median(of), 1) for name, of in times.items()}
    figures |= {f"{name}, same": min(of) for name, of in same.items()}
    report("labels", {"slots": loaded.model.slots, "size": list(size)} | figures)


if __name__ == "__main__":
    main()
