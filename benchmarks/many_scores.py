"""Stores of many single images, scored: seconds and memory of ``eval``, ``stats`` and ``report`` by their number.

    python -m benchmarks.many_scores [--images 2000 20000] [--objects 7] [--categories 80] [--folder DIR]

Images have random rectangles of 80 categories on a grid of 8 x 8 tokens of 16 values, so that little is left of a run
but what each image costs beside its model. Their number is drawn so that most images have few and some have many, as in
COCO. Each command runs in a process of its own, whose anonymous memory is sampled.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import report
from benchmarks.large_store import in_own_process
from benchmarks.stores import TAP
from featcache.moments import Moments
from featcache.sources.video import Instance, Video
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from slotlab.config.load import load_config
from slotlab.training.train import train

SIDE, GRID, DIM = 32, 8, 16
COMMANDS = ("eval", "stats", "report")


def picture(number: int, objects: int, categories: int) -> tuple[Video, torch.Tensor]:
    """An image with its truth, and its tokens (1, N, D)."""
    rng = np.random.default_rng(number)
    masks = np.zeros((1, SIDE, SIDE), np.uint8)
    frames = rng.integers(90, 110, (1, SIDE, SIDE, 3), dtype=np.uint8)
    count = 1 + min(int(rng.poisson(objects - 1) * rng.choice((0.5, 1, 2))), 60)
    for k in range(count):
        top, left, height, width = rng.integers((0, 0, 4, 4), (SIDE - 4, SIDE - 4, 16, 16))
        masks[0, top : top + height, left : left + width] = k + 1
        frames[0, top : top + height, left : left + width] = rng.integers(0, 255, 3)
    visible = np.bincount(masks.ravel(), minlength=count + 1)
    instances = tuple(
        Instance("", "", "", "", (int(visible[k + 1]),), f"category{rng.integers(categories):02d}")
        for k in range(count)
    )
    cell = SIDE // GRID
    means = frames.reshape(1, GRID, cell, GRID, cell, 3).mean((2, 4)).reshape(1, -1, 3)
    mixing = np.random.default_rng(0).normal(size=(3, DIM))
    tokens = torch.from_numpy((means / 64) @ mixing + 0.1 * rng.normal(size=(1, GRID**2, DIM))).float()
    return Video(f"val2017/{number:012d}.jpg", frames, masks, instances), tokens


def make(path: Path, images: int, objects: int, categories: int) -> FeatureStore:
    """A finished store of such images."""
    spec = StoreSpec("random", {"library": "none"}, {"size": SIDE}, {TAP: TapSpec((GRID, GRID), DIM)})
    names = tuple(f"val2017/{number:012d}.jpg" for number in range(images))
    split = SplitSpec("random", (1,) * images, 1, (SIDE, SIDE), True, names=names)
    with StoreWriter(path, spec) as writer:
        part, moments = writer.split("validation", split), Moments.empty(GRID**2, DIM)
        for number in range(images):
            video, tokens = picture(number, objects, categories)
            part.write(number, video, {TAP: tokens})
            moments = moments + Moments.from_tokens(tokens)
        part.finish({TAP: moments})
        part.close()
    return FeatureStore.open(path)


def command(name: str, folder: Path) -> int:
    """One command of the product; its output's bytes."""
    from slotlab.commands.app import app

    run, store = folder / "run", folder / "store.zarr"
    words = {"eval": ["eval", str(run), "--json"], "stats": ["stats", str(store), "--json"]}
    words["report"] = ["report", str(run), "--out", str(folder / "report.html")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        app(words[name])
    return len(said.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--categories", type=int, default=80)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--folder", type=Path, help="where to make them; default: the temporary folder")
    args = parser.parse_args()
    for images in args.images:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = make(Path(folder) / "store.zarr", images, args.objects, args.categories)
            small = ["optim.steps=2", "optim.batch_size=8", "model.slots=7", "data.train_split=validation"]
            small += [
                "model.decoder.hidden=32",
                "model.decoder.layers=2",
                "model.slot_dim=16",
                "model.slot_mlp_hidden=0",
            ]
            train(load_config("dinosaur", None, small), store, Path(folder) / "run")
            for name in args.commands:
                measured = in_own_process(command, name, Path(folder))
                told = {key: measured[key] for key in ("seconds", "processor_seconds", "peak_anonymous_mb")}
                report(f"many_scores {name}", {"images": images} | told)


if __name__ == "__main__":
    main()
