"""Training from the cache against the same training with the ViT in the loop.

    python -m benchmarks.train [--cache cache/dinov2.zarr] [--steps 6] [--rounds 3]

Both take the same steps of the same model on the same clips. In the loop, every step runs the backbone on the frames of
its batch, which are in memory already decoded, as codebases without a cache do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import alternate, paired_ratio, report, timed
from featcache.backbones.backbone import Backbone, load_backbone
from featcache.backbones.inference import forward
from featcache.machine import pick_device
from featcache.store.reading import FeatureStore, Split
from featcache.stream.stream import FeatureStream
from slotlab.config.load import load_config
from slotlab.training.processes import Ranks
from slotlab.training.step import TrainStep


def in_the_loop(stream: FeatureStream, split: Split, backbone: Backbone, tap: str) -> Iterator[torch.Tensor]:
    """The stream's clips (B, T, N, D), or frames (B, N, D), their features computed anew at every step."""
    frames = np.asarray(split.array("video")[:])
    spec, samples = split.store.spec, 0
    while True:
        rows = stream.rows_at(samples)
        clips = frames[rows[:, None] + np.arange(stream.clip)]  # (B, T, H, W, 3)
        flat = clips.reshape(-1, *clips.shape[2:])
        tokens = forward(backbone, [flat], spec.batch_size, spec.precision)[0][tap]
        yield tokens.unflatten(0, clips.shape[:2]) if stream.clip > 1 else tokens
        samples += stream.batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache/dinov2.zarr"))
    parser.add_argument("--preset", default="default")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device = pick_device(args.device)
    config, store = load_config(args.preset), FeatureStore.open(args.cache)
    tap, split = store.tap(config.data.tap), store[config.data.train_split].require_complete()
    batch_size = config.optim.batch_size
    stream = FeatureStream(split, tap, batch_size=batch_size, clip=config.data.clip, device=device)
    size = int(store.spec.preprocessing["size"])
    backbone = load_backbone(store.spec.backbone, None, (tap,), size, device)
    cached = (batch.features for batch in stream)
    computed = in_the_loop(stream, split, backbone, tap)
    step = TrainStep.fresh(config, store, Ranks(device))

    def train(batches: Iterator[torch.Tensor], steps: int) -> int:
        for features in itertools.islice(batches, steps):
            step(features.to(device))
        return steps * batch_size

    train(cached, 2)  # warm up
    rates = alternate(
        {
            "cache": lambda: timed(lambda: train(cached, 10 * args.steps), device),
            "vit_in_the_loop": lambda: timed(lambda: train(computed, args.steps), device),
        },
        args.rounds,
    )
    report(
        "train",
        {
            "preset": args.preset,
            "batch_size": batch_size,
            "clip": config.data.clip,
            "samples_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
            "ratio": round(paired_ratio(rates, "cache", "vit_in_the_loop"), 1),
            "all": rates,
        },
    )


if __name__ == "__main__":
    main()
