"""Extraction against the bare model: how much decoding, statistics and durable writes cost.

    python -m benchmarks.extract [--videos 6] [--rounds 5]

Both run the same frames in the same batches. The bare model gets its images ready-made and throws its tokens
away; extraction starts from the sample's JPEGs and ends with a finished, synced store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import alternate, paired_ratio, report, timed
from featcache.backbones import load_backbone
from featcache.device import pick_device
from featcache.extract import ExtractOptions, extract, plan
from featcache.precision import autocast
from featcache.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="dinov2_vits14")
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    source = open_source(None)
    backbone = load_backbone(args.backbone, device=pick_device(args.device))
    options = ExtractOptions(splits=("train",), max_videos=args.videos)
    with tempfile.TemporaryDirectory() as folder:
        todo = plan(Path(folder) / "plan.zarr", source, backbone, options)
        batch_size, precision = todo.spec.batch_size, todo.spec.precision
        frames = [torch.from_numpy(source.read("train", i).frames) for i in range(args.videos)]
        batches = [b for f in frames for b in torch.split(backbone.preprocess(f), batch_size)]
        count = 0

        def bare() -> int:
            with autocast(backbone.device, precision):
                for batch in batches:
                    tokens = backbone(batch)[backbone.taps[0]]
            tokens.sum().item()  # waits for the device
            return sum(len(batch) for batch in batches)

        def whole() -> int:
            nonlocal count
            count += 1
            fresh = plan(Path(folder) / f"{count}.zarr", source, backbone, ExtractOptions(
                splits=("train",), max_videos=args.videos, batch_size=batch_size, precision=precision,
            ))  # fmt: skip
            return extract(fresh, source, backbone)["train"].frames

        bare()
        rates = alternate({"extract": lambda: timed(whole), "bare_model": lambda: timed(bare)}, args.rounds)
    report(
        "extract",
        {
            "backbone": args.backbone,
            "frames": args.videos * 24,
            "batch_size": batch_size,
            "precision": precision,
            "frames_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
            "ratio": round(paired_ratio(rates, "extract", "bare_model"), 3),
            "all": rates,
        },
    )


if __name__ == "__main__":
    main()
