"""Stores of many single images, scored: seconds and memory of ``eval``, ``stats`` and ``report`` by their number.

    python -m benchmarks.many_scores [--images 2000 20000] [--side 32] [--grid 8] [--dim 16] [--preset small]
        [--objects 7] [--categories 80] [--folder DIR]

Images have random rectangles of 80 categories; their tokens are the mean colours of their cells, with noise. Most have
few rectangles and some have many, as in COCO. A shard of images is made, and the other shards are
links to its files: a store of as many images as COCO has needs no room on the disk. Unless told otherwise, tokens are
so few and the model so small that little is left of a run but what each image costs beside them. Each command runs in
a process of its own, whose anonymous memory is sampled; `again` is `eval` of another run on the same store.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import report
from benchmarks.large_store import in_own_process
from benchmarks.stores import TAP
from featcache.moments import Moments
from featcache.sources.video import Instance, Video
from featcache.store import manifest
from featcache.store.chunks import OpenShard, encoded_video
from featcache.store.encoding import ENCODINGS
from featcache.store.layout import array_layouts, chunk_path, fitting_shards
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from slotlab.config.load import load_config
from slotlab.training.train import train

COMMANDS = ("eval", "again", "stats", "report")
SMALL = (
    "model.slots=7",
    "model.decoder.hidden=32",
    "model.decoder.layers=2",
    "model.slot_dim=16",
    "model.slot_mlp_hidden=0",
)


@dataclass(frozen=True)
class Sizes:
    """Of a store: pixels of a side, cells of a side, and channels."""

    side: int
    grid: int
    dim: int


def picture(number: int, sizes: Sizes, objects: int, categories: int) -> tuple[Video, torch.Tensor]:
    """An image with its truth, and its tokens (1, N, D)."""
    rng, side, grid = np.random.default_rng(number), sizes.side, sizes.grid
    masks = np.zeros((1, side, side), np.uint8)
    frames = rng.integers(90, 110, (1, side, side, 3), dtype=np.uint8)
    count = 1 + min(int(rng.poisson(objects - 1) * rng.choice((0.5, 1, 2))), 60)
    for k in range(count):
        top, left, height, width = rng.integers(
            (0, 0, *(side // 8,) * 2), (*(side - side // 8,) * 2, *(side // 2,) * 2)
        )
        masks[0, top : top + height, left : left + width] = k + 1
        frames[0, top : top + height, left : left + width] = rng.integers(0, 255, 3)
    visible = np.bincount(masks.ravel(), minlength=count + 1)
    instances = tuple(
        Instance("", "", "", "", (int(visible[k + 1]),), f"category{rng.integers(categories):02d}")
        for k in range(count)
    )
    cell = side // grid
    means = frames.reshape(1, grid, cell, grid, cell, 3).mean((2, 4)).reshape(1, -1, 3)
    mixing = np.random.default_rng(0).normal(size=(3, sizes.dim))
    tokens = torch.from_numpy((means / 64) @ mixing + 0.1 * rng.normal(size=(1, grid**2, sizes.dim))).float()
    return Video(f"val2017/{number:012d}.jpg", frames, masks, instances), tokens


def make(path: Path, images: int, sizes: Sizes, objects: int, categories: int) -> FeatureStore:
    """A finished store of such images."""
    grid, side = (sizes.grid, sizes.grid), (sizes.side, sizes.side)
    spec = StoreSpec("random", {"library": "none"}, {"size": sizes.side}, {TAP: TapSpec(grid, sizes.dim)})
    names = tuple(f"val2017/{number:012d}.jpg" for number in range(images))
    split = SplitSpec("random", (1,) * images, 1, side, True, names=names)
    split = replace(split, shard_chunks=fitting_shards(spec, split) or 1)
    encode, layouts, rows = ENCODINGS[spec.dtype].encode, array_layouts(spec, split), []
    with StoreWriter(path, spec) as writer:
        part, moments = writer.split("validation", split), Moments.empty(sizes.grid**2, sizes.dim)
        shard = OpenShard(part.path, spec, split)
        for number in range(min(images, split.shard_chunks if split.shard_chunks > 1 else images)):
            video, tokens = picture(number, sizes, objects, categories)
            found = encoded_video(spec, split, number, video, {TAP: encode(tokens)})
            rows += [found.row]
            shard.put(found)
            moments = moments + Moments.from_tokens(tokens)
        shard.flush()
        for layout in layouts:
            folder = part.path / layout.name
            for number in range(1, -(-images // len(rows))):
                os.link(chunk_path(folder, 0, layout.ndim), chunk_path(folder, number, layout.ndim))
        each = (replace(rows[n % len(rows)], video=n, id=names[n]) for n in range(images))
        manifest.replace_rows(part.path, {row.video: row for row in each})
        part.finish({TAP: moments})
        part.close()
    return FeatureStore.open(path)


def command(name: str, folder: Path) -> int:
    """One command of the product; its output's bytes."""
    from slotlab.commands.app import app

    run, store = folder / "run", folder / "store.zarr"
    words = {
        "eval": ["eval", str(run), "--json"],
        "again": ["eval", f"{run}-again", "--json"],
        "stats": ["stats", str(store), "--json"],
    }
    words["report"] = ["report", str(run), "--out", str(folder / "report.html")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        app(words[name])
    return len(said.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--side", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--grid", type=int, default=8, help="tokens of a side")
    parser.add_argument("--dim", type=int, default=16, help="channels of a token")
    parser.add_argument("--preset", default="small", help="of the runs; small: a model that costs next to nothing")
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--categories", type=int, default=80)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--folder", type=Path, help="where to make them; default: the temporary folder")
    args = parser.parse_args()
    sizes = Sizes(args.side, args.grid, args.dim)
    for images in args.images:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = make(Path(folder) / "store.zarr", images, sizes, args.objects, args.categories)
            chosen = ["optim.steps=2", "optim.batch_size=8", "data.train_split=validation"]
            chosen += SMALL if args.preset == "small" else ()
            preset = "dinosaur" if args.preset == "small" else args.preset
            for seed, name in enumerate(("run", "run-again")):
                train(load_config(preset, None, [*chosen, f"seed={seed}"]), store, Path(folder) / name)
            for name in args.commands:
                measured = in_own_process(command, name, Path(folder))
                told = {key: measured[key] for key in ("seconds", "processor_seconds", "peak_anonymous_mb")}
                report(f"many_scores {name}", {"images": images} | told)


if __name__ == "__main__":
    main()
