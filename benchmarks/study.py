"""The study of a research log, planned for its own card: three backbones, its 60 videos and all of MOVi-A.

    python -m benchmarks.study [--device rtx5090] [--preset log-2026] [--batches 2 8 32]

A Markdown table of what ``slotlab plan`` says, shown in docs/planning.md: nothing is measured. The log trained on an
RTX 5090 with the ViT in every step: 2.7 s an epoch at a batch of 2 frames, 1.1 s at 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import chain

from featcache.backbones.backbone import outline
from featcache.machine import readable
from slotlab.config.load import load_config
from slotlab.planning.data import DataSet
from slotlab.planning.devices import find_device
from slotlab.planning.plan import make_plan

BACKBONES = ("dinov2_vits14", "dino_vits16", "clip_vitb16")  # at 224 px
VIDEOS = (60, 9703)  # of the log, and of MOVi-A's training split
FRAMES, SIDE = 24, 256


def shown(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds / 60:.1f} min"


def rows(device: str, preset: str, batches: list[int]) -> Iterator[tuple[str, ...]]:
    place = find_device(device, load_config(preset).optim.precision)
    for backbone in BACKBONES:
        for videos in VIDEOS:
            tower, made = outline(backbone, (), 224), {}  # a plan of an extraction uses its tower up
            for batch in batches:
                config = load_config(preset, None, optim__batch_size=batch)
                data = DataSet.of_counts(videos, FRAMES, (SIDE, SIDE), tower, config.data.train_split)
                last = batch == batches[-1]
                made[batch] = make_plan(config, data, place, ("float16", "int8"), tower if last else None, largest=last)
            extraction = made[batches[-1]].extraction
            assert extraction is not None
            for form, plans in enumerate(zip(*(made[batch].training for batch in batches), strict=True)):
                last_plan = plans[-1]
                yield (
                    backbone,
                    str(videos),
                    last_plan.dtype,
                    readable(last_plan.stream_bytes),
                    last_plan.home.residence,
                    f"{last_plan.largest_batch}",
                    *(f"{shown(plan.epoch_seconds)}, {plan.bound_by}" for plan in plans),
                    shown(3600 * extraction.hours) if form == 0 else "",
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="rtx5090")
    parser.add_argument("--preset", default="log-2026")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 8, 32])
    args = parser.parse_args()
    epochs = [f"epoch at batch {batch}" for batch in args.batches]
    head = ("backbone", "videos", "stored as", "features", "live on", "largest batch", *epochs, "extraction")
    for line in chain((head, ("---",) * len(head)), rows(args.device, args.preset, args.batches)):
        print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
